"""What `auto` means for a device and a dtype, decided in the rank: the front never touches CUDA."""

from __future__ import annotations

from pathlib import Path

from encode_server.errors import StartupError, first_line


def resolve_device(device: str, rank: int) -> str:
    """`auto`, `cuda` or `cpu` → the torch device of this rank.

    Raises StartupError when there are fewer GPUs than ranks.
    """
    import torch

    if device == "cpu":
        return "cpu"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and found == 0:
        return "cpu"
    if rank >= found:
        raise StartupError(f"rank {rank} needs GPU {rank}, found {found}: lower --tp or set --device cpu")
    return f"cuda:{rank}"


def resolve_dtype(dtype: str, checkpoint_dtype: str, device: str) -> str:
    """`auto` → the checkpoint's dtype on CUDA and on a CPU that multiplies bfloat16 in hardware, else float32.

    Without such instructions a bfloat16 product is some 500 times slower than a float32 one.
    """
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return checkpoint_dtype
    return checkpoint_dtype if checkpoint_dtype == "bfloat16" and _cpu_has_bfloat16() else "float32"


def choose_flash_attention(version: str, device: str) -> None:
    """Have torch's flash attention run FlashAttention's kernels of `version`, `2` (torch's own) or `3`, on a GPU.

    Raises StartupError where version 3 is not installed, or the GPU is not of the Hopper generation.
    """
    if version != "3":
        return
    import torch
    from torch.nn.attention import activate_flash_attention_impl

    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        raise StartupError(f"--flash-attention 3 needs a Hopper GPU (9.0); {device} is of capability {major}.{minor}")
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, ValueError, RuntimeError) as error:
        raise StartupError(f"--flash-attention 3: {first_line(error)}; install the package flash_attn_3") from error


def _cpu_has_bfloat16() -> bool:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})
