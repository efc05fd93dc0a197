"""What a connection may cost before anybody knows who is behind it."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from encode_server.runtime.connections import ConnectionLimits
from tests.live import eventually
from tests.security.listener import app, listening

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
QUICK = ConnectionLimits(connections=8, head_s=0.5, unread_s=0.5)


@pytest.fixture(scope="module")
def listener():
    with listening() as live:
        yield live


@pytest.fixture
def quick():
    with listening(QUICK) as live:
        yield live


def pour(connection: socket.socket, first: bytes, piece: bytes, most: int) -> tuple[int, bytes]:
    """Send `piece` again and again, up to `most` bytes; how many were taken, and the answer."""
    sent, answer = 0, b""
    with contextlib.suppress(ConnectionError):
        connection.sendall(first)
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
    with contextlib.suppress(ConnectionError):
        answer = connection.recv(1000)
    return sent, answer


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (HEAD + b"X: ", b"a" * 4096),
        (HEAD, b"a: b\r\n" * 500),
        (b"GET /", b"a" * 4096),
        (b"", b"\r\n" * 2000),
        (POST + b"1;", b"a" * 4096),
        (POST + b"1\r\nx\r\n0\r\nT: ", b"a" * 4096),
        (POST + b"1\r\nx\r\n0\r\n", b"a: b\r\n" * 500),
        (HEAD, b"x" * 4096),
    ],
    ids=["one header", "tiny headers", "URL", "empty lines", "chunk extension", "trailer", "trailers", "header name"],
)
def test_what_carries_no_body_ends(listener, first, piece):
    most = 64 << 20
    with listener.connect() as connection:
        sent, answer = pour(connection, first, piece, most)
    assert sent < 16 << 20, "the listener took it without end"  # sockets have buffers
    assert not answer or answer[9:12] in (b"431", b"400")


def test_who_sends_too_many_headers_is_told(listener):
    with listener.connect() as connection:
        connection.sendall(HEAD + b"a: b\r\n" * 200 + b"\r\n")
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 431 ") and b'"code":"headers_too_large"' in answer


def test_a_large_body_and_small_chunks_are_no_headers(listener):
    with listener.connect() as connection:
        connection.sendall(POST + b"1\r\nx\r\n" * 60_000 + b"0\r\n\r\n")
        answer = b""
        while len(answer) < 60_000:
            answer += connection.recv(1 << 20)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"x" * 60_000)


def test_requests_one_after_the_other_do_not_add_up(listener):
    with listener.connect() as connection:
        for _ in range(300):
            connection.sendall(HEAD + b"X: " + b"a" * 1000 + b"\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_few_pipelined_requests_are_answered(listener):
    with listener.connect() as connection:
        connection.sendall(GET * 4)
        answer = b""
        while answer.count(b"HTTP/1.1 200") < 4:
            answer += connection.recv(10_000)


def test_pipelined_requests_without_end_are_not_kept(listener):
    with listener.connect() as connection:
        sent, _ = pour(connection, b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n", GET * 1000, 64 << 20)
    assert sent < 16 << 20
    assert eventually(lambda: listener.open == 0, 10)


def test_a_request_whose_client_left_ends_also_with_another_behind_it(caplog):
    """An answer written to its closed connection would be a fault of ours in the log."""
    ended = []

    async def answers_who_left(scope, receive, send):
        if scope["type"] == "http":
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"too late"})
            ended.append(scope["path"])
        else:
            await app(scope, receive, send)

    with listening(application=answers_who_left) as listener:
        with listener.connect() as connection:
            connection.sendall(GET * 2)
        assert eventually(lambda: ended and not listener.open, 10)
    assert not [record.exc_text for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("begun", [b"", b"GET / HT", HEAD + b"X: y\r\n"], ids=["nothing", "a line", "headers"])
def test_headers_have_a_time(quick, begun):
    with quick.connect() as connection:
        connection.sendall(begun)
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ") if begun else answer == b""
    assert eventually(lambda: quick.open == 0, 10)


def test_headers_that_trickle_have_the_same_time(quick):
    with quick.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(GET)
        connection.recv(1000)
        connection.sendall(HEAD)
        ends = time.monotonic() + 20
        while time.monotonic() < ends and quick.open:
            connection.sendall(b"a: b\r\n")
            time.sleep(0.1)
    assert quick.open == 0


@pytest.mark.parametrize("path", [b"/large", b"/"], ids=["within an answer", "after small answers"])
def test_who_reads_nothing_is_left(quick, path):
    with quick.connect() as connection:
        connection.settimeout(0.2)
        for _ in range(20_000):
            try:
                connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            except (TimeoutError, ConnectionError):
                break
        assert eventually(lambda: quick.open == 0, 20)


def test_a_body_is_not_read_for_long_after_its_answer(quick):
    with quick.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        ends = time.monotonic() + 20
        while time.monotonic() < ends and quick.open:
            connection.sendall(b"x")
            time.sleep(0.1)
    assert quick.open == 0


def test_idle_connections_make_room_for_new_ones(quick):
    """Whoever keeps all places must not keep a probe out."""
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(quick.connect()) for _ in range(40)]
        with quick.connect() as probe:
            probe.sendall(GET)
            assert probe.recv(1000).startswith(b"HTTP/1.1 200")
        assert quick.open <= QUICK.connections
        assert kept[0].recv(10) == b""


def test_requests_in_progress_are_not_given_up_for_new_connections(quick):
    wait = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(quick.connect()) for _ in range(QUICK.connections)]
        for connection in kept:
            connection.sendall(wait)
        assert eventually(lambda: len(quick.server.server_state.tasks) == QUICK.connections, 10)
        with quick.connect() as late:
            assert late.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert len(quick.server.server_state.tasks) == QUICK.connections
