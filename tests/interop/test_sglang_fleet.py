"""A real SGLang prefill before `encode-server route --protocol sglang` and two encoders of ours: encoders are killed,
and one image in ten is broken. The variable `CHATS` sets how many chats are asked (200), `BROKEN_CHATS` how many with
broken ones among them, `CHATS_S` ends the asking after so many seconds."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.interop.engines import Engine, Prefill, free_port, image, our_encoder, sglang_encoder
from tests.interop.test_sglang import HERE, png

pytestmark = [pytest.mark.interop, pytest.mark.timeout(3600)]

CHATS = int(os.environ.get("CHATS", "200"))
BROKEN_CHATS = int(os.environ.get("BROKEN_CHATS", CHATS))
CHATS_S = float(os.environ.get("CHATS_S", "3000"))
KILL_EVERY_S = 10.0
CONCURRENT = 8
WARM_UP = [png(seed, 280, 280) for seed in range(1000, 1008)]  # the first chats take many seconds


class Balancer(Engine):
    """Our proxy, registered with a prefill as its only encoder."""

    def __init__(self, prefill: Prefill, log: Path) -> None:
        port = free_port()
        command = [sys.executable, "-m", "encode_server.cli", "route", "--protocol", "sglang", "--port", str(port)]
        super().__init__([*command, "--register-url", prefill.bootstrap, "--engine-url", prefill.url], port, log)

    def well(self) -> list[str]:
        return [url for url, well in httpx.get(self.url + "/readyz").json()["encoders"].items() if well]


class Victims:
    """Two encoders, of which one is killed every `KILL_EVERY_S` seconds, in turn, and started again in its place."""

    def __init__(self, start: Callable[[], Engine], well: Callable[[Engine], bool], stack: ExitStack) -> None:
        self._start, self._well, self._stack = start, well, stack
        self.encoders = [stack.enter_context(start()), stack.enter_context(start())]
        self.killed = 0
        self._stop = threading.Event()

    def until_well(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(httpx.HTTPError):  # a prefill that is gone
                if all(map(self._well, self.encoders)):
                    return
            time.sleep(0.2)

    def __enter__(self) -> Victims:
        self._thread = threading.Thread(target=self._kill)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _kill(self) -> None:
        for index in itertools.cycle((0, 1)):
            if self._stop.wait(KILL_EVERY_S):
                return
            os.killpg(self.encoders[index].process.pid, signal.SIGKILL)
            self.killed += 1
            self.encoders[index] = self._stack.enter_context(self._start())
            self.until_well()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fleet")
    subprocess.run([sys.executable, str(HERE / "make_checkpoint.py"), str(directory / "checkpoint")], check=True)
    return directory


@pytest.fixture
def prefill(directory) -> Iterator[Prefill]:
    with Prefill(directory / "checkpoint", directory / f"prefill-{free_port()}.log") as prefill:
        prefill.answering("/health")
        yield prefill


def ask_many(url: str, media: list[bytes]) -> tuple[Counter[int], float]:
    """The statuses of a chat about each image, and the seconds it all took. 0: no answer. -1: not asked, the time was
    up."""

    def ask(data: bytes) -> int:
        if time.monotonic() - started > CHATS_S:
            return -1
        message = {"role": "user", "content": [image(data), {"type": "text", "text": "hello"}]}
        try:
            body = {"model": "m", "max_tokens": 8, "messages": [message]}
            return httpx.post(url + "/v1/chat/completions", json=body, timeout=300).status_code
        except httpx.HTTPError:
            return 0

    started = time.monotonic()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return Counter(pool.map(ask, media)), time.monotonic() - started


def test_killed_encoders_fail_no_chat_and_broken_media_reach_no_prefill(prefill, directory):
    with ExitStack() as stack:
        balancer = stack.enter_context(Balancer(prefill, directory / "route.log"))
        balancer.answering("/livez")

        def start() -> Engine:
            return our_encoder(
                directory / "checkpoint", directory / f"ours-{free_port()}.log", balancer.url, "--cache-gb", "0.1"
            )

        victims = Victims(start, lambda encoder: encoder.url in balancer.well(), stack)
        victims.until_well()
        prefill.with_encoders(1)
        images = [png(seed, 280, 280) for seed in range(CHATS)]  # made before the first kill: that takes seconds
        ask_many(prefill.url, WARM_UP)
        with victims:
            statuses, seconds = ask_many(prefill.url, images)
        print(f"\n{CHATS} chats, {victims.killed} encoders killed: {dict(statuses)} in {seconds:.0f} s")
        assert statuses.keys() <= {200, -1} and prefill.process.poll() is None
        victims.until_well()
        media = [png(seed, 112, 112)[: None if seed % 10 else 200] for seed in range(BROKEN_CHATS)]
        statuses, seconds = ask_many(balancer.url, media)
        print(f"{BROKEN_CHATS} chats, one in ten with a broken image: {dict(statuses)} in {seconds:.0f} s")
        broken = BROKEN_CHATS // 10
        assert statuses == {200: BROKEN_CHATS - broken, 400: broken} and prefill.process.poll() is None


def test_own_encoders_for_comparison(prefill, directory):
    """SGLang deals parts to its own two encoders, killed in the same way. Prints what becomes of the chats."""
    with ExitStack() as stack:

        def start() -> Engine:
            return sglang_encoder(directory / "checkpoint", directory / f"own-{free_port()}.log", prefill.bootstrap)

        victims = Victims(start, lambda encoder: encoder.url in prefill.encoders(), stack)
        victims.until_well()
        images = [png(seed, 280, 280) for seed in range(CHATS)]  # made before the first kill: that takes seconds
        ask_many(prefill.url, WARM_UP)
        with victims:
            statuses, seconds = ask_many(prefill.url, images)
            victims._stop.set()
        alive = "alive" if prefill.process.poll() is None else "dead"
        print(f"\nSGLang's own, {victims.killed} killed: {dict(statuses)} in {seconds:.0f} s, prefill {alive}")
