"""Which encoder is given what, by how much work each says it has."""

from __future__ import annotations

import asyncio

from encode_server.client.affinity import by_affinity
from encode_server.client.encoders import Encoders
from encode_server.client.http import EncodeClient
from encode_server.client.passed_on import pass_on, passed_on
from encode_server.wire.load import Load, load_from, load_headers

URLS = ["http://a:1", "http://b:1", "http://c:1"]


def encoders(choice="content"):
    return Encoders(URLS, EncodeClient, choice, 5.0)


def owned_by(url: str) -> bytes:
    """A key whose owner is this encoder."""
    return next(k for k in map(str.encode, map(str, range(1000))) if by_affinity(k, [(u, u) for u in URLS])[0] == url)


def test_the_headers_say_what_the_load_is():
    for load in (Load(0.0), Load(1.25, 51200.0)):
        assert load_from(load_headers(load)) == load
    assert load_from({}) is None and load_from({"X-Encode-Backlog-S": "soon"}) is None


def test_an_item_goes_to_its_owner_until_another_could_begin_much_earlier():
    pool = encoders()
    a, b, c = pool.all
    key = owned_by("http://a:1")
    assert pool.pick(key) is a
    a.work.say(Load(0.15)), b.work.say(Load(0.1)), c.work.say(Load(0.2))
    assert pool.pick(key) is a, "a little busier is not worth encoding the item again"
    a.work.say(Load(5.0))
    assert pool.pick(key) is b


def test_what_was_sent_since_the_encoder_spoke_counts():
    pool = encoders()
    for encoder in pool.all:
        encoder.work.say(Load(0.0, 1000.0))
    pool.all[0].work.note({"X-Encode-Item-Tokens": "500"})  # half a second each
    key = owned_by("http://a:1")
    given = []
    for _ in range(9):
        encoder = pool.pick(key)
        given.append(encoder.url)
        encoder.work.sent(1)
    assert set(given) == set(URLS), "a burst of one image does not queue at its owner alone"


def test_a_faster_encoder_is_given_more():
    pool = encoders("least_loaded")
    slow, fast, third = pool.all
    third.healthy = False
    slow.work.say(Load(0.0, 1000.0)), fast.work.say(Load(0.0, 4000.0))
    slow.work.note({"X-Encode-Item-Tokens": "400"})
    given = []
    for _ in range(50):
        encoder = pool.pick(b"k")
        given.append(encoder)
        encoder.work.sent(1)
    assert given.count(fast) == 40


def test_an_item_that_went_elsewhere_stays_there():
    """Its embedding is in that encoder's cache now."""
    pool = encoders()
    a, b, c = pool.all
    key = owned_by("http://a:1")
    a.work.say(Load(5.0)), b.work.say(Load(0.0)), c.work.say(Load(0.3))
    assert pool.pick(key) is b
    a.work.say(Load(0.0))
    assert pool.pick(key) is b
    b.healthy = False
    assert pool.pick(key) is a


def test_probes_carry_nothing_of_the_request_that_registered_an_encoder(monkeypatch):
    probed = []

    async def health(client, *, timeout):
        probed.append(dict(passed_on()))

    async def register(pool) -> None:
        pass_on({"X-Request-ID": "r7"})
        pool.add("http://a:1")

    async def scenario() -> None:
        pool = Encoders([], EncodeClient, "content", 5.0)
        watching = asyncio.create_task(pool.watch())
        await asyncio.sleep(0)
        await asyncio.create_task(register(pool))
        async with asyncio.timeout(10):
            while not probed:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        watching.cancel()
        await asyncio.wait([watching])

    monkeypatch.setattr(EncodeClient, "health", health)
    asyncio.run(scenario())
    assert probed == [{}]


def test_members_come_and_go():
    made: list[EncodeClient] = []

    def make(url: str) -> EncodeClient:
        made.append(EncodeClient(url))
        return made[-1]

    async def change() -> None:
        pool = Encoders(URLS, make, "content", 5.0)
        assert pool.add("http://a:1/") is pool.add("http://a:1") and len(made) == len(URLS), "no client for a member"
        gone = pool.all[0]
        with gone.working(1):
            pool.remove("http://a:1/")
            assert [e.url for e in pool.all] == URLS[1:] and pool.pick(owned_by("http://a:1")).url in URLS[1:]
        assert pool.add("http://a:1/").url == "http://a:1" and len(pool.all) == 3
        await pool.aclose()

    asyncio.run(change())
    assert len(made) == 4
    for client in made:
        try:
            asyncio.run(client.health())
        except RuntimeError:  # httpx: the client has been closed
            continue
        raise AssertionError("a client was left open")


def test_a_plan_alone_is_no_work():
    pool = encoders()
    for encoder in pool.all:
        encoder.work.say(Load(0.0, 1000.0))
    pool.all[0].work.note({"X-Encode-Item-Tokens": "500"})
    groups = pool.plan([owned_by("http://a:1")] * 9)
    assert len(groups) == 3, "items of a plan count for its later items"
    assert sorted(i for group in groups for i in group) == list(range(9))
    assert [encoder.work.seconds for encoder in pool.all] == [0, 0, 0]
    pool.all[0].work.sent(1)
    assert pool.all[0].work.seconds == 0.5
