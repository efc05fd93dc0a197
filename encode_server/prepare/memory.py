"""Decoded media are charged before they are decoded: a preparer begins no more than its memory holds."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition

SHARE = 0.5  # of the process' memory; the rest is for what processors make of the decoded media


class DecodeMemory:
    """Bytes that decodes in progress may take together. A decode that takes more than there is runs alone. Decodes
    begin in the order in which they came, or small ones would keep a large one waiting without end."""

    def __init__(self, memory_bytes: int) -> None:
        self._total = int(memory_bytes * SHARE)
        self._used = 0
        self._changed = Condition()
        self._waiting: deque[object] = deque()  # only the first may begin

    @contextlib.contextmanager
    def hold(self, nbytes: int, on_wait: Callable[[], None], on_begin: Callable[[], None]) -> Iterator[None]:
        """Hold `nbytes` during the block, in the thread that decodes. `on_wait` and `on_begin` are called when the
        thread has to wait for other decodes, and when the wait is over."""
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                if not self._may_begin(me, nbytes):
                    on_wait()
                    self._changed.wait_for(lambda: self._may_begin(me, nbytes))
                    on_begin()
                self._used += nbytes
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()  # the next one may fit as well
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()

    def _may_begin(self, waiter: object, nbytes: int) -> bool:
        return self._waiting[0] is waiter and (not self._used or self._used + nbytes <= self._total)
