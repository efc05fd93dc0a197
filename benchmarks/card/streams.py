"""Streams and events of the emulated device: work runs only when somebody waits for it, as late as CUDA would allow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Mark:
    """A place in a stream that an event stands for. `passed`: everything queued before it has run."""

    stream: Stream
    passed: bool = False


Task = Callable[[], None]


class Stream:
    """Tasks in order. A task runs when this stream is waited for, or a stream that waits for this one.

    `running`: held while a task of any stream of the device runs. Without it, a second thread that waits would run a
    task whose predecessor the first thread has taken from the queue and not finished.
    """

    def __init__(self, running: threading.RLock) -> None:
        self.tasks: deque[Task] = deque()
        self._running = running

    def queue(self, task: Task) -> None:
        self.tasks.append(task)

    def synchronize(self) -> None:
        """Run everything that is queued."""
        with self._running:
            while self.tasks:
                self.tasks.popleft()()

    def run_to(self, mark: Mark) -> None:
        """Run what is queued before `mark`."""
        with self._running:
            while not mark.passed:
                self.tasks.popleft()()

    def wait_event(self, event: Event) -> None:
        """Later tasks of this stream run after what `event` stands for."""
        if (mark := event.mark) is not None:
            self.queue(lambda: mark.stream.run_to(mark))

    def wait_stream(self, other: Stream) -> None:
        """Later tasks of this stream run after what `other` holds now."""
        event = Event()
        event.record(other)
        self.wait_event(event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """As `torch.cuda.Event`. One that was never recorded counts as passed."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.blocking, self.timed = blocking, enable_timing
        self.mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        assert isinstance(stream, Stream), "name the stream of an event: the current one depends on the thread"
        mark = self.mark = Mark(stream)

        def passed() -> None:
            mark.passed = True

        stream.queue(passed)

    def wait(self, stream: Stream) -> None:
        stream.wait_event(self)

    def query(self) -> bool:
        return self.mark is None or self.mark.passed

    def synchronize(self) -> None:
        if self.mark is not None:
            self.mark.stream.run_to(self.mark)

    def elapsed_time(self, later: Event) -> float:
        """Always a millisecond: the emulation knows no time."""
        assert self.timed and later.timed, "events without timing cannot be compared"
        assert self.query() and later.query(), "an event has not passed yet"
        return 1.0


class Streams:
    """All streams, and the current one of each thread."""

    def __init__(self) -> None:
        self._running = threading.RLock()
        self.default = Stream(self._running)
        self._all = [self.default]
        self._current = threading.local()

    def new(self, *_: Any, **__: Any) -> Stream:
        stream = Stream(self._running)
        self._all.append(stream)
        return stream

    @property
    def pending(self) -> int:
        """Tasks that have not run, of all streams."""
        return sum(len(stream.tasks) for stream in self._all)

    def current(self, _device: Any = None) -> Stream:
        return getattr(self._current, "stream", self.default)

    def make_current(self, stream: Stream) -> None:
        self._current.stream = stream

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before = self.current()
        self.make_current(stream)
        try:
            yield
        finally:
            self.make_current(before)

    def synchronize(self, _device: Any = None) -> None:
        for stream in self._all:
            stream.synchronize()
