"""What `StoreDelivery` writes is what safetensors reads, in every dtype."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from encode_server.delivery.base import Part
from encode_server.delivery.folder import ENTRY, EntryFolder
from encode_server.delivery.store import EmbeddingStore, StoreDelivery
from encode_server.errors import Duplicate
from encode_server.wire.embedding import Encoded, EncodedItem, Wanted
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_comes_back_bit_equal(tmp_path, dtype):
    values = [torch.randn(rows, 6).to(getattr(torch, dtype)) for rows in (3, 1, 5)]
    items = [
        EncodedItem(ItemInfo(len(v), None, f"sha256:{i}"), {}, memoryview(v.view(torch.uint8).numpy().tobytes()))
        for i, v in enumerate(values)
    ]
    encoded = Encoded(Modality.AUDIO, "tiny", dtype, 6, items)
    with ThreadPoolExecutor(1) as pool:
        store = EmbeddingStore(EntryFolder(str(tmp_path), max_bytes=1 << 20, max_age_s=600), 600, pool)
        delivery = store.delivery(["a", "b", "c"])
        asyncio.run(delivery.deliver(Part("r", 0, 1, Modality.AUDIO, "tiny"), encoded))
    for i, (name, expected) in enumerate(zip("abc", values, strict=True)):
        with safe_open(tmp_path / name / ENTRY, "pt") as file:
            assert list(file.keys()) == ["ec_cache"]
            tensor = file.get_tensor("ec_cache")
            assert file.metadata()["content_hash"] == f"sha256:{i}"
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_a_name_stays_with_its_media(tmp_path):
    def encoded(digest: str, model: str = "tiny") -> Encoded:
        item = EncodedItem(ItemInfo(1, None, f"sha256:{digest}"), {}, memoryview(bytes(8)))
        return Encoded(Modality.IMAGE, model, "float32", 2, [item])

    part = Part("r", 0, 1, Modality.IMAGE, "tiny")
    with ThreadPoolExecutor(1) as pool:
        store = EmbeddingStore(EntryFolder(str(tmp_path), max_bytes=1 << 20, max_age_s=600), 600, pool)
        asyncio.run(store.delivery(["a"]).deliver(part, encoded("1")))
        asyncio.run(store.delivery(["a"]).deliver(part, encoded("1")))
        with pytest.raises(Duplicate, match="other media"):
            asyncio.run(store.delivery(["a"]).deliver(part, encoded("2")))
        asyncio.run(store.delivery(["a"]).deliver(part, encoded("2", "another model")))


def test_what_was_encoded_in_another_way_is_not_recalled(tmp_path):
    options, digest, part = ItemOptions(max_pixels=100), "sha256:1", Part("r", 0, 1, Modality.IMAGE, "tiny")
    item = EncodedItem(ItemInfo(1, None, digest), {}, memoryview(b"8 bytes!"), options)
    wanted = Wanted("a", options, Modality.IMAGE, digest, "tiny", "float32", 2)
    with ThreadPoolExecutor(1) as pool:
        folder = EntryFolder(str(tmp_path), max_bytes=1 << 20, max_age_s=600)
        store, other = (EmbeddingStore(folder, 600, pool, setting).delivery(["a"]) for setting in ("drop", "white"))
        asyncio.run(store.deliver(part, Encoded(Modality.IMAGE, "tiny", "float32", 2, [item])))

        def recalled(delivery: StoreDelivery, wanted: Wanted) -> bytes | None:
            found = asyncio.run(delivery.recall(wanted, lambda nbytes: None))
            return None if found is None else bytes(found.data)

        assert recalled(store, wanted) == b"8 bytes!"
        assert recalled(other, wanted) is None
        assert recalled(store, replace(wanted, options=ItemOptions(max_pixels=100, max_side=9))) is None
        assert recalled(store, replace(wanted, digest="sha256:2")) is None
