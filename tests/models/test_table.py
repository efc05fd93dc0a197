"""The table of models says what this server does, and the command line what a checkpoint would take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from encode_server.cli import main
from encode_server.errors import StartupError
from encode_server.models.generic.classes import placeholders
from encode_server.models.inspect import inspect
from encode_server.models.registry import ARCHITECTURES
from encode_server.models.report import report
from encode_server.models.table import as_markdown, supported, unsupported
from encode_server.models.tested import NOTHING_RECEIVES, SURVEYED, TESTED
from encode_server.wire.checkpoint import Proof
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.models import survey

PAGE = Path(__file__).parents[2] / "docs/models.md"

QUICK = {"vipllava", "blip-2", "t5gemma2"}
"""Types that are surveyed in every run: a language model that is all in one part, one whose head is a part of that
part, and one of an encoder and a decoder that stand apart and share their word tables."""


def test_the_page_is_what_the_installed_transformers_gives() -> None:
    if not _of_this_release():
        pytest.skip("docs/models.md describes another release of transformers")
    assert PAGE.read_text() == as_markdown()


def test_every_model_type_is_either_served_or_refused() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    served = {row.model_type for row in supported()}
    assert served | set(unsupported()) == {*CONFIG_MAPPING_NAMES, *ARCHITECTURES} - {"EvollaModel"}
    assert not served & set(unsupported())
    if _of_this_release():
        assert {*TESTED, *SURVEYED, *ARCHITECTURES} <= served


def test_what_nothing_receives_is_refused_by_its_configuration() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for name in NOTHING_RECEIVES & set(CONFIG_MAPPING_NAMES):
        assert not [kind for kind in Modality if placeholders(CONFIG_MAPPING[name](), kind)], name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SURVEYED]
)
def test_what_was_surveyed_works(name: str, tmp_path: Path) -> None:
    if not _of_this_release():
        pytest.skip("docs/models.md describes another release of transformers")
    survey.build(name, tmp_path / name)
    facts = inspect((str(tmp_path / name), None, 2)).facts
    assert facts is not None
    assert {kind: one.batching for kind, one in facts.modalities.items()} == SURVEYED[name]
    assert {one.proof for one in facts.modalities.values()} == {Proof.RECEIVED}


def test_a_processor_with_too_few_placeholders_is_refused(tmp_path: Path) -> None:
    """BLIP-2's own forward would take the first of 32 rows and say nothing: old files leave the number out."""
    survey.build("blip-2", tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings.pop("num_query_tokens") > 1
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer["image_token"] = "<image>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StartupError, match="the encoder gives 32 rows, and the processor makes room for 1"):
        inspect((str(tmp_path), None, 1))


def _of_this_release() -> bool:
    return f"transformers {transformers.__version__};" in PAGE.read_text()


def test_a_report_counts_what_serving_would_take(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(checkpoints.path("qwen2_5_vl"))
    assert main(["inspect", path, "--image", "280x140"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "class        Qwen2_5_VLForConditionalGeneration" in lines
    assert "tokens       50 for an image of 280x140" in lines
    assert any(line.startswith("reads") and " of " in line for line in lines)


def test_a_report_counts_the_tokens_of_clips_and_audio(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(checkpoints.path("qwen2_5_omni_thinker"))
    assert main(["inspect", path, "--image", "56x56", "--clip", "364x364x2", "--audio", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 4 frames, 2 to a patch in time; 13 x 13 tokens each
    assert "tokens       338 for a clip of 364x364x2 s" in lines
    assert "tokens       50 for 2 s of audio" in lines


@pytest.mark.parametrize(("name", "message"), [("clips", "no size of a clip"), ("audios", "no length of audio")])
def test_a_length_that_is_none_is_one_line(checkpoints: Checkpoints, name: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        report(str(checkpoints.path("qwen2_5_omni_thinker")), None, sizes=(), **{name: ("x",)})


def test_a_size_that_is_none_is_one_line(checkpoints: Checkpoints) -> None:
    with pytest.raises(StartupError, match="'12' is no size of an image"):
        report(str(checkpoints.path("qwen2_5_vl")), None, ("12",))
