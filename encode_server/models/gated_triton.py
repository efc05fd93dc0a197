"""What a gated MLP computes between its products as one Triton kernel, and the torch operator around it. Importing
needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from encode_server.models.gated import gate

_BLOCK = 1024  # columns that one program computes


@triton.jit  # type: ignore[untyped-decorator]
def gate_kernel(gate_up, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of one row. Grid: rows, blocks of the width."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
    second = tl.load(gate_up + row * 2 * width + width + column, mask=inside).to(tl.float32)
    if ACTIVATION == "silu":
        active = first / (1 + tl.exp(-first))
    elif ACTIVATION == "gelu":
        active = 0.5 * first * (1 + tl.erf(first * 0.7071067811865476))
    else:
        # Half of 1 + tanh(x) is 1 / (1 + exp(-2 x)).
        active = first / (1 + tl.exp(-1.5957691216057308 * (first + 0.044715 * first * first * first)))
    tl.store(out + row * width + column, (active * second).to(out.dtype.element_ty), mask=inside)


def launch(kernel: Any, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`kernel` over contiguous `gate_up` [..., 2 × width]. Returns [..., width]."""
    width = gate_up.shape[-1] // 2
    out = _room(gate_up, activation)
    assert gate_up.is_contiguous() and activation in ("silu", "gelu", "gelu_tanh")
    if rows := out.numel() // width:
        kernel[(rows, triton.cdiv(width, _BLOCK))](
            gate_up, out, width, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4
        )
    return out


def _on_cuda(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return launch(gate_kernel, gate_up, activation)


def _room(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


# An operator of torch's, for the reasons that `rotary_triton` has for its own.
_library: Any = torch.library.Library("encode_server", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("gate(Tensor gate_up, str activation) -> Tensor")
_library.impl("gate", _on_cuda, "CUDA")
_library.impl("gate", gate, "CPU")
_library.impl("gate", _room, "Meta")


def gate_in_one_kernel(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """As `gated.gate`."""
    return torch.ops.encode_server.gate(gate_up, activation)  # type: ignore[no-any-return]
