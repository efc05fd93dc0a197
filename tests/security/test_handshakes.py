"""What a TLS handshake may cost that nobody ends."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from encode_server.runtime.connections import ConnectionLimits
from tests.live import eventually
from tests.security.listener import Listener, listening
from tests.security.test_connections import GET

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")

FEW = 8


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout key.pem -out cert.pem -subj /CN=x -addext"
    subprocess.run([*command.split(), "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True)
    return folder


@contextlib.contextmanager
def over_tls(certificate: Path, head_s: float) -> Iterator[Listener]:
    files = {"ssl_certfile": str(certificate / "cert.pem"), "ssl_keyfile": str(certificate / "key.pem")}
    with listening(ConnectionLimits(connections=FEW, head_s=head_s), **files) as live:
        yield live


def ask(listener: Listener, certificate: Path, request: bytes = GET) -> bytes:
    """The whole answer to a request over TLS, on a connection of its own."""
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    with context.wrap_socket(listener.connect(), server_hostname="127.0.0.1") as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(1 << 20):
            answer += piece
        return answer


def closed(connection: socket.socket) -> bool:
    connection.settimeout(20)
    try:
        return connection.recv(10) == b""
    except ConnectionError:
        return True


def test_requests_are_answered_whole(certificate: Path) -> None:
    close = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    with over_tls(certificate, 10) as listener:
        assert ask(listener, certificate, b"GET /large" + close + b"\r\n").endswith(bytes(8 << 20))
        body = bytes(range(256)) * 4096
        head = b"POST /" + close + b"Content-Length: %d\r\n\r\n" % len(body)
        assert ask(listener, certificate, head + body).endswith(body)
        assert eventually(lambda: listener.open == 0, 10)


def test_handshakes_that_nobody_ends_make_room_for_new_connections(certificate: Path) -> None:
    """They would take the descriptors of probes, downloads and restarts."""
    close = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with over_tls(certificate, 60) as listener, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(listener.connect()) for _ in range(FEW + 4)]
        assert all(closed(connection) for connection in kept[:4])
        assert ask(listener, certificate, close).startswith(b"HTTP/1.1 200")


def test_a_handshake_has_a_time(certificate: Path) -> None:
    with over_tls(certificate, 0.3) as listener, listener.connect() as silent, listener.connect() as begun:
        begun.sendall(b"\x16\x03\x01")
        assert closed(silent) and closed(begun)


def test_what_is_no_handshake_ends(certificate: Path) -> None:
    with over_tls(certificate, 60) as listener, listener.connect() as plain:
        plain.sendall(GET)
        assert not plain.recv(1000).startswith(b"HTTP")
