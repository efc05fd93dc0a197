"""Media in over HTTP, embeddings out: equal to transformers', at any tp, alone or in any batch."""

import asyncio
import base64
import hashlib
import io
import json

import httpx
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load as load_safetensors

from encode_server.client import EmbeddingReceiver, EncodeClient, EncodeServerError, Item
from encode_server.media import samples as demo_media

TOLERANCE = 1e-4


def distance(embedding, expected: np.ndarray) -> float:
    values = embedding.numpy()
    assert values.shape == expected.shape
    return float(np.abs(values - expected).max())


@pytest.fixture(params=["server", "tp2"])
def any_tp(request):
    return request.getfixturevalue(request.param)


def test_each_modality_equals_transformers(any_tp, reference):
    samples = {"image": demo_media.picture(), "video": demo_media.clip(), "audio": demo_media.sound()}

    async def encode():
        async with EncodeClient(any_tp.base_url) as client:
            return {m: await client.encode([media], m) for m, media in samples.items()}

    for modality, embedding in asyncio.run(encode()).items():
        expected = getattr(reference, modality)(samples[modality])
        assert distance(embedding, expected) <= TOLERANCE, modality
        assert embedding.items[0].content_hash == "sha256:" + hashlib.sha256(samples[modality]).hexdigest()


def test_requests_batched_together_get_their_own_rows(any_tp, reference, picture):
    """Many requests concurrently, of several sizes and one to three items, so that batches mix them."""
    sizes = [(56, 56), (112, 84), (300, 200), (28, 140), (224, 224)]
    requests = [[picture(*sizes[(i + k) % 5], seed=i * 10 + k) for k in range(1 + i % 3)] for i in range(24)]

    async def encode():
        async with EncodeClient(any_tp.base_url) as client:
            return await asyncio.gather(*(client.encode(items, "image") for items in requests))

    for items, embedding in zip(requests, asyncio.run(encode()), strict=True):
        expected = [reference.image(item) for item in items]
        assert [item.tokens for item in embedding.items] == [len(rows) for rows in expected]
        assert distance(embedding, np.concatenate(expected)) <= TOLERANCE


def test_long_and_short_audio_in_one_request(server, reference):
    sounds = []
    for seconds in (0.3, 2.0, 7.5):
        out = io.BytesIO()
        soundfile.write(out, np.sin(np.arange(int(16000 * seconds)) / 9).astype(np.float32) * 0.3, 16000, format="WAV")
        sounds.append(out.getvalue())

    async def encode():
        async with EncodeClient(server.base_url) as client:
            return await client.encode(sounds, "AUDIO")

    assert distance(asyncio.run(encode()), np.concatenate([reference.audio(s) for s in sounds])) <= TOLERANCE


def test_json_answer_is_documented_shape(server, reference, picture):
    png = picture(84, 56)
    body = {"mm_items": [base64.b64encode(png).decode()], "modality": "Image", "req_id": "r-1", "unknown": {"x": 1}}
    answer = httpx.post(server.base_url + "/encode", json=body, timeout=60).json()
    assert answer["req_id"] == "r-1" and answer["modality"] == "image" and answer["dtype"] == "float32"
    values = np.frombuffer(base64.b64decode(answer["embedding"]), "<f4").reshape(answer["shape"])
    assert np.abs(values - reference.image(png)).max() <= TOLERANCE
    (item,) = answer["items"]
    assert item["grid_thw"] == [1, 4, 6] and item["tokens"] == 6 == answer["shape"][0]
    assert item["content_hash"] == "sha256:" + hashlib.sha256(png).hexdigest()


def test_binary_answer_is_a_safetensors_file(server, reference, picture):
    png = picture(56, 56)
    body = {"mm_items": ["data:image/png;base64," + base64.b64encode(png).decode()], "modality": "image"}
    answer = httpx.post(
        server.base_url + "/encode", json=body, headers={"Accept": "application/octet-stream"}, timeout=60
    )
    assert answer.headers["content-type"] == "application/octet-stream"
    tensors = load_safetensors(answer.content)
    assert np.abs(tensors["embedding"] - reference.image(png)).max() <= TOLERANCE
    length = int.from_bytes(answer.content[:8], "little")
    metadata = json.loads(answer.content[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["items"])[0]["tokens"] == 4


def test_multipart_upload_as_curl_sends_it(server, reference, picture):
    first, second = picture(56, 56, 1), picture(112, 56, 2)
    answer = httpx.post(
        server.base_url + "/encode",
        data={"modality": "image", "req_id": "form"},
        files=[("file", ("a.png", first)), ("file", ("b.png", second))],
        timeout=60,
    ).json()
    values = np.frombuffer(base64.b64decode(answer["embedding"]), "<f4").reshape(answer["shape"])
    expected = np.concatenate([reference.image(first), reference.image(second)])
    assert np.abs(values - expected).max() <= TOLERANCE and answer["req_id"] == "form"


def test_item_options_change_what_is_encoded(server, reference, picture):
    png = picture(400, 400)

    async def encode():
        async with EncodeClient(server.base_url) as client:
            return await client.encode([Item(png, max_pixels=100 * 100)], "image")

    embedding = asyncio.run(encode())
    expected = reference.image(png, size={"shortest_edge": 56 * 56, "longest_edge": 100 * 100})
    assert distance(embedding, expected) <= TOLERANCE


def test_embedding_is_pushed_to_the_destination(server, reference, picture):
    pngs = [picture(56, 56, 3), picture(112, 112, 4)]

    async def push():
        async with EncodeClient(server.base_url) as client, EmbeddingReceiver() as receiver:
            where = {"prefill_host": receiver.host, "embedding_port": receiver.port, "req_id": "p", "num_parts": 2}
            waiting = asyncio.create_task(receiver.receive("p", timeout=20))
            # The second part first: the receiver puts them in order.
            for index in (1, 0):
                receipt = await client.push([pngs[index]], "image", part_idx=index, **where)
                assert receipt.shape[0] == len(reference.image(pngs[index]))
            return await waiting

    expected = np.concatenate([reference.image(png) for png in pngs])
    assert distance(asyncio.run(push()), expected) <= TOLERANCE


def test_a_failed_part_is_told_to_the_destination_too(server):
    async def push():
        async with EncodeClient(server.base_url) as client, EmbeddingReceiver() as receiver:
            waiting = asyncio.create_task(receiver.receive("bad", timeout=20))
            with pytest.raises(EncodeServerError) as answered:
                await client.push(
                    [b"not a picture"],
                    "image",
                    prefill_host=receiver.host,
                    embedding_port=receiver.port,
                    req_id="bad",
                )
            with pytest.raises(EncodeServerError) as pushed:
                await waiting
            return answered.value, pushed.value

    answered, pushed = asyncio.run(push())
    assert answered.status == pushed.status == 400 and answered.message == pushed.message


def test_media_is_preprocessed_once_whatever_tp_is(tp2, picture):
    def preprocessed() -> float:
        text = httpx.get(tp2.base_url + "/metrics").text
        lines = [
            line for line in text.splitlines() if line.startswith('encode_preprocessed_items_total{modality="image"}')
        ]
        return float(lines[0].split()[-1]) if lines else 0.0

    before = preprocessed()

    async def encode():
        async with EncodeClient(tp2.base_url) as client:
            await asyncio.gather(*(client.encode([picture(56, 56, 9000 + i)], "image") for i in range(10)))

    asyncio.run(encode())
    assert preprocessed() - before == 10


def test_a_large_form_needs_no_disk(server, picture):
    """Uploads stay in memory, so neither a full temporary directory nor one that is gone fails them."""
    away = server.tmp.with_name("away")
    server.tmp.rename(away)
    try:
        answer = httpx.post(
            server.base_url + "/encode",
            data={"modality": "image", "max_pixels": "12544"},
            files={"file": ("large.png", picture(1200, 1000))},
            timeout=60,
        )
    finally:
        away.rename(server.tmp)
    assert answer.status_code == 200, answer.text[:200]
    assert answer.json()["shape"][0] <= 16
