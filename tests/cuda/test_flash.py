"""A GPU for which torch has no flash attention, or a wrong one, is served another way, and the log says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.card import kernels
from benchmarks.card.device import emulated
from benchmarks.card.ledger import Kind, Launch
from encode_server.models.attention import flash_works
from encode_server.models.encoder import load_encoder
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.cuda.ward import batches, on_a_cpu, relative_error


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    flash_works.cache_clear()
    yield
    flash_works.cache_clear()


def missing(launch: Launch) -> None:
    """What a build of torch without these kernels says of each call."""
    if launch.attention is not None:
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")


def wrong(q: torch.Tensor, *_: Any, **__: Any) -> Any:
    return (torch.zeros_like(q), *[torch.zeros(0) for _ in range(4)])


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [("", "USE_FLASH_ATTENTION was not enabled"), ("_flash_packed", "of 72 are off"), ("_flash", "of 72 are off")],
)
def test_a_flash_kernel_that_fails_or_is_wrong_is_not_taken(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kernel: str,
    reason: str,
) -> None:
    path = checkpoints.path("qwen2_5_vl")
    items = batches(path)[Modality.IMAGE]
    with emulated() as device:
        if kernel:
            monkeypatch.setattr(kernels, kernel, wrong)
        else:
            device.on_launch = missing
        encoder = load_encoder(str(path), device="cuda:0", dtype="bfloat16")
        device.ledger.clear()
        embeddings = encoder.forward(Modality.IMAGE, items)
        assert device.ledger.waits == []
        assert not [launch for launch in device.ledger.of(Kind.KERNEL) if launch.attention]
        got = [rows.cpu() for rows in embeddings]
    assert relative_error(got, on_a_cpu(path, Modality.IMAGE, items)) < 0.015
    [warning] = [message for message in caplog.messages if "not one flash kernel" in message]
    assert reason in warning


def test_a_flash_kernel_that_works_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with emulated():
        assert flash_works(torch.device("cuda:0"))
    assert not [message for message in caplog.messages if "flash" in message]
