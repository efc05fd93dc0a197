"""A shared cache that is slow, gone, full or lies costs a bounded time, and never an error or a wrong row."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.redis_server import Proxy, RedisServer
from encode_server.pipeline.cache import CacheKey
from encode_server.pipeline.shared.breaker import FAILURES, FIRST_S, Breaker
from encode_server.pipeline.shared.cache import SharedCache, SharedLimits
from encode_server.pipeline.shared.line import Refused, Unreachable
from encode_server.pipeline.shared.mooncake import parse_mooncake
from encode_server.pipeline.shared.redis import RedisStore, parse_address
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.embedding import EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from tests.live import eventually
from tests.redis_server import needs_redis

DIM = 4
HANG_S = 20  # no look-up takes so long but one that hangs


def key(name: str) -> CacheKey:
    return CacheKey(Modality.IMAGE, f"sha256:{name}", ItemOptions())


def item(name: str, tokens: int = 10) -> EncodedItem:
    data = (name.encode() * (tokens * DIM * 4))[: tokens * DIM * 4]
    return EncodedItem(ItemInfo(tokens, None, f"sha256:{name}"), {}, memoryview(data))


class Bench:
    """A cache over a store, and what is counted."""

    def __init__(self, url: str, timeout_s: float = 5.0, max_bytes: int = 1 << 20, **address) -> None:
        self.metrics = Metrics()
        store = RedisStore(parse_address(url, **address), 60)
        self.cache = SharedCache(store, SharedLimits(timeout_s, max_bytes), self.metrics)
        self.cache.fingerprint = "f"

    async def put(self, name: str, **options) -> None:
        before = self.written()
        self.cache.put(key(name), item(name, **options), "float32", DIM)
        async with asyncio.timeout(HANG_S):
            while self.written() == before:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def written(self) -> int:
        return sum(self.writes(outcome) for outcome in self.metrics.shared_writes)

    async def get(self, name: str) -> bytes | None:
        async with asyncio.timeout(HANG_S):
            found = await self.cache.get(key(name), "float32", DIM)
        assert found is None or bytes(found.data[:1]) == name.encode()[:1]
        return None if found is None else bytes(found.data)

    def looks(self, outcome: str) -> int:
        return int(self.metrics.shared_look_ups[outcome]._value.get())

    def writes(self, outcome: str) -> int:
        return int(self.metrics.shared_writes[outcome]._value.get())


@contextlib.asynccontextmanager
async def bench(*args, **options):
    made = Bench(*args, **options)
    try:
        yield made
    finally:
        made.cache.close()


@pytest.fixture(scope="module")
def redis():
    with RedisServer() as server:
        yield server


@pytest.fixture
def empty(redis):
    redis.cli("FLUSHALL")
    return redis


@needs_redis
def test_one_server_finds_what_another_wrote(empty):
    async def scenario():
        async with bench(empty.url) as one, bench(empty.url) as other:
            await one.put("a")
            assert await other.get("a") == bytes(item("a").data)
            assert await other.get("b") is None
            assert (one.writes("stored"), other.looks("hit"), other.looks("miss")) == (1, 1, 1)

    asyncio.run(scenario())
    assert 0 < int(empty.cli("TTL", empty.cli("KEYS", "*"))) <= 60


@needs_redis
def test_many_are_asked_for_in_one_round_trip(empty):
    async def scenario():
        async with bench(empty.url) as one:
            for name in "abcdefgh":
                await one.put(name)
            found = await asyncio.gather(*(one.get(name) for name in "abcdefghij"))
            assert [each is not None for each in found] == [True] * 8 + [False] * 2

    asyncio.run(scenario())


@needs_redis
def test_servers_of_another_checkpoint_see_nothing(empty):
    async def scenario():
        async with bench(empty.url) as one, bench(empty.url) as other:
            other.cache.fingerprint = "g"
            await one.put("a")
            assert await other.get("a") is None

    asyncio.run(scenario())


@needs_redis
def test_nothing_is_asked_before_the_checkpoint_is_known(empty):
    async def scenario():
        async with bench(empty.url) as one:
            one.cache.fingerprint = None
            await one.put("a")
            assert await one.get("a") is None
            assert (one.looks("skipped"), one.writes("skipped")) == (1, 1)

    asyncio.run(scenario())


@needs_redis
def test_large_embeddings_stay_outside(empty):
    async def scenario():
        async with bench(empty.url, max_bytes=1000) as one:
            await one.put("a", tokens=63)
            assert one.writes("too_large") == 1 and await one.get("a") is None
            await one.put("b", tokens=62)
            assert await one.get("b") is not None

    asyncio.run(scenario())


@needs_redis
def test_a_server_that_comes_back_is_used_again(empty):
    async def scenario():
        async with bench(empty.url, 2.0) as one:
            await one.put("a")
            empty.kill()
            for _ in range(FAILURES):
                assert await one.get("a") is None
            assert not one.cache.asking
            began = time.monotonic()
            assert await one.get("a") is None and time.monotonic() - began < FIRST_S / 2  # nobody is asked
            empty.start()
            async with asyncio.timeout(HANG_S):
                while one.looks("miss") == 0:
                    await one.get("a")
                    await asyncio.sleep(0.05)
                while one.looks("hit") == 0:
                    await one.put("a")
                    await one.get("a")

    asyncio.run(scenario())


@needs_redis
def test_a_silent_server_costs_the_timeout_and_then_nothing(empty):
    async def scenario():
        with Proxy(empty.port) as proxy:
            async with bench(proxy.url, 0.15) as one:
                await one.put("a")
                assert await one.get("a") is not None
                proxy.deaf = True
                began = time.monotonic()
                assert await asyncio.gather(*(one.get("a") for _ in range(40))) == [None] * 40
                assert time.monotonic() - began < HANG_S / 2
                assert not one.cache.asking and one.looks("timeout") >= FAILURES
                skipped = one.looks("skipped")
                assert await one.get("a") is None and one.looks("skipped") == skipped + 1

    asyncio.run(scenario())


def flip(piece: bytes) -> bytes:
    return piece[:-20] + bytes(byte ^ 255 for byte in piece[-20:-10]) + piece[-10:]


@needs_redis
def test_changed_bytes_are_a_miss(empty):
    async def scenario():
        with Proxy(empty.port) as proxy:
            async with bench(proxy.url) as one:
                await one.put("a")
                proxy.lie = flip
                assert await one.get("a") is None
                assert one.looks("garbled") == 1

    asyncio.run(scenario())


@needs_redis
def test_anothers_value_is_a_miss(empty):
    async def scenario():
        async with bench(empty.url) as one:
            await one.put("a")
            (a,) = empty.cli("KEYS", "*").split()
            await one.put("b")
            (b,) = set(empty.cli("KEYS", "*").split()) - {a}
            empty.cli("COPY", a, b, "REPLACE")
            assert await one.get("b") is None and one.looks("garbled") == 1
            empty.cli("SET", b, "x" * 10_000)
            assert await one.get("b") is None and one.looks("garbled") == 2
            empty.cli("DEL", b)
            empty.cli("LPUSH", b, "x")
            assert await one.get("b") is None and one.looks("refused") == 1

    asyncio.run(scenario())


@needs_redis
def test_a_huge_value_is_not_read(empty):
    async def scenario():
        async with bench(empty.url, max_bytes=1000) as one:
            await one.put("a")
            empty.cli("SETRANGE", empty.cli("KEYS", "*"), str(400 << 20), "x")
            assert await one.get("a") is None and one.looks("garbled") == 1

    asyncio.run(scenario())
    empty.cli("FLUSHALL")


@needs_redis
def test_a_full_server_stores_nothing_and_goes_on_answering():
    async def scenario():
        with RedisServer("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as small:
            async with bench(small.url) as one:
                for number in range(40):
                    await one.put(f"{number}x", tokens=12_000)
                assert one.writes("full") > 0 and not one.cache.writing
                assert one.cache.asking and await one.get("0x") is not None
                assert one.cache.queued_bytes == 0

    asyncio.run(scenario())


@needs_redis
def test_writes_that_wait_are_bounded(empty):
    async def scenario():
        with Proxy(empty.port) as proxy:
            proxy.deaf = True
            async with bench(proxy.url) as one:
                one.cache.max_queued_bytes = 1000
                for name in "abcdefghij":
                    one.cache.put(key(name), item(name), "float32", DIM)
                assert one.writes("dropped") == 4 and one.cache.queued_bytes == 960

    asyncio.run(scenario())


@needs_redis
def test_a_password_from_the_url_or_a_file(tmp_path):
    secret = tmp_path / "secret"

    async def scenario():
        with RedisServer("--requirepass", "p@ss") as locked:
            host = locked.url.removeprefix("redis://")
            secret.write_text("wrong\n")
            async with (
                bench(f"redis://:p%40ss@{host}/3") as good,
                bench(locked.url, password_file=str(secret)) as filed,
                bench(locked.url) as bare,
            ):
                await good.put("a")
                assert good.writes("stored") == 1 and await good.get("a") is not None
                await bare.get("a")
                await filed.get("a")
                assert (bare.looks("refused"), filed.looks("refused")) == (1, 1)
                secret.write_text("p@ss\n")
                await filed.get("a")
                assert filed.looks("miss") == 1  # another database

    asyncio.run(scenario())


@needs_redis
def test_tls(tmp_path, monkeypatch):
    certificate, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [*command.split(), "-keyout", str(private), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    options = ("--tls-cert-file", str(certificate), "--tls-key-file", str(private), "--tls-auth-clients", "no")

    async def scenario():
        with RedisServer() as plain:
            tls_port = plain.port
            plain.kill()
            with RedisServer("--tls-port", str(tls_port), *options) as server:
                assert server.port != tls_port
                async with bench(f"rediss://localhost:{tls_port}") as stranger:
                    await stranger.get("a")
                    assert stranger.looks("unreachable") == 1  # nobody vouches for the certificate
                monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
                async with bench(f"rediss://localhost:{tls_port}", max_bytes=8 << 20) as one:
                    await one.put("a", tokens=200_000)
                    assert one.writes("stored") == 1
                    assert len(await one.get("a") or b"") == 200_000 * DIM * 4

    assert ssl.HAS_TLSv1_2
    asyncio.run(scenario())


class ScriptedLine:
    """Answers by a script: bytes, None, an exception."""

    def __init__(self) -> None:
        self.script: list[object] = []
        self.closed = 0

    def line(self) -> ScriptedLine:
        return self

    def fetch(self, keys, limit, deadline):
        for _ in keys:
            answer = self.script.pop(0) if self.script else None
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def store(self, entries, deadline):
        yield from (None for _ in entries)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (TimeoutError(), "timeout"),
        (Unreachable("gone"), "unreachable"),
        (Refused("LOADING"), "refused"),
        (RuntimeError("a bug"), "unreachable"),
        (memoryview(b"noise"), "garbled"),
    ],
)
def test_every_failure_is_a_miss_and_has_a_name(failure, outcome):
    async def scenario():
        line, metrics = ScriptedLine(), Metrics()
        line.script = [failure]
        cache = SharedCache(line, SharedLimits(5.0, 1000), metrics)
        cache.fingerprint = "f"
        assert await cache.get(key("a"), "float32", DIM) is None
        assert metrics.shared_look_ups[outcome]._value.get() == 1
        cache.close()

    asyncio.run(scenario())


def test_a_look_up_that_is_cancelled_leaves_nothing():
    async def scenario():
        cache = SharedCache(ScriptedLine(), SharedLimits(5.0, 1000), Metrics())
        cache.fingerprint = "f"
        look = asyncio.create_task(cache.get(key("a"), "float32", DIM))
        await asyncio.sleep(0)
        look.cancel()
        assert (await asyncio.gather(look, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        assert not cache._looks
        assert await cache.get(key("b"), "float32", DIM) is None  # and the lines go on
        cache.close()

    asyncio.run(scenario())


def test_the_breaker_lets_one_trial_through_and_waits_longer_each_time():
    now, opened = [0.0], []
    breaker = Breaker(lambda: opened.append(now[0]), lambda: now[0])
    for _ in range(FAILURES):
        assert breaker.admits()
        breaker.failed()
    assert opened == [0.0] and not breaker.admits()
    now[0] = FIRST_S
    assert breaker.admits() and not breaker.admits()
    breaker.failed()
    now[0] += FIRST_S
    assert not breaker.admits()
    now[0] += FIRST_S
    assert breaker.admits()
    breaker.abandoned()
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.closed and breaker.admits() and breaker.admits()


@pytest.mark.parametrize(
    "url",
    ["http://h", "redis://", "redis://h:99999", "redis://h/x", "redis://:secret@h/?x=1", "redis://:secret@h:port"],
)
def test_a_wrong_address_is_refused_without_being_quoted(url):
    with pytest.raises(ValueError) as error:
        parse_address(url)
    assert "secret" not in str(error.value)


MASTER = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

TWO_STORES = """
import asyncio, sys
from tests.pipeline.test_shared_cache import DIM, item, key
from encode_server.pipeline.shared.cache import SharedCache, SharedLimits
from encode_server.pipeline.shared.mooncake import MooncakeStore, parse_mooncake
from encode_server.telemetry.metrics import Metrics

async def main():
    caches = []
    for lent in ("/64", ""):
        address = parse_mooncake(sys.argv[1] + lent, "127.0.0.1", "tcp", "")
        caches.append(SharedCache(MooncakeStore(address), SharedLimits(30.0, 1 << 20), Metrics()))
        caches[-1].fingerprint = "f"
    one, other = caches
    assert await one.get(key("a"), "float32", DIM) is None
    one.put(key("a"), item("a"), "float32", DIM)
    one.put(key("b"), item("b"), "float32", DIM)
    while one.queued_bytes:
        await asyncio.sleep(0.01)
    found = await asyncio.gather(*(other.get(key(name), "float32", DIM) for name in "abc"))
    assert [bytes(each.data) if each else None for each in found] == [bytes(item(n).data) for n in "ab"] + [None]
    other.fingerprint = "g"
    assert await other.get(key("a"), "float32", DIM) is None

asyncio.run(main())
print("right", flush=True)
import os; os._exit(0)
"""


@pytest.mark.skipif(MASTER is None, reason="Mooncake is not installed")
def test_mooncakes_store(tmp_path):
    """In a process of its own: the store's threads stay."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, metrics = one.getsockname()[1], two.getsockname()[1]
    with (tmp_path / "master").open("wb") as log:
        command = [MASTER, "--rpc_port", str(port), "--metrics_port", str(metrics)]
        master = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with socket.socket() as probe:
            assert eventually(lambda: probe.connect_ex(("127.0.0.1", port)) == 0, 30)
        command = [sys.executable, "-c", TWO_STORES, f"mooncake://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert "right" in done.stdout, done.stderr[-3000:]
    finally:
        master.kill()
        master.wait(10)


@pytest.mark.parametrize("url", ["mooncake://h", "mooncake://:1", "mooncake://h:x", "mooncake://h:1/x"])
def test_a_wrong_address_of_mooncakes_master_is_refused(url):
    with pytest.raises(ValueError, match="expected mooncake"):
        parse_mooncake(url, "127.0.0.1", "tcp", "")
