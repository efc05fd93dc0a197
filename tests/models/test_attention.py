"""Attention over packed segments: right, and in as few calls as there are lengths, never with a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from encode_server.models import attention
from encode_server.models.attention import Segments, segment_attention, use_segment_attention
from tests.checkpoints import Checkpoints
from tests.models import samples
from tests.models.reference import Reference

LENGTHS = [3, 8, 3, 1, 8, 3]


def _states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, sum(LENGTHS), 4, generator=generator) for _ in range(3)]


def _one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    parts = zip(*(states.split(LENGTHS, dim=2) for states in (q, k, v)), strict=True)
    outputs = [torch.softmax(a @ b.mT * 0.3, dim=-1) @ c for a, b, c in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def test_segments_attend_to_themselves_alone_in_one_call_per_length(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[int, ...], Any]] = []
    real = functional.scaled_dot_product_attention

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, **more: Any) -> torch.Tensor:
        calls.append((tuple(q.shape), mask))
        return real(q, k, v, mask, **more)

    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", counted)
    q, k, v = _states()
    layout = Segments(LENGTHS, torch.device("cpu"))
    decoy = Segments([sum(LENGTHS)], torch.device("cpu"))
    got, _ = segment_attention(
        nn.Identity(), q, k, v, None, scaling=0.3, cu_seq_lens_q=layout.cu_seqlens, segments=(decoy, layout)
    )
    torch.testing.assert_close(got, _one_by_one(q, k, v))
    assert calls == [((3, 2, 3, 4), None), ((2, 2, 8, 4), None), ((1, 2, 1, 4), None)]


def test_boundaries_alone_are_enough() -> None:
    q, k, v = _states()
    bounds = Segments(LENGTHS, torch.device("cpu")).cu_seqlens.clone()
    got, _ = segment_attention(nn.Identity(), q, k, v, None, scaling=0.3, cu_seq_lens_q=bounds)
    torch.testing.assert_close(got, _one_by_one(q, k, v))


def test_segments_of_one_length() -> None:
    q = torch.randn(1, 2, 12, 4)
    layout = Segments([4, 4, 4], torch.device("cpu"))
    got, _ = segment_attention(nn.Identity(), q, q, q, None, cu_seq_lens_q=layout.cu_seqlens, segments=(layout,))
    want = torch.cat([functional.scaled_dot_product_attention(part, part, part) for part in q.split(4, dim=2)], dim=2)
    torch.testing.assert_close(got, want.transpose(1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel needs a GPU")
def test_flash_kernel_agrees() -> None:
    q, k, v = (states.repeat(1, 1, 1, 4).cuda().bfloat16() for states in _states())
    layout = Segments(LENGTHS, torch.device("cuda"))
    got, _ = segment_attention(
        nn.Identity(), q, k, v, None, scaling=0.3, cu_seq_lens_q=layout.cu_seqlens, segments=(layout,)
    )
    torch.testing.assert_close(got.float(), _one_by_one(q.float(), k.float(), v.float()), atol=0.02, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel needs a GPU")
def test_flash_kernel_agrees_on_padded_batches() -> None:
    q, k, v = (torch.randn(3, 2, 17, 64, device="cuda").bfloat16() for _ in range(3))
    got, _ = segment_attention(nn.Identity(), q, k, v, None, scaling=0.3)
    want = torch.softmax(q.float() @ k.float().mT * 0.3, dim=-1) @ v.float()
    torch.testing.assert_close(got.float(), want.transpose(1, 2), atol=0.02, rtol=0)


def test_padded_images_keep_their_mask() -> None:
    """SigLIP 2 pads images of different shapes to one number of patches; padding must not be attended to."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_patches=64, patch_size=4
    )
    model = Siglip2VisionModel(config).eval().requires_grad_(False)
    use_segment_attention(model)
    shapes = torch.tensor([[4, 8], [3, 5]])
    pixels = torch.randn(2, 32, 48)
    mask = torch.arange(32)[None] < shapes.prod(1)[:, None]
    together = model(pixels, mask, shapes).last_hidden_state[1, :15]
    alone = model(pixels[1:, :15], mask[1:, :15], shapes[1:]).last_hidden_state[0]
    torch.testing.assert_close(together, alone)
    unmasked = model(pixels, torch.ones_like(mask), shapes).last_hidden_state[1, :15]
    assert (unmasked - alone).abs().max() > 0.01, "the padding is too weak to show a missing mask"


def test_padded_audio_keeps_its_mask(checkpoints: Checkpoints) -> None:
    """Qwen2-Audio as transformers runs it: 4 s windows, of which 1.5 s are sound."""
    reference = Reference(checkpoints.path("qwen2_audio"), "qwen2_audio")
    sound = samples.samples(1.5)
    want = reference.audio(sound)
    use_segment_attention(reference.model.model.audio_tower)
    torch.testing.assert_close(reference.audio(sound), want, atol=1e-4, rtol=0)
