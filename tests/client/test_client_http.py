"""`EncodeClient` against a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_standin import VALUES, StandIn
from safetensors.torch import save

from encode_server.client import (
    EncodeClient,
    EncoderPool,
    EncodeServerError,
    Item,
    ItemInfo,
    Media,
    Modality,
    Pool,
    ProtocolError,
    ServerUnreachable,
)
from encode_server.client.answers import from_safetensors

pytestmark = pytest.mark.anyio

PNG = "data:image/png;base64,AAAA"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", ["encode", "encode_json"])
async def test_embedding_comes_back_in_its_own_dtype(server: StandIn, dtype: str, method: str) -> None:
    async with EncodeClient(server.url) as client:
        embedding = await getattr(client, method)([PNG], "image", req_id=dtype)
    assert (embedding.req_id, embedding.model, embedding.modality) == (dtype, "demo", Modality.IMAGE)
    assert (embedding.dtype, embedding.shape) == (dtype, (3, 4))
    assert embedding.items == (ItemInfo(1, [1, 2, 2], "sha256:aa"), ItemInfo(2, None, "sha256:bb"))
    assert embedding.numpy().dtype == ("float32" if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(embedding.numpy(), VALUES.astype(embedding.numpy().dtype))
    tensor = embedding.torch()
    assert tensor.dtype == getattr(torch, dtype)
    assert torch.equal(tensor.float(), torch.from_numpy(VALUES))


def test_safetensors_written_by_torch_are_read_bit_for_bit() -> None:
    tensor = torch.randn(5, 7, dtype=torch.bfloat16)
    metadata = {"req_id": "r", "model": "m", "modality": "audio", "dtype": "bfloat16", "shape": "[5, 7]", "items": "[]"}
    embedding = from_safetensors(bytearray(save({"embedding": tensor}, metadata)))
    assert torch.equal(embedding.torch().view(torch.int16), tensor.view(torch.int16))
    np.testing.assert_array_equal(embedding.numpy(), tensor.float().numpy())


async def test_media_of_every_kind_reaches_the_server(server: StandIn, tmp_path: Path) -> None:
    large = os.urandom(1_000_003)
    file = tmp_path / "picture.png"
    file.write_bytes(large[:-1])
    async with EncodeClient(server.url, api_key="secret") as client:
        media: list[Media] = [
            "http://host/a.png",
            b"small",
            large,
            file,
            Item(b"x", max_pixels=99, content_hash="sha256:00"),
        ]
        await client.encode(media, Modality.VIDEO, num_parts=3, part_idx=2, timeout_s=7.5)
    [sent] = server.seen
    items = sent.pop("mm_items")
    assert sent == {"modality": "video", "num_parts": 3, "part_idx": 2, "timeout_s": 7.5}
    assert isinstance(items, list)
    assert items[0] == "http://host/a.png"
    assert [base64.b64decode(item, validate=True) for item in items[1:4]] == [b"small", large, large[:-1]]
    assert items[4] == {"url": base64.b64encode(b"x").decode(), "max_pixels": 99, "content_hash": "sha256:00"}
    assert server.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("pool", ["mean", Pool.MODEL])
async def test_one_vector_for_an_item_is_asked_for_by_name(server: StandIn, pool: Pool | str) -> None:
    async with EncodeClient(server.url) as client:
        await client.encode([PNG], "image", pool=pool)
        await client.encode_json([PNG], "image", pool=pool)
        await client.push([PNG], "image", prefill_host="10.0.0.7", embedding_port=5555, req_id="r", pool=pool)
        await client.encode([PNG], "image")
    assert [body.get("pool") for body in server.seen] == [str(pool)] * 3 + [None]
    assert "pool" not in server.seen[-1]


async def test_a_balancer_can_tell_the_same_media_from_other_media(server: StandIn) -> None:
    async with EncodeClient(server.url) as client:
        for media in (b"one", b"other", b"one", Item(b"one", content_hash="sha256:" + "0" * 5000)):
            await client.encode([media, b"more"], "image")
    first, other, again, named = (headers["x-encode-content-hash"] for headers in server.headers)
    assert first == again and len({first, other, named}) == 3 and len(named) <= 128


async def test_media_that_is_none_is_refused_here(server: StandIn, tmp_path: Path) -> None:
    async with EncodeClient(server.url) as client:
        with pytest.raises(ValueError, match="no media"):
            await client.encode([], "image")
        with pytest.raises(TypeError, match="a list"):
            await client.encode(PNG, "image")  # A list of letters otherwise.
        with pytest.raises(TypeError, match="not int"):
            await client.encode([3], "image")  # type: ignore[list-item]
        with pytest.raises(FileNotFoundError):
            await client.encode([tmp_path / "none.png"], "image")
    assert server.seen == []


async def test_push_names_the_destination_and_reports_the_delivery(server: StandIn) -> None:
    async with EncodeClient(server.url) as client:
        delivered = await client.push([PNG], "image", prefill_host="10.0.0.7", embedding_port=5555, req_id="bfloat16")
    assert (server.seen[0]["prefill_host"], server.seen[0]["embedding_port"]) == ("10.0.0.7", 5555)
    assert (delivered.req_id, delivered.dtype, delivered.shape) == ("bfloat16", "bfloat16", (3, 4))
    assert [item.tokens for item in delivered.items] == [1, 2]


async def test_items_that_are_handed_over_go_by_the_transport_asked_for(server: StandIn) -> None:
    async with EncoderPool([server.url]) as pool:
        await pool.hand_over([Item(b"x", uuid="es-1")], "image", prefill_host="h", embedding_port=9, transport="nixl")
    assert server.seen[-1]["transport"] == "nixl" and server.seen[-1]["req_id"] == "es-1"


async def test_errors_of_the_server_keep_what_it_said(server: StandIn) -> None:
    async with EncodeClient(server.url) as client:
        with pytest.raises(EncodeServerError) as caught:
            await client.encode([PNG], "image", req_id="busy")
        error = caught.value
        assert (error.status, error.code, error.message, error.req_id) == (429, "too_busy", "full", "busy")
        assert error.retry_after == 1.5
        with pytest.raises(EncodeServerError, match="502 unknown: <h1>Bad Gateway"):
            await client.encode([PNG], "image", req_id="proxy")


@pytest.mark.parametrize("req_id", ["garbage", "short"])
async def test_an_answer_that_is_no_embedding_is_said_to_be_none(server: StandIn, req_id: str) -> None:
    async with EncodeClient(server.url) as client:
        with pytest.raises(ProtocolError):
            await client.encode([PNG], "image", req_id=req_id)
        if req_id == "garbage":
            with pytest.raises(ProtocolError):
                await client.encode_json([PNG], "image", req_id=req_id)


def test_no_truncated_or_corrupted_body_raises_anything_but_a_protocol_error() -> None:
    metadata = {"req_id": "r", "model": "m", "modality": "image", "items": "[]"}
    body = save({"embedding": torch.zeros(2, 2)}, metadata)
    rng = np.random.default_rng(0)
    for cut in range(len(body)):
        with pytest.raises(ProtocolError):
            from_safetensors(bytearray(body[:cut]))
    for _ in range(2000):
        broken = bytearray(body)
        broken[rng.integers(len(body))] = rng.integers(256)
        try:
            from_safetensors(broken)
        except ProtocolError:
            pass


async def test_health_is_an_answer_also_when_it_is_bad(server: StandIn) -> None:
    async with EncodeClient(server.url) as client:
        health = await client.health()
        assert health.ok and health.document == {"status": "ok"}
        server.healthy = False
        health = await client.health()
        assert (health.ok, health.status, health.document["reason"]) == (False, 503, "loading")


async def test_a_late_answer_is_a_timeout_and_the_server_is_told(server: StandIn) -> None:
    async with EncodeClient(server.url, timeout=0.2) as client:
        while not server.seen:  # a machine that is busy may not get that far in time
            with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
                await client.encode([PNG], "image", req_id="slow")
        assert await asyncio.to_thread(server.gone.wait, 5)


async def test_cancelling_closes_the_connection_and_leaves_the_client_usable(server: StandIn) -> None:
    async with EncodeClient(server.url) as client:
        call = asyncio.create_task(client.encode([PNG], "image", req_id="slow"))
        while not server.seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(server.gone.wait, 5)
        assert (await client.encode([PNG], "image")).req_id == "made-up"


async def test_nobody_listening_is_unreachable_and_quick() -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        async with asyncio.timeout(30), EncodeClient(f"http://127.0.0.1:{port}") as client:
            with pytest.raises(ServerUnreachable, match=str(port)):
                await client.encode([PNG], "image")
            with pytest.raises(ServerUnreachable):
                await client.health()


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, json, encode_server.client; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    heavy = {"torch", "transformers", "fastapi", "uvicorn", "pydantic", "PIL", "av", "httpx", "numpy"}
    assert loaded.isdisjoint(heavy), loaded & heavy


def test_a_client_at_work_needs_no_torch(server: StandIn) -> None:
    code = (
        "import asyncio, sys\n"
        "from encode_server.client import EncodeClient\n"
        "async def main():\n"
        "    async with EncodeClient(sys.argv[1]) as client:\n"
        "        embedding = await client.encode(['AAAA'], 'image', req_id='bfloat16')\n"
        "        print(embedding.numpy().sum(), 'torch' in sys.modules)\n"
        "asyncio.run(main())\n"
    )
    out = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, check=True, text=True).stdout
    assert out.split() == [str(VALUES.sum()), "False"]
