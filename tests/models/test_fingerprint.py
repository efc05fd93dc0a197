"""Servers share embeddings only where the encoder is the same, wherever its files lie."""

from __future__ import annotations

import json
import shutil

import pytest

from encode_server.errors import StartupError
from encode_server.models import fingerprint as module
from encode_server.models.demo import write_demo


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fingerprint") / "demo"
    write_demo(directory)
    return directory


@pytest.fixture(autouse=True)
def at_this_priority(monkeypatch):
    monkeypatch.setattr(module, "NICE", 0)


def fingerprint(directory) -> str:
    return module.fingerprint((str(directory), None))


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "elsewhere")


def test_a_copy_is_the_same(checkpoint, copy):
    assert fingerprint(copy) == fingerprint(checkpoint)


def test_one_other_weight_of_the_encoder_is_another(checkpoint, copy):
    (shard,) = copy.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = next(name for name in header if "visual" in name or "vision" in name)
    data[8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]] ^= 1
    shard.write_bytes(data)
    assert fingerprint(copy) != fingerprint(checkpoint)


def test_another_processor_is_another(checkpoint, copy):
    config = copy / "processor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_pixels": 12345}))
    assert fingerprint(copy) != fingerprint(checkpoint)


def test_another_library_is_another(checkpoint, monkeypatch):
    before = fingerprint(checkpoint)
    monkeypatch.setattr(module.metadata, "version", lambda package: "0")
    assert fingerprint(checkpoint) != before


def test_a_checkpoint_that_cannot_be_read(copy):
    (shard,) = copy.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StartupError):
        fingerprint(copy)
