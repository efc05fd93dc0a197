"""What loading reads from the disk and takes of memory: the encoder, and nothing of the language model."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers

from encode_server.models.checkpoint import stored_tensors
from encode_server.models.encoder import load_encoder
from encode_server.models.families import family_of
from encode_server.models.generic import discover
from encode_server.models.generic.check import Refused, check
from encode_server.models.generic.classes import ModelClass, class_of
from encode_server.models.generic.keys import encoder_keys
from encode_server.models.generic.reached import leave_out_unreached
from encode_server.models.generic.skeleton import skeleton
from encode_server.models.inspect import inspect
from encode_server.models.registry import ARCHITECTURES
from encode_server.models.resolve import open_directory
from encode_server.models.table import supported
from encode_server.wire.modality import Modality
from tests.checkpoints import BUILDERS as OWN
from tests.checkpoints import Checkpoints
from tests.models.families.builders import BUILDERS, write
from tests.models.survey import shrunk

FACTOR = 1.15
BASE = 64 << 20
"""Bytes that loading may take beside the encoder: code that is imported on the way, and one tensor being converted."""

NO_LANGUAGE_MODEL = {"edgetam_video", "neomme", "sam3_tracker_video"}
"""Types that have an encoder and no language model of their own beside it."""

QUICK = {"llava", "gemma3", "blip-2", "t5gemma2", "florence2", "kosmos-2", "granite_speech", "qwen3_omni_moe"}


def _classes(model_type: str) -> Iterator[tuple[Any, Any]]:
    """The class of a model type with its default configuration, shrunk, and as it is: not every type takes both."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls, config = class_of(model_type), CONFIG_MAPPING[model_type]()
    if cls is None:
        cls, config = class_of(f"{model_type}_thinker"), config.thinker_config
    with suppress(Exception):
        yield cls, type(config).from_dict(shrunk(config.to_dict()))
    yield cls, config


def _language(model: Any) -> set[str]:
    """Names of all tensors of the language model, its head and its word table, in the whole model."""
    parts = [model.get_decoder(), model.get_output_embeddings()]
    with suppress(NotImplementedError):  # models that compare images with text have a table in each half
        parts.append(model.get_input_embeddings())
    if model.config.get_text_config().is_encoder_decoder and hasattr(model.get_encoder(), "text_model"):
        parts.append(model.get_encoder().text_model)
    theirs = {id(tensor) for part in parts if part is not None for tensor in part.parameters()}
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in theirs}


def _nothing_of_the_language_model(model_type: str) -> str:
    """Empty, or why no model can be built of the type's default configuration."""
    why, whole = "", None
    try:
        for cls, config in _classes(model_type):
            try:
                with torch.device("meta"):
                    whole = cls(config)
                break
            except Exception as error:  # packages that are missing, configurations that are not whole
                why = f"{type(error).__name__}: {error}"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if whole is None:
        return why
    names = set(whole.state_dict())
    chosen = set(encoder_keys(skeleton(ModelClass(cls, config)), names))
    language = _language(whole)
    assert language and not chosen & language, (model_type, sorted(chosen & language)[:3])
    rest = names - language
    assert chosen <= rest, (model_type, sorted(chosen - rest)[:3])
    return ""


@pytest.mark.parametrize("model_type", sorted(QUICK))
def test_no_tensor_of_the_language_model_is_chosen(model_type: str) -> None:
    assert _nothing_of_the_language_model(model_type) == ""


@pytest.mark.slow
def test_no_class_chooses_a_tensor_of_its_language_model() -> None:
    """Every type of docs/models.md that goes the generic way."""
    listed = [row.model_type for row in supported() if row.model_type not in ARCHITECTURES]
    unbuilt = {
        name: why for name in listed if name not in NO_LANGUAGE_MODEL and (why := _nothing_of_the_language_model(name))
    }
    assert len(unbuilt) < 0.2 * len(listed), unbuilt


class _Reads:
    """Stands for `safetensors.safe_open` and notes the names of the tensors whose bytes are read."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._open = safetensors.safe_open

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        opened, names = self._open(*args, **kwargs), self.names

        class Slice:
            def __init__(self, name: str) -> None:
                self._name, self._slice = name, opened.get_slice(name)

            def __getitem__(self, index: Any) -> Any:
                names.append(self._name)
                return self._slice[index]

            def __getattr__(self, name: str) -> Any:
                return getattr(self._slice, name)

        class Shard:
            def __enter__(self) -> Any:
                opened.__enter__()
                return self

            def __exit__(self, *details: Any) -> Any:
                return opened.__exit__(*details)

            def get_slice(self, name: str) -> Slice:
                return Slice(name)

        return Shard()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@pytest.mark.parametrize("name", sorted({*BUILDERS, *OWN}))
def test_what_is_read_is_what_the_encoder_holds(
    name: str, written: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(name, written / name) if name in BUILDERS else checkpoints.path(name)
    reads = _Reads()
    monkeypatch.setattr(safetensors, "safe_open", reads)
    model = family_of(open_directory(path)).load(torch.float32)
    sizes = {key: tensor.nbytes for key, tensor in stored_tensors(path / "model.safetensors").items()}
    assert reads.names and len(set(reads.names)) == len(reads.names), "a tensor is read twice"
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sum(sizes[key] for key in reads.names) <= held
    assert not [key for key in reads.names if "language_model" in key or "lm_head" in key]


def test_parts_that_encode_nothing_are_neither_read_nor_held(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Janus also makes images: three quarters of what is not its language model."""
    path = write("janus", written / "janus")
    facts = inspect((str(path), None, 1)).facts
    assert facts is not None and "vqmodel" in facts.left_out
    reads = _Reads()
    monkeypatch.setattr(safetensors, "safe_open", reads)
    encoder = load_encoder(str(path), device="cpu", dtype="float32", facts=facts)
    stored = stored_tensors(path / "model.safetensors")
    assert {name.removeprefix("model.").partition(".")[0] for name in reads.names} == {"vision_model", "aligner"}
    assert sum(stored[name].nbytes for name in reads.names) <= encoder.info.weight_bytes


def test_a_part_is_left_out_only_where_no_operation_reads_it() -> None:
    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("tower", "bare", "spare")})

        @property
        def base_model(self) -> torch.nn.Module:
            return self.model

    def encode(parts: Any) -> list[torch.Tensor]:
        tower, bare = parts.model["tower"], parts.model["bare"]
        return [tower(torch.ones(1, 2)) + bare.weight.sum()]  # a weight that no forward of its module reads

    parts = Parts().eval()
    with torch.inference_mode():
        assert leave_out_unreached(parts, encode, encode(parts)) == ["model.spare"]
        with pytest.raises(RuntimeError, match="left out"):
            parts.model["spare"](torch.ones(1, 2))


def test_a_part_that_is_asked_for_more_than_its_tensors_stays() -> None:
    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.spare = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        @property
        def base_model(self) -> torch.nn.Module:
            return self

    def encode(parts: Any) -> list[torch.Tensor]:
        return [parts.tower(torch.ones(1, parts.spare.in_features))]

    parts = Parts().eval()
    with torch.inference_mode():
        assert leave_out_unreached(parts, encode, encode(parts)) == []
        encode(parts)


def test_nothing_is_left_out_while_a_modality_has_no_probe(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("glm4v", written / "glm4v")

    def check_all_but_videos(model: Any, found: Any, modality: Modality, processor: Any) -> Any:
        if modality is Modality.VIDEO:
            raise Refused("not today")
        return check(model, found, modality, processor)

    monkeypatch.setattr(discover, "check", check_all_but_videos)
    facts = inspect((str(path), None, 1)).facts
    assert facts is not None and Modality.VIDEO in facts.refused and not facts.left_out


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        vision_config=_tower("siglip_vision_model", image_size=896, patch_size=14),
        text_config={"num_hidden_layers": 4, "vocab_size": 262_208},
    )


def _t5gemma2() -> Any:
    vision = _tower("siglip_vision_model", image_size=896, patch_size=14)
    config = transformers.T5Gemma2Config()
    config.encoder.vision_config = transformers.SiglipVisionConfig(**vision)
    return config


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=_tower("clip_vision_model", image_size=336, patch_size=14),
        text_config={"model_type": "llama", "num_hidden_layers": 2},
    )


def _qwen() -> Any:
    return transformers.Qwen2_5_VLConfig(
        vision_config={"depth": 12, "hidden_size": 1280, "out_hidden_size": 2048},
        text_config={"num_hidden_layers": 2, "hidden_size": 2048, "intermediate_size": 8192},
    )


def _tower(model_type: str, **more: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        **more,
    }


LARGE = {"gemma3": _gemma3, "t5gemma2": _t5gemma2, "llava": _llava, "qwen2_5_vl": _qwen}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_loading_takes_little_more_memory_than_the_encoder(name: str, tmp_path: Path) -> None:
    """bfloat16 checkpoints of a gigabyte or more, the encoder 0.4 GB of it, in files of holes."""
    if name == "t5gemma2" and transformers.__version__.startswith("5.17."):
        pytest.skip("this release of transformers looks for tensors of T5Gemma 2 under names that it does not write")
    config = LARGE[name]()
    config.save_pretrained(tmp_path)
    cls = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForConditionalGeneration")
    with torch.device("meta"):
        whole = cls(config)
    shapes = {key: list(tensor.shape) for key, tensor in whole.state_dict().items()}
    _write_holes(tmp_path / "model.safetensors", shapes)
    code = f"""
import re, sys
from pathlib import Path
import torch, transformers
from encode_server.models.encoder import load_encoder
from encode_server.models.families import family_of
from encode_server.models.generic import discover
from encode_server.models.generic.check import Refused, check
from encode_server.models.resolve import open_directory
def most():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
family = family_of(open_directory(Path({str(tmp_path)!r})))
family.model_class()
before = most()
model = family.load(torch.bfloat16)
tensors = list(model.state_dict().values())
for tensor in tensors:  # those that need no conversion are mapped from the file, and come when they are used
    tensor.view(torch.uint8).max()
print(sum(tensor.nbytes for tensor in tensors), most() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held, grown = map(int, done.stdout.split())
    size = (tmp_path / "model.safetensors").stat().st_size
    print(f"{name}: file {size >> 20} MiB, encoder {held >> 20} MiB, peak {grown >> 20} MiB")
    assert held > 200 << 20 and size > 2 * held
    assert grown <= FACTOR * held + BASE


def _write_holes(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of bfloat16 zeros that take no room on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
