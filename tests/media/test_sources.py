import asyncio
import base64
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pybase64
import pytest

from encode_server.errors import BadMedia, Forbidden, TooLarge
from encode_server.media import web
from encode_server.media.files import FileRoots
from encode_server.media.limits import MediaLimits
from encode_server.media.sources import MediaSource

from .samples import image_bytes
from .web_server import WebServer, web_server

LOOPBACK = ["127.0.0.1"]
BODY = b"media " * 1000


@pytest.fixture(scope="module")
def server() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


def fetch(
    *urls: str,
    allow: Sequence[str] = LOOPBACK,
    roots: Sequence[Path] = (),
    limits: MediaLimits = MediaLimits(fetch_seconds=5),  # noqa: B008
    **options: object,
) -> bytes:
    """Fetch the URLs one after the other from one source; the last one's bytes."""

    async def run() -> bytes:
        source = MediaSource(allow, roots, limits, executor, **options)
        try:
            for url in urls:
                data = await source.fetch(url)
            return data
        finally:
            await source.aclose()

    with ThreadPoolExecutor(2) as executor:
        return asyncio.run(run())


# Inside the request


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 200_000, 1_000_001])
@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "", "data:;base64,", "DATA:image/png;charset=x;BASE64,", "  "]
)
def test_base64_in_every_dress(size: int, head: str) -> None:
    data = os.urandom(size)
    text = base64.b64encode(data).decode()
    assert fetch(head + text) == data
    assert fetch(head + text.rstrip("=")) == data
    assert fetch(head + base64.urlsafe_b64encode(data).decode()) == data
    assert fetch(head + base64.encodebytes(data).decode()) == data
    if head.strip():
        assert fetch(head + quote(text, safe="")) == data


def test_data_uris_in_percent_encoding() -> None:
    data = bytes(range(256)) * 3000
    assert fetch("data:application/octet-stream," + quote(data)) == data
    assert fetch("data:,plain%20text") == b"plain text"


def test_a_jpeg_in_base64_is_no_path_though_it_begins_with_a_slash(tmp_path: Path) -> None:
    data = image_bytes("JPEG")
    text = base64.b64encode(data).decode()
    assert text.startswith("/9j/")
    assert fetch(text, roots=[tmp_path]) == data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "data:",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:,",
        "no base64!",
        "QUJD=QUJD",
        "QQ==QUJD",
        "Q",
        "\u00e9\u00e8",
        "QUJD" * 100_000 + "=" + "QUJD" * 10,
        "QUJD" * 100_000 + "!",
        "ftp://example.com/x",
        "gopher:x",
        "data:,\ud800",
        "file:///\ud800",
        "http://\ud800.com/",
        "http://xn--/",
        "QUJ\ud800",
    ],
)
def test_what_is_neither_url_nor_base64_is_an_error(text: str) -> None:
    with pytest.raises(BadMedia):
        fetch(text)


def test_inline_media_have_a_size_limit() -> None:
    text = base64.b64encode(bytes(100_001)).decode()
    limits = MediaLimits(max_bytes=100_000)
    for url in (text, "data:;base64," + text, "data:," + "%00" * 100_001):
        with pytest.raises(TooLarge, match="100000 bytes"):
            fetch(url, limits=limits)


def test_large_base64_leaves_the_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded in another thread, in pieces: each holds the interpreter lock to its end."""
    text = base64.b64encode(bytes(40 << 20)).decode()
    lengths: list[int] = []
    threads: set[int] = set()
    whole = pybase64.b64decode

    def noted(piece: str, validate: bool) -> bytes:
        lengths.append(len(piece))
        threads.add(threading.get_ident())
        return whole(piece, validate=validate)

    monkeypatch.setattr(pybase64, "b64decode", noted)

    async def run() -> None:
        source = MediaSource([], [], MediaLimits(), executor)
        assert len(await source.fetch(text)) == 40 << 20
        await source.aclose()

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(run())
    assert sum(lengths) == len(text) and max(lengths) <= 1 << 20
    assert threading.get_ident() not in threads


# http


def test_a_url_gives_its_body_and_keeps_its_name(server: WebServer) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == ("media.test", server.port)
        return ["127.0.0.1"]

    server.seen.clear()
    assert fetch(f"http://media.test:{server.port}/ok", allow=["media.test"], resolve=resolve) == BODY
    assert server.seen == [(f"media.test:{server.port}", "/ok")]


def test_redirects_are_followed_up_to_their_number(server: WebServer) -> None:
    base = f"http://127.0.0.1:{server.port}"
    assert fetch(f"{base}/again/4") == BODY
    with pytest.raises(BadMedia, match="more than 5 times"):
        fetch(f"{base}/again/5")
    with pytest.raises(BadMedia, match="more than 0 times"):
        fetch(f"{base}/to//ok", limits=MediaLimits(redirects=0))


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("http://169.254.169.254/latest/meta-data/", Forbidden),
        ("http://[::1]/", Forbidden),
        ("http://[::ffff:10.0.0.1]/", Forbidden),
        ("http://2130706433/", Forbidden),
        ("//10.0.0.1/", Forbidden),
        ("http://127.0.0.2/", Forbidden),
        ("file:///etc/hostname", BadMedia),
        ("data:,x", BadMedia),
        ("ftp://127.0.0.1/", BadMedia),
        ("http://user:secret@127.0.0.1/", BadMedia),
        ("http://", BadMedia),
    ],
)
def test_a_redirect_leads_nowhere_that_a_url_may_not(server: WebServer, target: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        fetch(f"http://127.0.0.1:{server.port}/to/{target}")


def test_rebinding_gains_nothing(server: WebServer) -> None:
    answers: Iterator[list[str]] = iter([["127.0.0.1"], ["127.0.0.2"]])
    asked = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    url = f"http://rebind.test:{server.port}/status/404"
    # One look-up for one connection: nothing asks again between check and connect.
    with pytest.raises(BadMedia, match="404"):
        fetch(url, resolve=resolve)
    assert asked == ["rebind.test"]
    # The second answer is checked like the first.
    with pytest.raises(Forbidden) as caught:
        fetch(url, resolve=resolve)
    assert "127.0.0" not in caught.value.message


def test_a_dead_address_leaves_time_for_the_next(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_CONNECT_SECONDS", 0.5)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    with contextlib.ExitStack() as stack:
        # It listens and accepts nobody: once its queue is full it does not answer, as an address without a host.
        dead = stack.enter_context(socket.create_server(("127.0.0.9", server.port), backlog=1))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(dead.getsockname())
        started = time.monotonic()
        assert fetch(f"http://two.test:{server.port}/ok", allow=["127.0.0.0/8"], resolve=resolve) == BODY
        assert time.monotonic() - started >= 0.5, "the first was waited for"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("status/404", "answered 404, expected 200"),
        ("status/500", "500"),
        ("status/204", "204"),
        ("short", "cannot be fetched"),
        ("rubbish", "cannot be fetched"),
        ("gzip", "compressed"),
        ("size/0", "empty"),
    ],
)
def test_a_server_s_failures_are_bad_media(server: WebServer, path: str, words: str) -> None:
    with pytest.raises(BadMedia, match=words):
        fetch(f"http://127.0.0.1:{server.port}/{path}")


@pytest.mark.parametrize("path", ["size/100001", "endless", "crumbs/200000"])
def test_a_body_beyond_the_limit_is_not_read_to_its_end(server: WebServer, path: str) -> None:
    with pytest.raises(TooLarge, match="100000 bytes"):
        fetch(f"http://127.0.0.1:{server.port}/{path}", limits=MediaLimits(max_bytes=100_000))


@pytest.mark.parametrize("path", ["trickle", "silence"])
def test_a_server_that_takes_its_time_holds_nothing(server: WebServer, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(BadMedia, match=r"did not arrive within 0\.3 s"):
        fetch(f"http://127.0.0.1:{server.port}/{path}", limits=MediaLimits(fetch_seconds=0.3))
    assert time.monotonic() - start < 20  # the server goes on for a minute


def test_a_name_server_that_never_answers_holds_nothing() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    with pytest.raises(BadMedia, match="within"):
        fetch("http://slow.test/", allow=["public"], resolve=resolve, limits=MediaLimits(fetch_seconds=0.2))


def test_unknown_names_and_closed_ports_are_bad_media() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(BadMedia, match="cannot be found"):
        fetch("http://nowhere.test/", allow=["public"], resolve=resolve)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(BadMedia, match="cannot be fetched"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/")


def test_the_system_resolves_names_and_they_are_checked(server: WebServer) -> None:
    assert fetch(f"http://localhost:{server.port}/ok", allow=["localhost"]) == BODY
    with pytest.raises(Forbidden):
        fetch(f"http://localhost:{server.port}/ok", allow=["public"])


def test_a_proxy_in_the_environment_is_not_asked(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(f"http://127.0.0.1:{server.port}/ok") == BODY


def test_many_urls_at_once_and_a_cancelled_one(server: WebServer) -> None:
    async def run() -> None:
        source = MediaSource(LOOPBACK, [], MediaLimits(fetch_seconds=5), executor)
        base = f"http://127.0.0.1:{server.port}"
        slow = asyncio.create_task(source.fetch(f"{base}/silence"))
        bodies = await asyncio.gather(*(source.fetch(f"{base}/ok") for _ in range(20)))
        assert bodies == [BODY] * 20
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert await source.fetch(f"{base}/ok") == BODY
        await source.aclose()

    with ThreadPoolExecutor(2) as executor:
        asyncio.run(run())


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_tls_is_verified_for_the_name_at_the_pinned_address(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=media.test"]
    command += ["-addext", "subjectAltName=DNS:media.test", "-out", str(cert), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    names: list[str | None] = []
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(cert, key)
    serving.sni_callback = lambda sock, name, context: names.append(name)
    trusting = ssl.create_default_context(cafile=str(cert))

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with web_server() as server:
        server.socket = serving.wrap_socket(server.socket, server_side=True)
        options = {"allow": LOOPBACK, "resolve": resolve}
        assert fetch(f"https://media.test:{server.port}/ok", **options, ssl_context=trusting) == BODY
        assert names == ["media.test"]
        with pytest.raises(BadMedia, match="cannot be fetched"):
            fetch(f"https://other.test:{server.port}/ok", **options, ssl_context=trusting)
        with pytest.raises(BadMedia, match="cannot be fetched"):
            fetch(f"https://media.test:{server.port}/ok", **options)


# Files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a file, and beside it one that is out of bounds."""
    inside = tmp_path / "media"
    (inside / "deep er").mkdir(parents=True)
    (inside / "deep er" / "a.bin").write_bytes(BODY)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "media-else").mkdir()
    (tmp_path / "media-else" / "b").write_bytes(b"secret")
    return inside


def test_files_below_a_root_are_read(root: Path) -> None:
    path = root / "deep er" / "a.bin"
    (root / "link").symlink_to(path)
    for url in (
        path.as_uri(),
        f"file://localhost{quote(str(path))}",
        str(path),
        f"file:{quote(str(path))}",
        f"{root}/link",
    ):
        assert fetch(url, roots=[root]) == BODY


Make = Callable[[Path], str]


@pytest.mark.parametrize(
    "make",
    [
        lambda root: f"file://{root}/../secret",
        lambda root: f"file://{root}/%2e%2e/secret",
        lambda root: f"{root}/../secret",
        lambda root: f"file://{root.parent}/media-else/b",
        lambda root: f"file://{root.parent}/missing",
        lambda root: f"file://{root}",
        lambda root: f"file://{root}/deep%20er",
        lambda root: "file:///etc/passwd",
        lambda root: "file:///dev/zero",
        lambda root: (root / "out").symlink_to(root.parent / "secret") or f"file://{root}/out",
        lambda root: (root / "up").symlink_to(root.parent) or f"file://{root}/up/secret",
        lambda root: (root / "zero").symlink_to("/dev/zero") or f"file://{root}/zero",
        lambda root: os.mkfifo(root / "pipe") or f"file://{root}/pipe",
    ],
)
def test_what_is_not_a_regular_file_below_a_root_is_forbidden(root: Path, make: Make) -> None:
    with pytest.raises(Forbidden) as caught:
        fetch(make(root), roots=[root])
    assert str(root.parent) not in caught.value.message


@pytest.mark.parametrize("rest", ["missing", "a%00b", "deep%20er/a.bin/x", "x?y=z"])
def test_files_that_cannot_be_read_are_bad_media(root: Path, rest: str) -> None:
    with pytest.raises(BadMedia) as caught:
        fetch(f"file://{root}/{rest}", roots=[root])
    assert str(root) not in caught.value.message


def test_files_have_a_size_limit_and_none_is_read_without_a_root(root: Path) -> None:
    url = f"file://{quote(str(root))}/deep%20er/a.bin"
    with pytest.raises(TooLarge):
        fetch(url, roots=[root], limits=MediaLimits(max_bytes=len(BODY) - 1))
    with pytest.raises(Forbidden):
        fetch(url)
    with pytest.raises(Forbidden):
        fetch("file:///x", roots=[root])
    with pytest.raises(BadMedia):
        fetch("file://other.host/x", roots=[root])
    with pytest.raises(ValueError, match="no directory"):
        fetch("", roots=[root / "missing"])


def test_a_link_swapped_in_meanwhile_is_not_followed(root: Path) -> None:
    """A race between check and open, run many times: what is read is never the secret."""
    path = root / "a"
    path.write_bytes(BODY)
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            (root / "new").symlink_to(root.parent / "secret")
            (root / "new").replace(path)
            (root / "new").write_bytes(BODY)
            (root / "new").replace(path)

    files = FileRoots([root])
    thread = threading.Thread(target=swap)
    thread.start()
    read = refused = 0
    deadline = time.monotonic() + 60
    try:
        while (read + refused < 1000 or not (read and refused)) and time.monotonic() < deadline:
            try:
                assert files.read(str(path), MediaLimits()) == BODY
                read += 1
            except (Forbidden, BadMedia):
                refused += 1
        assert read and refused
    finally:
        over.set()
        thread.join()
