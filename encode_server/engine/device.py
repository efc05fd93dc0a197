"""Everything that depends on the kind of device, decided and done in the rank: the front never touches one.

What torch offers for any accelerator goes through `torch.accelerator`. What only CUDA has (and ROCm, by the same names)
is in the last section.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError, first_line
from encode_server.wire.ranks import DeviceMemory

HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
LEAST_SHARED = 256 << 20  # bytes of /dev/shm, for the collectives of a few ranks; a container's default is 64 MiB


def resolve_device(device: str, index: int, needed: int, host: Path = Path("/")) -> str:
    """`auto`, `cuda` or `cpu` → the torch device of the rank that takes the GPU number `index` of `needed` in all.

    `host`: root of the file system. Raises StartupError when there are fewer GPUs than needed, and for `auto` when this
    host has GPUs that torch cannot use: such a server would be a hundred times too slow, and say that it is ready.
    """
    import torch

    if device == "cpu":
        return "cpu"
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if device == "auto" and found == 0:
        if (unusable := _unusable_gpus(host, os.environ)) is not None:
            raise StartupError(f"{unusable}: {_why_not()}; --device cpu serves from the CPU")
        return "cpu"
    if needed > found:
        hidden = next((f" ({name}={os.environ[name]})" for name in HIDING if name in os.environ), "")
        what = "1 GPU is" if needed == 1 else f"{needed} GPUs are"
        if found == 0 and not _all_hidden(os.environ):
            raise StartupError(f"{what} needed, found none{hidden}: {_why_not()}; --device cpu serves from the CPU")
        raise StartupError(f"{what} needed, found {found}{hidden}: lower --dp or --tp, or set --device cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return f"{accelerator.type}:{index}"


def resolve_dtype(dtype: str, checkpoint_dtype: str, device: str) -> str:
    """`auto` → the checkpoint's dtype on a GPU and on a CPU that multiplies bfloat16 in hardware, else float32.

    Without such instructions a bfloat16 product is some 500 times slower than a float32 one.
    """
    if dtype != "auto":
        return dtype
    if device != "cpu":
        return checkpoint_dtype
    return checkpoint_dtype if checkpoint_dtype == "bfloat16" and _cpu_has_bfloat16() else "float32"


def use(device: str) -> None:
    """Make the device this process' current one."""
    import torch

    torch.accelerator.set_device_index(torch.device(device))


def recover(device: str) -> None:
    """After a failed forward: wait until nothing of the forward runs, and give its memory back. Raises what the device
    raises when its context is broken."""
    import torch

    torch.accelerator.synchronize(torch.device(device))
    torch.accelerator.empty_cache()


def memory_of(device: str) -> DeviceMemory | None:
    """How much memory is used on a device that is no CPU; None where the device does not say."""
    import torch

    place = torch.device(device)
    try:
        free, total = torch.accelerator.get_memory_info(place)
        reserved, peak = torch.accelerator.memory_reserved(place), torch.accelerator.max_memory_allocated(place)
    except (RuntimeError, AssertionError):
        return None
    return DeviceMemory(total - free, reserved, peak, total)


def choose_precision(dtype: str, *, tf32: bool) -> str:
    """How this process multiplies float32 matrices on its device, chosen and in words."""
    import torch

    if dtype != "float32":
        return f"computing in {dtype}"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # of convolutions; true by default
    if tf32:
        return "computing in float32, matrix products in TF32"
    return "computing in float32, matrix products too: --dtype bfloat16 or --tf32 is several times faster"


def slow_dtype(dtype: str) -> str | None:
    """What to tell the operator of a GPU that computes `dtype` only by detours."""
    import torch

    if dtype != "bfloat16" or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return "this GPU has no instructions for bfloat16: --dtype float16 may be several times faster"


def profiler_activity(device: str) -> Any:
    """What torch's profiler calls the device's work."""
    from torch.profiler import ProfilerActivity

    return getattr(ProfilerActivity, device.partition(":")[0].upper())


def little_shared_memory(folder: Path = Path("/dev/shm")) -> str | None:
    """What to tell the operator when the collectives of several ranks may find too little shared memory."""
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        nbytes = found.f_blocks * found.f_frsize
        if nbytes < LEAST_SHARED:
            return f"{folder} has {nbytes >> 20} MiB, and NCCL may need {LEAST_SHARED >> 20}: see docs/operations.md"
    return None


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


# CUDA's alone. ROCm's torch answers to the same names.


def pin(address: int, nbytes: int) -> None:
    """Have the current GPU copy to and from this memory directly. Raises RuntimeError where the driver refuses."""
    import torch

    code = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)  # type: ignore[no-untyped-call]
    try:
        torch.cuda.check_error(code)
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # consume the pending error, or the next kernel would report it
            torch.zeros(1, device="cuda")
        raise


def unpin(address: int) -> None:
    """Undo `pin`."""
    import torch

    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _unusable_gpus(host: Path, environment: Mapping[str, str]) -> str | None:
    """Which GPUs this host has, in words; None where it has none, or where the environment hides all of them."""
    if _all_hidden(environment):
        return None
    nvidia = sorted((host / "dev").glob("nvidia[0-9]*"))
    if nvidia:
        return f"this host has an NVIDIA GPU (/dev/{nvidia[0].name}) that torch cannot use"
    if (host / "dev/kfd").exists():
        return "this host has an AMD GPU (/dev/kfd) that torch cannot use"
    return None


def _all_hidden(environment: Mapping[str, str]) -> bool:
    """Whether the operator hides every GPU."""
    return any(environment.get(name, "0").strip() in ("", "-1") for name in HIDING)


def _why_not() -> str:
    """Why torch uses no GPU."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, says: {first_line(error)}"
    return f"torch {torch.__version__} found none"
