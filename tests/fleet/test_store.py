"""`"delivery": "ec_store"` through a real server: what vLLM's connector will find, and what is refused."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import torch
from safetensors.torch import load_file

from encode_server.client import EncodeClient, EncodeServerError, Item
from tests.models.reference import Reference
from tests.models.samples import clip, pixels, png


def post(url: str, items: list[object], **fields: object) -> httpx.Response:
    body = {"modality": "image", "delivery": "ec_store", "mm_items": items} | fields
    return httpx.post(url + "/encode", json=body, timeout=30)


def test_each_item_is_stored_under_its_uuid_bit_for_bit(fleet):
    pictures = [png(64, 64, 1), png(96, 128, 2)]

    async def both():
        async with EncodeClient(fleet.a.base_url) as client:
            receipt = await client.store([Item(p, uuid=f"bits-{i}") for i, p in enumerate(pictures)], "image")
            return receipt, [await client.encode([p], "image") for p in pictures]

    receipt, embeddings = asyncio.run(both())
    assert receipt.status == "delivered" and [item.tokens for item in receipt.items] == [4, 12]
    for i, embedding in enumerate(embeddings):
        (name, tensor), *more = load_file(fleet.entry(f"bits-{i}")).items()
        assert name == "ec_cache" and not more
        assert tensor.shape == embedding.shape and torch.equal(tensor, embedding.torch())


def test_deepstack_levels_follow_the_embedding_on_the_last_dimension(fleet):
    """[main, level 0, level 1, …], as vLLM's Qwen3-VL cuts it up."""

    async def store():
        async with EncodeClient(fleet.b.base_url) as client:
            await client.store([Item(png(96, 64, 3), uuid="deep")], "image")
            await client.store([Item(clip(4, 64, 64), uuid="deep-video", fps=10)], "video")

    asyncio.run(store())
    reference = Reference(fleet.checkpoint, "qwen3_vl")
    expected = reference.image(pixels(96, 64, 3))
    tensor = load_file(fleet.entry("deep"))["ec_cache"]
    assert tensor.shape == (6, 3 * 48) == expected.shape, "two levels beside the embedding"
    assert torch.allclose(tensor, expected, atol=1e-4)
    assert load_file(fleet.entry("deep-video"))["ec_cache"].shape == (2 * 4, 3 * 48)


def test_a_form_names_its_files_too(fleet):
    url = fleet.a.base_url + "/encode"
    files = [("file", ("a.png", png(64, 64, 4))), ("file", ("b.png", png(64, 96, 5)))]
    fields = {"modality": "image", "delivery": "ec_store"}
    assert httpx.post(url, data=fields | {"uuid": ["form-a", "form-b"]}, files=files).status_code == 200
    assert load_file(fleet.entry("form-b"))["ec_cache"].shape[0] == 6
    assert httpx.post(url, data=fields | {"uuid": ["form-a"]}, files=files).status_code == 400


@pytest.mark.parametrize("uuid", ["", "..", "../../etc", "a/b", "/abs", ".x", "x" * 201, "a b", "\x00"])
def test_an_unsafe_uuid_is_refused_before_anything_is_encoded(fleet, uuid):
    before = {path.name for path in fleet.store.iterdir()}
    answer = post(fleet.a.base_url, ["data:,", {"url": "data:,", "uuid": uuid}][1:])
    assert answer.status_code == 400 and "mm_items[0]: uuid" in answer.json()["message"]
    assert {path.name for path in fleet.store.iterdir()} == before


def test_what_does_not_go_with_a_store_is_refused(fleet, tmp_path):
    url = fleet.a.base_url
    missing = post(url, [{"url": "data:,", "uuid": "u"}, "data:,"])
    assert missing.status_code == 400 and "mm_items[1]: uuid is missing" in missing.json()["message"]
    assert post(url, [{"url": "x", "uuid": "u"}], prefill_host="127.0.0.1", embedding_port=5).status_code == 400
    assert post(url, [{"url": "x", "uuid": "u"}], delivery="elsewhere").status_code == 400


def test_a_bad_item_leaves_no_entry(fleet):
    answer = post(fleet.a.base_url, [{"url": "data:image/png;base64,AAAA", "uuid": "bad-item"}])
    assert answer.status_code == 400 and answer.json()["code"] == "bad_media"
    assert not fleet.entry("bad-item").exists()


def test_two_servers_may_write_the_same_entry_at_once(fleet):
    picture = png(128, 128, 6)

    async def all_at_once():
        async with EncodeClient(fleet.urls[0]) as a, EncodeClient(fleet.urls[1]) as b:
            calls = [client.store([Item(picture, uuid="shared")], "image") for client in (a, b) * 20]
            return await asyncio.gather(*calls, return_exceptions=True)

    failures = [r for r in asyncio.run(all_at_once()) if isinstance(r, BaseException)]
    assert not [f for f in failures if not (isinstance(f, EncodeServerError) and f.status == 429)], failures
    assert load_file(fleet.entry("shared"))["ec_cache"].shape == (16, 3 * 48)
    assert [path.name for path in fleet.entry("shared").parent.iterdir()] == [fleet.entry("shared").name]


def test_what_is_in_the_store_is_not_encoded_again(fleet):
    """Neither by an encoder whose cache does not know the item."""

    async def store(url: str, media: bytes, **options: object):
        async with EncodeClient(url) as client:
            return (await client.store([Item(media, uuid="kept", **options)], "image")).items[0]

    picture = png(96, 64, 40)
    first = asyncio.run(store(fleet.a.base_url, picture))
    before = fleet.entry("kept").read_bytes()
    second = asyncio.run(store(fleet.b.base_url, picture))
    assert not first.cached and second.cached and (second.tokens, second.grid_thw) == (first.tokens, first.grid_thw)
    assert fleet.entry("kept").read_bytes() == before
    sized = asyncio.run(store(fleet.b.base_url, picture, max_pixels=64 * 64))
    assert sized.tokens < first.tokens and not sized.cached, "of other options nothing is there"
