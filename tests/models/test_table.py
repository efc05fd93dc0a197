"""The table of models says what this server does, and the command line what a checkpoint would take."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from encode_server.cli import main
from encode_server.errors import StartupError
from encode_server.models.registry import ARCHITECTURES
from encode_server.models.report import report
from encode_server.models.table import as_markdown, supported, unsupported
from encode_server.models.tested import TESTED
from tests.checkpoints import Checkpoints

PAGE = Path(__file__).parents[2] / "docs/models.md"


def test_the_page_is_what_the_installed_transformers_gives() -> None:
    page = PAGE.read_text()
    if f"transformers {transformers.__version__};" not in page:
        pytest.skip("docs/models.md describes another release of transformers")
    assert page == as_markdown()


def test_every_model_type_is_either_served_or_refused() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    served = {row.model_type for row in supported()}
    assert served | set(unsupported()) == {*CONFIG_MAPPING_NAMES, *ARCHITECTURES} - {"EvollaModel"}
    assert not served & set(unsupported())
    assert {*TESTED, *ARCHITECTURES} <= served


def test_a_report_counts_what_serving_would_take(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(checkpoints.path("qwen2_5_vl"))
    assert main(["inspect", path, "--image", "280x140"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "class        Qwen2_5_VLForConditionalGeneration" in lines
    assert "tokens       50 for an image of 280x140" in lines
    assert any(line.startswith("reads") and " of " in line for line in lines)


def test_a_size_that_is_none_is_one_line(checkpoints: Checkpoints) -> None:
    with pytest.raises(StartupError, match="'12' is no size of an image"):
        report(str(checkpoints.path("qwen2_5_vl")), None, ("12",))
