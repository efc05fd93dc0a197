"""`--protocol sglang` against a real server: what SGLang's prefill sends, and what it gets."""

import asyncio
import base64
import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from encode_server.client import EmbeddingReceiver, EncodeClient
from encode_server.media import samples as demo_media
from encode_server.pipeline.request import MediaItem
from encode_server.wire.items import ItemOptions
from tests.delivery import sglang_standin as sglang
from tests.live import LiveServer, eventually
from tests.server.prefill_standin import Bootstrap, PrefillRank

TOLERANCE = 1e-4
SEND_TIMEOUT = 8.0


@pytest.fixture(scope="module")
def live(checkpoint, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("sglang")
    with Bootstrap() as steady, Bootstrap() as late:
        late.__exit__()  # its port is free, and it comes up later
        options = ("--protocol", "sglang", "--send-timeout-s", str(SEND_TIMEOUT), "--undelivered-mb", "1", "--tp", "2")
        options += ("--client-share", "1", "--profile-dir", str(tmp / "traces"))
        options += ("--register-url", f"{steady.url},http://127.0.0.1:{late.port}/")
        with LiveServer(checkpoint, tmp / "run", *options) as server:
            server.traces, server.steady, server.late = tmp / "traces", steady, late.port
            server.listening()
            assert not steady.urls  # not before it is ready
            yield server.healthy()


@pytest.fixture
def rank():
    with PrefillRank() as prefill:
        yield prefill


def png(seed: int = 0, size: int = 56) -> bytes:
    return demo_media.noise(size, size, seed)


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def body(req_id: str, *items, modality: str = "IMAGE", port=None, **fields) -> dict:
    """As SGLang's receiver writes it."""
    return {
        "encoder_idx": 0,
        "encoder_url": "http://127.0.0.1:1",
        "mm_items": list(items),
        "num_parts": 1,
        "part_idx": 0,
        "req_id": req_id,
        "modality": modality,
        "prefill_host": "127.0.0.1",
        "embedding_port": port,
        "time_stats_json": None,
    } | fields


def post(live, path: str, document: dict, timeout: float = 60) -> httpx.Response:
    return httpx.post(live.base_url + path, json=document, timeout=timeout)


def get(live, path: str) -> httpx.Response:
    return httpx.get(live.base_url + path, timeout=60)


def register(live, req_id: str, rank: PrefillRank, count: int = 1) -> httpx.Response:
    document = {"req_id": req_id, "receive_count": count, "receive_url": rank.url, "modality": "IMAGE"}
    return post(live, "/scheduler_receive_url", document)


def until_waiting(live, nbytes: int = 1) -> None:
    """So much of embeddings is ready whose destinations are not known."""
    assert eventually(lambda: live.metric("encode_undelivered_bytes") >= nbytes)


def distance(data, expected: np.ndarray) -> float:
    assert tuple(data.shape) == expected.shape
    return float(np.abs(data.embedding.numpy() - expected).max())


def test_one_server_pushes_both_engines_frames(live, rank, reference):
    """The client asks for native frames, SGLang's prefill for nothing and gets its own."""
    picture = png(70)

    async def native():
        async with EncodeClient(live.base_url) as client, EmbeddingReceiver() as receiver:
            where = {"prefill_host": receiver.host, "embedding_port": receiver.port}
            receipt = await client.push([picture], "image", req_id="es-name", **where)
            return receipt, await receiver.receive("es-name", timeout=20)

    receipt, embedding = asyncio.run(native())
    assert receipt.shape == embedding.shape
    assert np.abs(embedding.numpy() - reference.image(picture)).max() <= TOLERANCE
    assert post(live, "/encode", body("s", data_uri(picture), port=rank.port)).json() is None
    assert distance(rank.receive(), reference.image(picture)) <= TOLERANCE


# To ports that the request names: zmq_to_tokenizer.


def test_to_a_port(live, rank, reference):
    picture = png(1)
    answer = post(live, "/encode", body("a_local_part_1", data_uri(picture), port=rank.port, num_parts=3, part_idx=1))
    assert answer.status_code == 200 and answer.json() is None
    data = rank.receive()
    assert (data.req_id, data.num_parts, data.part_idx) == ("a_local_part_1", 3, 1)
    assert data.modality is sglang.Modality.IMAGE and data.grid_dim.tolist() == [[1, 4, 4]]
    assert distance(data, reference.image(picture)) <= TOLERANCE
    assert rank.nothing_came()


def test_items_with_options_of_all_kinds(live, rank, reference):
    first, second = png(2), png(3, 112)
    items = [
        {"url": data_uri(first), "detail": "high", "max_dynamic_patch": 4, "unknown": {"x": [1]}},
        data_uri(second),
    ]
    assert post(live, "/encode", body("b", *items, port=rank.port)).status_code == 200
    data = rank.receive()
    assert data.grid_dim.tolist() == [[1, 4, 4], [1, 8, 8]]
    assert distance(data, np.concatenate([reference.image(first), reference.image(second)])) <= TOLERANCE


def test_to_a_list_of_ports(live, rank):
    with PrefillRank() as other:
        answer = post(live, "/encode", body("c", data_uri(png(4)), port=[rank.port, other.port]))
        assert answer.status_code == 200
        first, second = rank.receive(), other.receive()
        assert (first.embedding == second.embedding).all()
        assert rank.nothing_came() and other.nothing_came()


def test_video_and_audio_carry_what_the_language_side_needs(live, rank, reference):
    clip, sound = demo_media.clip(), demo_media.sound()
    answer = post(live, "/encode", body("v", data_uri(clip, "video/mp4"), modality="VIDEO", port=rank.port))
    assert answer.status_code == 200
    video = rank.receive()
    assert video.modality is sglang.Modality.VIDEO and video.grid_dim.shape == (1, 3)
    assert video.second_per_grid_ts.shape == (1,) and video.second_per_grid_ts[0] > 0
    assert distance(video, reference.video(clip)) <= TOLERANCE
    answer = post(live, "/encode", body("s", data_uri(sound, "audio/wav"), modality="AUDIO", port=rank.port))
    assert answer.status_code == 200
    audio = rank.receive()
    assert audio.modality is sglang.Modality.AUDIO and audio.grid_dim.ndim == 1
    mel = int(audio.grid_dim[0])
    assert ((mel - 1) // 2 + 1 - 2) // 2 + 1 == audio.shape[0]  # as SGLang counts the tokens of the prompt
    assert distance(audio, reference.audio(sound)) <= TOLERANCE


def test_an_error_is_pushed_and_answered(live, rank):
    answer = post(live, "/encode", body("bad", data_uri(b"no picture"), port=rank.port))
    data = rank.receive()
    assert answer.status_code == data.error_code == 400
    assert answer.json()["message"] == data.error_msg and "mm_items[0]" in data.error_msg
    assert (data.req_id, data.grid_dim) == ("bad", None)


def test_a_dead_port_is_502(live, rank):
    with PrefillRank() as gone:
        port = gone.port
    started = time.monotonic()
    answer = post(live, "/encode", body("dead", data_uri(png(5)), port=[rank.port, port]))
    assert answer.status_code == 502 and answer.json()["code"] == "delivery_failed"
    assert SEND_TIMEOUT - 0.2 < time.monotonic() - started < SEND_TIMEOUT + 10
    assert rank.receive().error_msg is None and rank.nothing_came(), "who has the embedding is told of no error"


def test_destinations_are_judged_like_all_others(live):
    document = {"req_id": "x", "receive_count": 1, "receive_url": "8.8.8.8:5000", "modality": "IMAGE"}
    assert post(live, "/scheduler_receive_url", document).status_code == 403
    for url in ("", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:x", "ipc:///tmp/x:1"):
        assert post(live, "/scheduler_receive_url", document | {"receive_url": url}).status_code in (400, 502), url
    assert post(live, "/scheduler_receive_url", {"req_id": "x"}).status_code == 400


def test_files_are_read_below_media_roots_only(live, rank, tmp_path):
    (tmp_path / "a.png").write_bytes(png(6))
    for item in (str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", {"url": str(tmp_path / "a.png")}):
        answer = post(live, "/encode", body("file", item, port=rank.port))
        assert answer.status_code in (400, 403), answer.text
        assert rank.receive().error_code == answer.status_code


def test_video_fps_is_for_items_that_do_not_choose():
    assert MediaItem("x").with_fps(2).options == ItemOptions(fps=2)
    assert MediaItem("x", ItemOptions(max_pixels=9, max_frames=8)).with_fps(2).options.fps == 2
    for options in (ItemOptions(fps=1), ItemOptions(num_frames=4)):
        assert MediaItem("x", options).with_fps(2).options == options


# To ranks that register: zmq_to_scheduler.


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_registrations_in_every_order(live, rank, reference, when):
    """`during`: the second of two ranks comes while the first has its part already."""
    picture = png(7)
    expected = reference.image(picture)
    req_id = f"order-{when}_local_part_0"
    with PrefillRank() as other, ThreadPoolExecutor(1) as pool:
        if when != "after":
            assert register(live, req_id, rank, 2).status_code == 200
        if when == "before":
            assert register(live, req_id, other, 2).json() is None
        encoding = pool.submit(post, live, "/encode", body(req_id, data_uri(picture)))
        if when == "during":
            assert distance(rank.receive(), expected) <= TOLERANCE
            assert not encoding.done()
            register(live, req_id, other, 2)
        elif when == "after":
            until_waiting(live)
            assert not encoding.done()
            register(live, req_id, rank, 2)
            register(live, req_id, rank, 2)  # the same one again is the same one
            register(live, req_id, other, 2)
        answer = encoding.result()
        assert answer.status_code == 200 and answer.json() is None
        if when != "during":
            assert distance(rank.receive(), expected) <= TOLERANCE
        assert distance(other.receive(), expected) <= TOLERANCE
        assert rank.nothing_came() and other.nothing_came()


def test_nobody_comes(live):
    started = time.monotonic()
    answer = post(live, "/encode", body("lonely", data_uri(png(8))))
    assert answer.status_code == 504 and "no destination came for the embedding" in answer.json()["message"]
    assert SEND_TIMEOUT - 0.2 < time.monotonic() - started < SEND_TIMEOUT + 10
    assert live.metric("encode_undelivered_bytes") == live.metric("encode_registrations") == 0


def test_one_of_two_comes(live, rank):
    register(live, "half", rank, 2)
    answer = post(live, "/encode", body("half", data_uri(png(9))))
    assert answer.status_code == 504 and "1 of 2" in answer.json()["message"]
    assert rank.receive().error_msg is None and rank.nothing_came()


def test_errors_go_to_whoever_registered(live, rank):
    register(live, "broken", rank)
    answer = post(live, "/encode", body("broken", data_uri(b"nothing")))
    assert answer.status_code == 400 and rank.receive().error_code == 400


def test_a_deadline_is_told_to_nobody_who_has_the_embedding(live, rank):
    register(live, "slow", rank, 2)
    answer = post(live, "/encode", body("slow", data_uri(png(10)), timeout_s=SEND_TIMEOUT / 2))
    assert answer.status_code == 504
    assert rank.receive().error_code is None and rank.nothing_came()


def test_options_of_sglangs_items_do_what_they_say(live, rank):
    large = data_uri(png(12, 672))

    def tokens(**options) -> int:
        answer = post(live, "/encode", body("sized", {"url": large, **options}, port=rank.port))
        assert answer.status_code == 200, answer.text
        return rank.receive().shape[0]

    whole = tokens(detail="auto")
    assert tokens(detail="high") == whole and tokens(detail=None) == whole
    assert tokens(max_long_side_pixel=336) < tokens(detail="low") == tokens(max_long_side_pixel=512) < whole
    assert tokens(detail="low", max_long_side_pixel=336) == tokens(max_long_side_pixel=336)
    bounded = tokens(max_pixels=200 * 200)
    assert tokens(preprocess_kwargs={"max_pixels": 200 * 200, "unknown": [1]}) == bounded < whole
    assert tokens(preprocess_kwargs={"max_pixels": 300 * 300}, max_pixels=200 * 200) == bounded


def test_a_trace_that_the_body_names_is_in_the_log(live, rank):
    trace = "0af7651916cd43dd8448eb211c80319c"
    context = {"tracing_enable": True, "root_span_context": {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}}
    for stats in ({"trace_ctx": context}, {"trace_ctx": {"root_span_context": []}}, "text", None):
        answer = post(live, "/encode", body("traced", data_uri(png(13)), port=rank.port, time_stats_json=stats))
        assert answer.status_code == 200 and rank.receive().error_msg is None
    assert eventually(lambda: any(trace in line for line in live.lines))


def test_a_part_in_work_is_not_taken_again(live, rank):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, live, "/encode", body("twice", data_uri(png(11))))
        until_waiting(live)
        again = post(live, "/encode", body("twice", data_uri(png(11))))
        assert again.status_code == 409 and again.json()["code"] == "duplicate"
        register(live, "twice", rank)
        assert first.result().status_code == 200
    assert rank.receive().error_msg is None
    assert rank.nothing_came()  # the refused one said nothing to the rank of the other
    register(live, "twice", rank)
    assert post(live, "/encode", body("twice", data_uri(png(11)))).status_code == 200


def test_200_parts_whose_rank_comes_late_arrive_once_each(live, rank):
    pictures = [data_uri(png(i, 28 + 28 * (i % 3))) for i in range(200)]
    names = [f"many-{i // 4}_local_part_{i % 4}" for i in range(200)]

    async def scenario():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=live.base_url, timeout=60, limits=limits) as client:
            encodes = [
                asyncio.create_task(client.post("/encode", json=body(name, picture, num_parts=4, part_idx=i % 4)))
                for i, (name, picture) in enumerate(zip(names, pictures, strict=True))
            ]
            await asyncio.to_thread(until_waiting, live, 200_000)  # of 480,000
            registrations = [
                {"req_id": name, "receive_count": 1, "receive_url": rank.url, "modality": "IMAGE"} for name in names
            ]
            answers = await asyncio.gather(*(client.post("/scheduler_receive_url", json=r) for r in registrations))
            return answers + await asyncio.gather(*encodes)

    answers = asyncio.run(scenario())
    assert [answer.status_code for answer in answers] == [200] * 400
    received = [rank.receive() for _ in range(200)]
    assert sorted(data.req_id for data in received) == sorted(names)
    assert all(data.embedding.isfinite().all() and data.error_msg is None for data in received)
    assert rank.nothing_came()


def test_without_a_destination_the_embedding_comes_back(live):
    answer = post(live, "/encode", {"mm_items": [data_uri(png(12))], "modality": "image"})
    assert answer.status_code == 200 and answer.json()["shape"][0] == 4


def test_waiting_embeddings_are_bounded_and_none_is_refused(live, rank):
    """A refusal would end the prefill: beyond the bound an embedding waits until another has been taken."""
    large = data_uri(png(13, 1120))  # most of the 1 MiB that may wait
    with ThreadPoolExecutor(4) as pool:
        encodes = [pool.submit(post, live, "/encode", body(f"big-{i}", large)) for i in range(4)]
        assert eventually(lambda: live.metric("encode_undelivered_bytes") > 0, 30)
        for i in range(4):
            assert live.metric("encode_undelivered_bytes") <= 1 << 20
            register(live, f"big-{i}", rank)
        assert [encode.result().status_code for encode in encodes] == [200] * 4
    assert [rank.receive().shape[0] for _ in range(4)] == [1225] * 4


# Profiles.


def test_profiles_are_traces_of_all_ranks_in_the_operators_directory(live, tmp_path):
    assert post(live, "/start_profile", {"output_dir": str(tmp_path)}).status_code == 403
    assert get(live, "/stop_profile").status_code == 400
    assert get(live, "/start_profile").status_code == 200
    assert post(live, "/start_profile", {}).status_code == 400
    post(live, "/encode", {"mm_items": [data_uri(png(14))], "modality": "image"})
    files = post(live, "/stop_profile", {}, timeout=60).json()["files"]
    assert len(files) == 2 and not list(tmp_path.iterdir())
    for name in files:
        events = json.loads(gzip.decompress((live.traces / name).read_bytes()))["traceEvents"]
        assert any("linear" in str(event.get("name")) or "mm" in str(event.get("name")) for event in events)
    assert post(live, "/start_profile", {"num_steps": 1}).status_code == 200
    post(live, "/encode", {"mm_items": [data_uri(png(15))], "modality": "image"})
    assert eventually(lambda: len(list(live.traces.glob("*.gz"))) == 4)
    assert "no profile is running" in get(live, "/stop_profile").json()["message"]
    assert eventually(lambda: get(live, "/health").status_code == 200)


def test_no_directory_no_profiles(server):
    answer = post(server, "/start_profile", {})
    assert answer.status_code == 403 and "--profile-dir" in answer.json()["message"]


def test_bootstraps_are_told_before_it_leaves(live):
    """Last of all: it ends the server."""
    assert live.steady.urls == [live.base_url]
    with Bootstrap(live.late) as late:
        assert eventually(lambda: late.urls == [live.base_url], 20)
        assert live.terminate() == 0
        assert not late.urls and not live.steady.urls
    assert [verb for _, verb, _ in live.steady.seen] == ["register", "unregister"]
