"""What a preparer says last, when it cannot go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.prepare import worker
from encode_server.wire import preparers as m


def nothing(*_: Any, **__: Any) -> None: ...


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("loading", "serving", "status", "said"),
    [
        (nothing, raising(KeyError("job 7")), 4, "a preparer failed: KeyError: 'job 7'"),
        (raising(OSError("no file")), nothing, 4, "the checkpoint's processors cannot be loaded: OSError: no file"),
        (raising(StartupError("no processor_config.json")), nothing, 3, "no processor_config.json"),
    ],
)
def test_a_preparer_tells_a_failed_start_from_a_failure_later(
    loading: Callable[..., Any], serving: Callable[..., Any], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[m.Event] = []

    class Front:
        def __init__(self, *_: Any) -> None: ...

        send = staticmethod(lambda frame: sent.append(m.decode_event(frame)))
        close = nothing

    monkeypatch.setattr(worker, "Channel", Front)
    monkeypatch.setattr(worker, "Preprocessor", loading)
    monkeypatch.setattr(worker.Worker, "serve", serving)
    for name in ("open_directory", "ArenaWriter", "confine"):
        monkeypatch.setattr(worker, name, nothing)
    monkeypatch.setattr(worker.gc, "freeze", nothing)
    limits = msgspec.Raw(msgspec.msgpack.encode(MediaLimits()))
    setup = m.PreparerSetup("", "/", "stand-in", limits, 1000, 1, 1 << 30, 1 << 20)
    assert worker.main(msgspec.msgpack.encode(setup), [0]) == status
    assert sent[-1] == m.Failed(said)
