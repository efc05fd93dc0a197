"""Which device `--preproc-device` means for a preparer, and which names are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from encode_server.errors import StartupError
from encode_server.models.on_device import choose
from encode_server.settings import load_settings


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def have(count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return have


def test_preparers_are_spread_over_the_gpus_or_share_the_named_one(gpus: Callable[[int], None]) -> None:
    gpus(2)
    assert [choose("cuda", process) for process in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [choose("cuda:1", process) for process in range(2)] == ["cuda:1", "cuda:1"]
    assert choose("cpu", 1) == "cpu"


@pytest.mark.parametrize(
    ("device", "count", "have"),
    [("cuda", 0, "no GPU"), ("cuda:0", 0, "no GPU"), ("cuda:1", 1, "1 GPU"), ("cuda:7", 4, "4 GPUs")],
)
def test_a_gpu_that_does_not_exist_is_refused(gpus: Callable[[int], None], device: str, count: int, have: str) -> None:
    gpus(count)
    with pytest.raises(StartupError, match=f"^--preproc-device {device}: torch finds {have}, counted from 0"):
        choose(device, 0)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "mps", "cuda:0,1", "CUDA"])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(StartupError, match=f"^--preproc-device: got '{name}', takes cpu, cuda or cuda:N") as refused:
        load_settings({"preproc_device": name})
    assert "\n" not in str(refused.value)
