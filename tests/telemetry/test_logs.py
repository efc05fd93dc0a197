"""The log as text and as JSON: ids of the request in each line, nothing that a stranger sends looks like a line."""

from __future__ import annotations

import contextvars
import io
import json
import logging
import re

import pytest

from encode_server.telemetry import logs
from encode_server.telemetry.ids import MAX_LENGTH, RequestIds, enter_request, ids_from_headers

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def log_as():
    """`log_as("json")`: a stream that receives what is logged, in that format."""
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level

    def start(log_format: str) -> io.StringIO:
        root.handlers.clear()
        logs.configure("info", log_format)
        stream = io.StringIO()
        root.handlers[0].setStream(stream)
        return stream

    yield start
    root.handlers[:] = before
    root.setLevel(level)


def served(request_id: str | None, traceparent: str | None, function) -> None:
    """Call the function as on the way of a request with these headers."""

    def call() -> None:
        enter_request(ids_from_headers(request_id, traceparent))
        function()

    contextvars.copy_context().run(call)


def one_request() -> None:
    logs.log_request("a-1", "image", "push", "ok", 2, 64, {"fetch": 0.0012, "total": 0.1})


def test_a_request_leaves_one_line(log_as):
    stream = log_as("text")
    served("caller-7", PARENT, one_request)
    line = stream.getvalue()
    assert line.endswith(
        "INFO encode_server.requests: req=a-1 modality=image destination=push outcome=ok items=2 tokens=64 "
        f"fetch=1.2ms total=100.0ms id=caller-7 trace={TRACE}\n"
    )


def test_as_json_it_has_fields(log_as):
    stream = log_as("json")
    served("caller-7", PARENT, one_request)
    line = json.loads(stream.getvalue())
    assert line["level"] == "INFO" and line["logger"] == "encode_server.requests"
    assert line["request_id"] == "caller-7" and line["trace_id"] == TRACE
    assert line["request"]["outcome"] == "ok" and line["request"]["ms"] == {"fetch": 1.2, "total": 100.0}
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line["time"])


def test_lines_of_no_request_name_none(log_as):
    stream = log_as("json")
    logging.getLogger("x").warning("ranks %s", "lost")
    line = json.loads(stream.getvalue())
    assert line["message"] == "ranks lost" and "request_id" not in line and "trace_id" not in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_stranger_sends_cannot_look_like_a_line(log_as, log_format):
    stream = log_as(log_format)
    forged = "x\n2026-01-01 ERROR root: forged\x1b[2J\u2028\x85"
    served(forged, forged, lambda: logging.getLogger("x").info("got %s", forged))
    text = stream.getvalue()
    assert (
        text.count("\n") == 1
        and text.isprintable() is False
        and not re.search("[\x00-\x09\x0b-\x1f\x80-\x9f\u2028]", text)
    )


def test_an_exception_cannot_forge_a_line_either(log_as):
    stream = log_as("text")
    try:
        raise ValueError("bad\n2026-01-01 00:00:00,000 ERROR root: forged")
    except ValueError:
        logging.getLogger("x").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("ERROR x: failed") and rest and all(line.startswith("  | ") for line in rest)


def test_a_request_id_with_blanks_stays_one_word(log_as):
    stream = log_as("text")
    logs.log_request("a outcome=ok", "image", "answer", "too_busy", 1, 0, {})
    assert 'req="a outcome=ok" modality=image' in stream.getvalue()


@pytest.mark.parametrize(
    ("given", "taken"),
    [("caller-7", "caller-7"), (" a b\t", "a_b"), ('"\u00e9;', "___"), ("x" * 500, "x" * MAX_LENGTH)],
)
def test_a_callers_id_is_taken_within_bounds(given, taken):
    assert ids_from_headers(given, None) == RequestIds(taken, given=True)


@pytest.mark.parametrize("given", [None, "", "  "])
def test_without_one_each_request_gets_its_own(given):
    first, second = ids_from_headers(given, None), ids_from_headers(given, None)
    assert not first.given and re.fullmatch("[0-9a-f]{32}", first.request_id) and first != second


@pytest.mark.parametrize(
    ("header", "trace", "sampled"),
    [
        (PARENT, TRACE, True),
        (PARENT[:-1] + "0", TRACE, False),
        ("01" + PARENT[2:] + "-more", TRACE, True),  # a later version of the header
        ("ff" + PARENT[2:], None, False),
        (PARENT.upper(), None, False),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None, False),
        ("nonsense", None, False),
    ],
)
def test_the_trace_is_the_callers(header, trace, sampled):
    ids = ids_from_headers("a", header)
    assert (ids.trace_id, ids.sampled) == (trace, sampled)
