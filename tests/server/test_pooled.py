"""One vector for an item, by `POST /encode` and by `POST /v1/embeddings`, and the names of the model."""

from __future__ import annotations

import asyncio
import base64

import httpx
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load as load_safetensors

from encode_server.client import EmbeddingReceiver, EncodeClient, EncoderPool, EncodeServerError
from tests.checkpoints import Checkpoints
from tests.live import LiveServer
from tests.models import samples
from tests.models.reference import image_inputs

NAMES = ("clip-small", "vision")


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("clip")).path("clip")


@pytest.fixture(scope="module")
def clip(clip_path, tmp_path_factory):
    with LiveServer(clip_path, tmp_path_factory.mktemp("server"), "--served-model-name", ",".join(NAMES)) as live:
        yield live.healthy()


@pytest.fixture(scope="module")
def expected(clip_path):
    return _expected(clip_path, (0, 1))


def _expected(clip_path, seeds):
    """What transformers' CLIP makes of two images: its vectors, and its last hidden states."""
    model = transformers.CLIPModel.from_pretrained(clip_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        pixels = [image_inputs(clip_path, samples.pixels(60, 90, seed))["pixel_values"] for seed in seeds]
        outputs = [model.get_image_features(one) for one in pixels]
    rows = [output.last_hidden_state[0].numpy() for output in outputs]
    return np.concatenate([output.pooler_output.numpy() for output in outputs]), rows


def _uris(seeds=(0, 1)) -> list[str]:
    pngs = [samples.png(60, 90, seed=seed) for seed in seeds]
    return ["data:image/png;base64," + base64.b64encode(png).decode() for png in pngs]


def _close(values: np.ndarray, want: np.ndarray) -> bool:
    return values.shape == want.shape and bool(np.allclose(values, want, atol=1e-4))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("pushed", [False, True])
def test_the_client_asks_for_vectors_from_several_encoders(clip, clip_path, pushed):
    seeds = (2, 3)  # images of its own: other tests look at what is cached
    vectors, rows = _expected(clip_path, seeds)
    want = {"model": vectors, "mean": np.stack([r.mean(axis=0) for r in rows])}

    async def ask(pool):
        async with (
            EmbeddingReceiver() as receiver,
            EncoderPool([clip.base_url], receiver=receiver if pushed else None) as encoders,
        ):
            await encoders.warm(_uris(seeds), "image", pool=pool)
            return await encoders.encode(_uris(seeds), "image", pool=pool)

    for pool, values in want.items():
        embedding = asyncio.run(ask(pool))
        assert _close(embedding.numpy(), values)
        assert [(item.tokens, item.cached) for item in embedding.items] == [(1, True)] * 2


def test_the_client_is_told_of_a_vector_that_the_model_lacks(clip):
    async def ask():
        async with EncodeClient(clip.base_url) as client:
            await client.encode(_uris(), "image", pool="median")

    with pytest.raises(EncodeServerError) as caught:
        asyncio.run(ask())
    assert caught.value.status == 400


@pytest.mark.parametrize("pool", ["model", "cls", "mean"])
def test_every_kind_of_answer_holds_the_vectors(clip, expected, pool):
    vectors, rows = expected
    want = {"model": vectors, "cls": np.stack([r[0] for r in rows]), "mean": np.stack([r.mean(axis=0) for r in rows])}
    body = {"mm_items": _uris(), "modality": "image", "pool": pool}
    for cached in (False, True):
        answer = httpx.post(clip.base_url + "/encode", json=body, timeout=60).json()
        values = np.frombuffer(base64.b64decode(answer["embedding"]), "<f4").reshape(answer["shape"])
        assert _close(values, want[pool])
        assert [(item["tokens"], item["cached"]) for item in answer["items"]] == [(1, cached)] * 2
    binary = httpx.post(
        clip.base_url + "/encode", json=body, headers={"Accept": "application/octet-stream"}, timeout=60
    )
    assert _close(load_safetensors(binary.content)["embedding"], want[pool])

    async def push():
        async with EmbeddingReceiver() as receiver, httpx.AsyncClient(timeout=60) as client:
            part = body | {"req_id": f"r-{pool}", "prefill_host": receiver.host, "embedding_port": receiver.port}
            waiting = asyncio.create_task(receiver.receive(f"r-{pool}", timeout=60))
            answer = await client.post(clip.base_url + "/encode", json=part)
            assert answer.status_code == 200, answer.text
            return await waiting

    assert _close(asyncio.run(push()).numpy(), want[pool])


def test_rows_and_vectors_of_the_same_image_are_kept_apart(clip, expected):
    _, rows = expected
    body = {"mm_items": _uris()[:1], "modality": "image"}
    for _ in range(2):
        answer = httpx.post(clip.base_url + "/encode", json=body, timeout=60).json()
        assert answer["shape"] == list(rows[0].shape)


def test_a_pool_that_the_checkpoint_lacks_names_those_it_has(server):
    body = {"mm_items": _uris()[:1], "modality": "image", "pool": "model"}
    answer = httpx.post(server.base_url + "/encode", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["message"] == "pool is 'model', which this model lacks for image; it has: mean"


def test_an_engine_gets_no_vector(server):
    body = {"mm_items": _uris()[:1], "modality": "image", "pool": "mean", "delivery": "ec_store"}
    answer = httpx.post(server.base_url + "/encode", json=body, timeout=60)
    assert answer.status_code == 400 and "an engine takes an item's rows" in answer.json()["message"]


@pytest.mark.parametrize("form", ["input", "messages", "batch"])
def test_embeddings_as_infinity_and_vllm_shape_them(clip, expected, form):
    vectors, rows = expected
    uris = _uris()

    def said(uri):
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]

    bodies = {
        "input": {"input": uris, "modality": "image", "model": "vision"},
        "messages": {"messages": said(uris[0])},
        "batch": {"messages": [said(uri) for uri in uris], "encoding_format": "base64"},
    }
    answer = httpx.post(clip.base_url + "/v1/embeddings", json=bodies[form], timeout=60).json()
    values = [item["embedding"] for item in answer["data"]]
    if form == "batch":
        values = [np.frombuffer(base64.b64decode(value), "<f4") for value in values]
    want = vectors[:1] if form == "messages" else vectors
    assert _close(np.array(values, np.float32), _unit(want))
    assert answer["object"] == "list" and answer["model"] == "clip-small"
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", i) for i in range(len(want))]
    tokens = sum(len(r) for r in rows[: len(want)])
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_vectors_of_their_own_length_and_of_another_pool(clip, expected):
    vectors, rows = expected
    body = {"input": _uris()[0], "normalize": False}
    answer = httpx.post(clip.base_url + "/v1/embeddings", json=body, timeout=60).json()
    assert _close(np.array([answer["data"][0]["embedding"]], np.float32), vectors[:1])
    answer = httpx.post(clip.base_url + "/v1/embeddings", json=body | {"pool": "mean"}, timeout=60).json()
    assert _close(np.array([answer["data"][0]["embedding"]], np.float32), rows[0].mean(axis=0)[None])


def test_audio_has_the_mean_of_its_rows(server, reference):
    wav = samples.wav(0.9)
    data = base64.b64encode(wav).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    bodies = ({"input": [data], "modality": "audio"}, {"messages": [{"role": "user", "content": [part]}]})
    for body in bodies:
        answer = httpx.post(server.base_url + "/v1/embeddings", json=body | {"normalize": False}, timeout=60).json()
        values = np.array([answer["data"][0]["embedding"]], np.float32)
        assert np.allclose(values, reference.audio(wav).mean(axis=0)[None], atol=1e-3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either input or messages"),
        ({"input": "data:text/plain,x", "modality": "text"}, "expected image, video or audio"),
        ({"input": ["AAAA"]}, "modality is missing"),
        ({"messages": [{"role": "user", "content": "words"}]}, "encodes no text"),
        ({"messages": [{"role": "user", "content": []}]}, "one image, video or audio"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": 1}]}]}, "got 'file'"),
        ({"input": ["data:image/png;base64,AAAA", "data:audio/wav;base64,AAAA"]}, "one modality, got audio, image"),
        ({"input": "AAAA", "modality": "image", "dimensions": 8}, "dimensions"),
    ],
)
def test_what_cannot_be_embedded_is_said(server, body, message):
    answer = httpx.post(server.base_url + "/v1/embeddings", json=body, timeout=60)
    assert answer.status_code == 400 and message in answer.json()["message"], answer.text


def test_served_names_are_shown_and_checked(clip, clip_path):
    listed = httpx.get(clip.base_url + "/v1/models", timeout=30).json()
    assert [model["id"] for model in listed["data"]] == list(NAMES)
    assert listed["data"][0]["root"] == str(clip_path)
    assert listed["data"][0]["pools"] == {"image": ["mean", "cls", "model"]}
    info = httpx.get(clip.base_url + "/server_info", timeout=30).json()
    assert info["model"] == NAMES[0] and info["served_model_names"] == list(NAMES)
    body = {"mm_items": _uris()[:1], "modality": "image"}
    for name, status in ((NAMES[0], 200), (NAMES[1], 200), (str(clip_path), 404), ("other", 404)):
        answer = httpx.post(clip.base_url + "/encode", json=body | {"model": name}, timeout=60)
        assert answer.status_code == status, answer.text
    assert answer.json()["code"] == "unknown_model" and "clip-small, vision" in answer.json()["message"]
    assert httpx.post(clip.base_url + "/encode", json=body, timeout=60).json()["model"] == NAMES[0]
