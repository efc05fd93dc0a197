"""Every family gives what its language model receives: alone, in a batch with others, and from ranks that share it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.models.encoder import load_encoder
from encode_server.models.inspect import inspect
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.models.tested import REFUSED, TESTED
from encode_server.wire.checkpoint import Batching, Facts, Proof, Route
from encode_server.wire.modality import Modality
from tests.models import samples
from tests.models.families.builders import BUILDERS, write
from tests.models.families.reference import Whole
from tests.models.ranks import Jobs, encode_with_ranks
from tests.models.reference import frames_of

TOLERANCE = 1e-4
PAGE = Path(__file__).parents[3] / "docs/models.md"
SIZES = [(300, 420), (64, 64), (97, 233), (300, 900)]
CLIPS = [(8, 90, 150), (4, 130, 90)]
SECONDS = [1.93, 0.41, 3.3]

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO

EXPECTED: Mapping[str, Mapping[Modality, Batching]] = {**TESTED, "llava_pixtral": TESTED["llava"]}
"""How the items of each builder's checkpoint share a call."""

LEFT_OUT = {"janus": ["generation_aligner", "generation_embeddings", "generation_head", "vqmodel"]}
"""Parts that encode nothing, which ranks don't load."""

OWN = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni_thinker"}
LONG = {
    *("glm4v_moe", "glm46v", "qwen3_5_moe", "qwen3_vl_moe"),  # as their siblings
    *("qwen3_omni_moe_thinker", "gemma4", "molmo2", "deepseek_ocr2", "dots3_note", "glm5_next"),
}
"""Families whose tests take seconds each, or whose code is a sibling's."""

FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in sorted({*EXPECTED, *OWN})]
SHARED = ["qwen3_5", "internvl", "mistral3", "llama4", "qwen3_asr", "lfm2_vl"]
"""Families that real ranks share over gloo: fused and separate q, k and v, gated MLPs and plain ones, projectors."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def _media(modality: Modality) -> list[bytes]:
    if modality is IMAGE:
        return [samples.png(*size, seed=seed) for seed, size in enumerate(SIZES)]
    if modality is VIDEO:
        return [samples.clip(*clip, fps=2, seed=seed) for seed, clip in enumerate(CLIPS)]
    return [samples.wav(seconds, seed) for seed, seconds in enumerate(SECONDS)]


def _received(whole: Whole, modality: Modality) -> list[torch.Tensor]:
    if modality is IMAGE:
        return [whole.image(samples.pixels(*size, seed)) for seed, size in enumerate(SIZES)]
    if modality is VIDEO:
        return [whole.video(*frames_of(clip)) for clip in _media(VIDEO)]
    return [whole.audio(samples.samples(seconds, seed)) for seed, seconds in enumerate(SECONDS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_that_the_language_model_receives(written: Path, family: str) -> None:
    path = write(family, written / family)
    newest = f"transformers {transformers.__version__};" in PAGE.read_text()
    try:
        found = inspect((str(path), None, 2))
    except StartupError as error:
        assert not newest and f"transformers {transformers.__version__} fails" in str(error), error
        pytest.skip(str(error))
    encoder = load_encoder(str(path), device="cpu", dtype="float32", facts=found.facts)
    preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
    whole = Whole(family, path)
    if family in EXPECTED:
        assert found.facts is not None
        batching = {name: facts.batching for name, facts in found.facts.modalities.items()}
        if newest:
            assert batching == EXPECTED[family]
        # Older releases of transformers can do less of some families, which is then not offered.
        assert batching.keys() <= EXPECTED[family].keys()
        assert {facts.proof for facts in found.facts.modalities.values()} == {Proof.RECEIVED}
        assert not found.facts.whole, "shards that do not add up"
        assert found.facts.left_out == LEFT_OUT.get(family, [])
    for modality in found.modalities:
        items = [preprocessor.prepare(modality, data) for data in _media(modality)]
        alone = [encoder.forward(modality, [item.tensors])[0] for item in items]
        batch = encoder.forward(modality, [item.tensors for item in items])
        for want, one, together, item in zip(_received(whole, modality), alone, batch, items, strict=True):
            assert want.std() > 0.01, "the embedding is too flat to show an error"
            assert want.shape == (item.tokens, encoder.info.dims[modality])
            torch.testing.assert_close(one, want, atol=TOLERANCE, rtol=1e-6)
            torch.testing.assert_close(together, want, atol=TOLERANCE, rtol=1e-6)
        probe = preprocessor.prepare(modality, found.probes[modality])
        [embedding] = encoder.forward(modality, [probe.tensors])
        assert embedding.shape == (probe.tokens, encoder.info.dims[modality])
        assert probe.tokens >= 1


def test_ranks_that_share_an_encoder_agree_with_one_that_has_it_whole(written: Path, tmp_path: Path) -> None:
    jobs: dict[str, tuple[Path, dict[Modality, list[dict[str, torch.Tensor]]]]] = {}
    facts = {}
    want = {}
    for family in SHARED:
        path = write(family, written / family)
        found = inspect((str(path), None, 2))
        facts[family] = found.facts
        preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
        encoder = load_encoder(str(path), device="cpu", dtype="float32", facts=found.facts)
        modality = found.modalities[0]
        items = [preprocessor.prepare(modality, data).tensors for data in _media(modality)[:2]]
        jobs[family] = (path, {modality: items})
        want[family] = encoder.forward(modality, items)
        part = load_encoder(str(path), device="cpu", dtype="float32", rank=1, world=2, facts=found.facts)
        assert part.info.weight_bytes < encoder.info.weight_bytes
    shared: Jobs = jobs
    for outputs in encode_with_ranks(shared, 2, tmp_path, facts=facts):
        for family, (_, batches) in jobs.items():
            for modality in batches:
                for index, row in enumerate(want[family]):
                    got = outputs[f"{family}/{modality}/{index}"]
                    torch.testing.assert_close(
                        got, row, atol=TOLERANCE, rtol=1e-6, msg=lambda text, f=family: f"{f}: {text}"
                    )


def test_every_builder_is_tested() -> None:
    assert set(BUILDERS) == {*EXPECTED, *OWN}


def test_llama_4_goes_through_the_models_forward(written: Path) -> None:
    """Its features method stops before the projector."""
    facts = inspect((str(write("llama4", written / "llama4")), None, 1)).facts
    assert facts is not None
    assert facts.modalities[IMAGE].route is Route.FORWARD


def test_a_modality_that_transformers_cannot_run_is_not_offered(written: Path) -> None:
    """Kimi K2.5's video: its own forward splits more rows than it has."""
    found = inspect((str(write("kimi_k25", written / "kimi_k25")), None, 1))
    assert found.facts is not None
    assert {name: set(found.facts.refused) for name in ("kimi_k25",)} == {name: set(of) for name, of in REFUSED.items()}
    assert found.modalities == [IMAGE]
    assert "split_with_sizes" in found.facts.refused[VIDEO]


def test_heads_that_the_ranks_do_not_divide_stay_whole(written: Path) -> None:
    found = inspect((str(write("gemma3", written / "gemma3")), None, 3))
    assert found.facts is not None
    assert found.facts.undivided == ["SiglipAttention"]
    assert any("3 does not divide" in note for note in found.notes)


def test_what_was_found_out_crosses_to_the_ranks(written: Path) -> None:
    facts = inspect((str(write("gemma3", written / "gemma3")), None, 2)).facts
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=Facts) == facts


@pytest.mark.slow
def test_a_model_that_also_speaks_gives_its_thinkers_rows(written: Path, tmp_path: Path) -> None:
    thinker = write("qwen3_omni_moe_thinker", written / "qwen3_omni_moe_thinker")
    whole = Path(shutil.copytree(thinker, tmp_path / "whole"))
    weights = {f"thinker.{name}": weight.clone() for name, weight in load_file(thinker / "model.safetensors").items()}
    weights["talker.model.codec_embedding.weight"] = torch.zeros(4, 4)
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen3_omni_moe", "thinker_config": json.loads((thinker / "config.json").read_text())}
    (whole / "config.json").write_text(json.dumps(config))
    facts = inspect((str(thinker), None, 1)).facts
    item = Preprocessor(resolve(str(thinker)), MediaLimits()).prepare(AUDIO, samples.wav(0.9)).tensors
    rows = [
        load_encoder(str(path), device="cpu", dtype="float32", facts=facts).forward(AUDIO, [item])[0]
        for path in (whole, thinker)
    ]
    torch.testing.assert_close(*rows, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "llama4", "qwen3_5"])
def test_half_precision_rounds_as_transformers_does(written: Path, family: str) -> None:
    path = write(family, written / family)
    facts = inspect((str(path), None, 1)).facts
    item = Preprocessor(resolve(str(path)), MediaLimits()).prepare(IMAGE, _media(IMAGE)[0]).tensors
    [rows] = load_encoder(str(path), device="cpu", dtype="bfloat16", facts=facts).forward(IMAGE, [item])
    want = Whole(family, path, torch.bfloat16).image(samples.pixels(*SIZES[0]))
    assert rows.dtype is want.dtype is torch.bfloat16
    assert (rows.float() - want.float()).norm() < 0.02 * want.float().norm()
