"""What is predicted of GPUs: from few launches by hand, and of towers of released sizes, which no change may slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.card.ledger import Attention, Kind, Launch
from benchmarks.card.sheets import CARDS, HOST_S, SHORTEST_S, predict

H100 = CARDS["H100"]


def test_the_time_of_a_few_launches() -> None:
    product = Launch("mm", Kind.KERNEL, "", read=1000, written=1000, flops=10**12)
    norm = Launch("norm", Kind.KERNEL, "", read=10**9, written=10**9)
    small = Launch("add", Kind.KERNEL, "", read=10, written=10)
    found = predict([product, norm, small], H100)
    assert found.linear_s == pytest.approx(10**12 / (798e12 * 0.83), rel=0.01)
    assert found.rest_s == pytest.approx(2e9 / 3.0e12, rel=0.01, abs=2 * SHORTEST_S)
    assert found.seconds == found.linear_s + found.rest_s
    assert predict([small] * 1000, H100).seconds == 1000 * HOST_S, "the host is slower than small kernels"


def test_attention_is_filled_up_to_the_kernels_tiles_and_widths() -> None:
    def seconds(length: int, width: int, flash3: bool = False) -> float:
        launch = Launch("flash", Kind.KERNEL, "", flops=1, attention=Attention((length,) * 64, 16, width))
        return predict([launch], H100, flash3=flash3).attention_s

    assert seconds(4000, 72) == seconds(4032, 96) > seconds(4032, 64)
    assert seconds(4000, 72, flash3=True) < seconds(4000, 72)


@pytest.mark.parametrize(
    ("name", "side", "least"),
    [
        ("Qwen3-VL-8B", 896, 0.45),
        *(pytest.param("Qwen2.5-VL-7B", side, 0.50, marks=pytest.mark.slow) for side in (224, 448, 896, 1344)),
        # Attention is a third of it there: FlashAttention 3 has it at 57 per cent.
        pytest.param("Qwen2.5-VL-7B", 1792, 0.48, marks=pytest.mark.slow),
    ],
)
def test_towers_of_released_sizes_keep_their_predicted_share(
    tmp_path: Path, name: str, side: int, least: float
) -> None:
    directory = roofline.released(tmp_path)[name]
    way = roofline.Way(roofline.FUSED)
    [row] = roofline.tower_rows(name, directory, [side], H100, ways=[way])
    assert row["share"] >= least


def test_a_card_without_a_data_sheet_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--card=V100"]) == 2
    assert "take one of H100" in capsys.readouterr().err
