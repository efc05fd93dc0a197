"""Every named family's forward on an emulated CUDA device: right values, no wait of the host, no slot touched late."""

from __future__ import annotations

import pytest

from benchmarks.card.device import emulated
from benchmarks.card.ledger import Kind
from encode_server.models.encoder import load_encoder
from encode_server.wire import ranks as m
from tests.checkpoints import Checkpoints
from tests.cuda.ward import Ward, batches, on_a_cpu, relative_error

BOUNDS = {"siglip": 0.15, "clip": 0.03}
"""Relative error of bfloat16: the attention of these tiny towers is nearly a choice, which rounding changes."""
DEFAULT = 0.015

SHORT = ["qwen2_5_vl", "qwen3_vl", "qwen2_audio"]
LONG = ["qwen2_vl", "qwen2_5_omni_thinker", "whisper", "siglip", "clip", "dinov2"]
NAMES = [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]


@pytest.mark.parametrize("name", NAMES)
def test_done_is_said_when_nothing_is_queued_any_more_and_the_embeddings_are_right(
    checkpoints: Checkpoints, name: str
) -> None:
    path = checkpoints.path(name)
    with emulated() as device:
        ward = Ward(path)
        for seq, (modality, items) in enumerate(batches(path).items()):
            want = on_a_cpu(path, modality, items)
            command = ward.place(seq, modality, items, [len(rows) for rows in want])
            device.ledger.clear()
            done = ward.worker.forward(command)
            assert isinstance(done, m.Done) and not done.error
            assert device.streams.pending == 0
            assert relative_error(ward.embeddings(command), want) < BOUNDS.get(name, DEFAULT)
            assert device.ledger.waits == [], "the forward made the host wait for the device"
            assert all(launch.pinned for launch in device.ledger.launches), "a copy from memory that is not page-locked"
            ward.release(command)
            device.streams.synchronize()
            assert ward.is_soiled(command)


@pytest.mark.parametrize("name", NAMES)
def test_float32_on_the_device_is_float32_on_a_cpu(checkpoints: Checkpoints, name: str) -> None:
    """Flash attention takes no float32, so this is the other way through attention as well."""
    path = checkpoints.path(name)
    for modality, items in batches(path).items():
        want = on_a_cpu(path, modality, items)
        with emulated() as device:
            encoder = load_encoder(str(path), device="cuda:0", dtype="float32")
            device.ledger.clear()
            embeddings = encoder.forward(modality, items)
            assert device.ledger.waits == []
            assert not [launch for launch in device.ledger.of(Kind.KERNEL) if launch.attention]
            got = [rows.cpu() for rows in embeddings]
        assert relative_error(got, want) < 2e-6
