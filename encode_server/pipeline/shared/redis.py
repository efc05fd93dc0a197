"""Redis and Valkey, spoken to directly: RESP2, of which four commands are used.

Not by a client library: those read a value in pieces of 64 KiB, and take the interpreter lock back after each. Into a
front whose loop is busy, 8 MB came in 25 ms (redis-py, asyncio), 36 ms (redis-py in a thread) and 15 ms by one system
call into memory of the right size, as here.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from encode_server.errors import first_line
from encode_server.pipeline.shared.line import Refused, Unreachable, Value

PORT = 6379
MAX_LINE = 4096  # bytes of a reply's first line
MAX_SENT = 256  # pieces in one system call
READ = 16384


@dataclass(frozen=True)
class RedisAddress:
    """`tls`: TLS with the system's certificate authorities (or those of `SSL_CERT_FILE`). `password_file`: read at each
    connection, so that a password may change."""

    host: str
    port: int
    tls: bool = False
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None


def parse_address(url: str, password_file: str | None = None) -> RedisAddress:
    """`redis://[[user]:password@]host[:port][/database]`, `rediss://` for TLS. Raises ValueError, whose message quotes
    nothing of the URL: it may hold a password."""
    parts = urlsplit(url)
    database = parts.path.strip("/")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("its port is no port") from None
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("expected redis://[[user]:password@]host[:port][/database], or rediss:// for TLS")
    if database and not (database.isascii() and database.isdigit() and len(database) < 6):
        raise ValueError("its path is not the number of a database")
    if password_file is not None and parts.password:
        raise ValueError("it holds a password, and there is a file of it as well")
    return RedisAddress(
        parts.hostname,
        port or PORT,
        parts.scheme == "rediss",
        int(database or 0),
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        password_file,
    )


class RedisStore:
    """`ttl_s`: a value goes when it was written so long ago."""

    def __init__(self, address: RedisAddress, ttl_s: int) -> None:
        self._address, self._ttl_s = address, ttl_s

    def line(self) -> RedisLine:
        """See `Store`."""
        return RedisLine(self._address, self._ttl_s)


class RedisLine:
    """One connection. See `Line`."""

    def __init__(self, address: RedisAddress, ttl_s: int) -> None:
        self._address, self._ttl_s = address, ttl_s
        self._socket: socket.socket | None = None
        self._deadline = 0.0
        self._read = b""  # bytes that came with an earlier reply

    def fetch(self, keys: Sequence[str], limit: int, deadline: float) -> Iterator[memoryview | None]:
        """See `Line`."""
        with self._until(deadline):
            # A range, not the whole: how much is read must not be the cache's choice.
            self._send(b"".join(_command("GETRANGE", key, "0", str(limit - 1)) for key in keys))
            for _ in keys:
                value = self._reply(limit)
                if isinstance(value, Refused):
                    raise value
                yield value or None

    def store(self, entries: Sequence[tuple[str, Value]], deadline: float) -> Iterator[Refused | None]:
        """See `Line`."""
        with self._until(deadline):
            for key, value in entries:
                size = sum(len(piece) for piece in value)
                head = b"*5\r\n" + _bulks("SET", key) + b"$%d\r\n" % size
                self._send(head, *value, b"\r\n" + _bulks("EX", str(self._ttl_s)))
            for _ in entries:
                reply = self._reply(0)
                yield reply if isinstance(reply, Refused) else None

    def close(self) -> None:
        """See `Line`."""
        connection, self._socket = self._socket, None
        self._read = b""
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    @contextlib.contextmanager
    def _until(self, deadline: float) -> Iterator[None]:
        """Connected; whatever the exit, a connection with replies to come is not used again."""
        self._deadline = deadline
        whole = False
        try:
            if self._socket is None:
                self._connect()
            yield
            whole = True
        except OSError as error:
            if isinstance(error, TimeoutError | BlockingIOError):
                raise TimeoutError("the shared cache did not answer in time") from None
            raise Unreachable(first_line(error)) from None
        finally:
            if not whole:
                self.close()

    def _connect(self) -> None:
        address = self._address
        connection: socket.socket = socket.create_connection((address.host, address.port), self._left())
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls:
                context = ssl.create_default_context()
                connection = context.wrap_socket(connection, server_hostname=address.host)
            self._socket = connection
            self._read = b""
            self._greet()
        except BaseException:
            connection.close()
            self._socket = None
            raise

    def _greet(self) -> None:
        address = self._address
        password = address.password
        if address.password_file is not None:
            password = Path(address.password_file).read_text().strip()
        commands = []
        if password is not None:
            commands.append(_command("AUTH", *filter(None, (address.user,)), password))
        if address.database:
            commands.append(_command("SELECT", str(address.database)))
        if commands:
            self._send(b"".join(commands))
        for _ in commands:
            if isinstance(reply := self._reply(0), Refused):
                raise reply

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _armed(self, option: int) -> socket.socket:
        """The socket, its next call bounded in time. A plain one blocks in the kernel: with a time-out of Python's own
        a large value would take a call, and the interpreter lock, for each of its pieces."""
        if (connection := self._socket) is None:
            raise ConnectionError("closed")
        left = self._left()
        if isinstance(connection, ssl.SSLSocket):
            connection.settimeout(left)
        else:
            connection.setblocking(True)
            seconds, fraction = divmod(left, 1)
            connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(fraction * 1e6) + 1))
        return connection

    def _send(self, *pieces: bytes | memoryview) -> None:
        left = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        while left:
            connection = self._armed(socket.SO_SNDTIMEO)
            if isinstance(connection, ssl.SSLSocket):
                sent = connection.send(left[0])
            else:
                sent = connection.sendmsg(left[:MAX_SENT])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _reply(self, limit: int) -> memoryview | Refused | None:
        """One reply: the bytes of a string, an error, or nothing."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            message = rest.decode(errors="replace")
            return Refused(message, full=message.startswith("OOM"))
        if kind in (b"+", b":"):
            return None
        try:
            size = int(rest)
        except ValueError:
            size = -2
        if kind != b"$" or not -1 <= size <= limit:
            raise ConnectionError("a reply that was not asked for")
        return None if size < 0 else self._bulk(size)

    def _line(self) -> bytes:
        while (end := self._read.find(b"\r\n")) < 0:
            if len(self._read) > MAX_LINE:
                raise ConnectionError("a reply that was not asked for")
            came = self._armed(socket.SO_RCVTIMEO).recv(READ)
            if not came:
                raise ConnectionError("the connection was closed")
            self._read += came
        line, self._read = self._read[:end], self._read[end + 2 :]
        return line

    def _bulk(self, size: int) -> memoryview:
        room = memoryview(bytearray(size + 2))
        have = min(len(self._read), len(room))
        room[:have] = self._read[:have]
        self._read = self._read[have:]
        while have < len(room):
            connection = self._armed(socket.SO_RCVTIMEO)
            flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL
            came = connection.recv_into(room[have:], 0, flags)
            if not came:
                raise ConnectionError("the connection was closed")
            have += came
        return room[:size]


def _command(*words: str) -> bytes:
    return b"*%d\r\n" % len(words) + _bulks(*words)


def _bulks(*words: str) -> bytes:
    encoded = [word.encode() for word in words]
    return b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
