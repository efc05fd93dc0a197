"""Which device a rank takes, when it refuses, and which errors mean that memory is short."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from encode_server.engine import device as devices
from encode_server.engine import rank
from encode_server.engine.device import choose_precision, resolve_device, resolve_dtype
from encode_server.engine.rank import Worker
from encode_server.errors import StartupError
from encode_server.models.out_of_memory import is_out_of_memory
from encode_server.wire import ranks as m
from encode_server.wire.modality import Modality

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading"
    " and installing a new version"
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say how many GPUs torch finds."""

    def found(count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))

    for name in devices.HIDING:
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def too_old(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a host that has a GPU, and a driver of which torch says that it is too old."""

    def init() -> None:
        raise RuntimeError(TOO_OLD)

    gpus(0)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "dev/nvidiactl").touch()
    return tmp_path


def test_groups_take_the_devices_in_order(gpus: Any, tmp_path: Path) -> None:
    gpus(6)
    taken = [resolve_device("auto", group * 2 + rank, 6, tmp_path) for group in range(3) for rank in range(2)]
    assert taken == [f"cuda:{index}" for index in range(6)]


@pytest.mark.parametrize("index", [0, 7])
def test_fewer_devices_than_needed_refuse_every_rank(gpus: Any, index: int) -> None:
    gpus(6)
    with pytest.raises(StartupError, match=r"8 GPUs are needed, found 6: lower --dp or --tp"):
        resolve_device("auto", index, 8)


def test_the_refusal_names_what_hides_devices(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2")
    with pytest.raises(StartupError, match=r"found 1 \(HIP_VISIBLE_DEVICES=2\)"):
        resolve_device("cuda", 0, 2)


def test_a_host_without_gpus_serves_from_the_cpu(gpus: Any, tmp_path: Path) -> None:
    gpus(0)
    assert resolve_device("auto", 0, 4, tmp_path) == "cpu"


def test_a_driver_that_is_too_old_is_refused_with_the_reason(too_old: Path) -> None:
    with pytest.raises(StartupError, match=r"has an NVIDIA GPU \(/dev/nvidia0\) that torch cannot use.*is too old"):
        resolve_device("auto", 0, 1, too_old)
    assert resolve_device("cpu", 0, 1, too_old) == "cpu"


def test_a_gpu_that_was_asked_for_and_that_torch_cannot_use_is_refused_with_the_reason(too_old: Path) -> None:
    with pytest.raises(StartupError, match=r"^2 GPUs are needed, found none: torch .*driver.* is too old") as refused:
        resolve_device("cuda", 0, 2, too_old)
    assert "lower --dp" not in str(refused.value)


def test_a_torch_for_cpus_on_a_host_with_a_gpu_is_refused(too_old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(StartupError, match="built for CPUs only"):
        resolve_device("auto", 0, 1, too_old)


@pytest.mark.parametrize("value", ["", "-1"])
def test_gpus_that_the_operator_hides_are_none(too_old: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert resolve_device("auto", 0, 1, too_old) == "cpu"


def test_an_amd_gpu_that_torch_cannot_use_is_refused(gpus: Any, tmp_path: Path) -> None:
    gpus(0)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    with pytest.raises(StartupError, match="an AMD GPU"):
        resolve_device("auto", 0, 1, tmp_path)


def test_a_gpu_computes_in_the_dtype_of_the_checkpoint() -> None:
    assert resolve_dtype("auto", "float16", "cuda:3") == "float16"
    assert resolve_dtype("float32", "bfloat16", "cuda:3") == "float32"
    assert resolve_dtype("auto", "float16", "cpu") == "float32"


@pytest.mark.parametrize(("tf32", "says", "precision"), [(False, "--tf32", "highest"), (True, "in TF32", "high")])
def test_the_log_says_how_float32_is_multiplied(tf32: bool, says: str, precision: str) -> None:
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        assert says in choose_precision("float32", tf32=tf32)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is tf32, "convolutions say otherwise than products"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
    assert choose_precision("bfloat16", tf32=True) == "computing in bfloat16"


def test_bfloat16_by_detours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation)
    warning = devices.slow_dtype("bfloat16")
    assert warning is not None and "--dtype float16" in warning
    assert devices.slow_dtype("float16") is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)
    assert devices.slow_dtype("bfloat16") is None


def test_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "LEAST_SHARED", 1)
    assert devices.little_shared_memory(tmp_path) is None
    monkeypatch.setattr(devices, "LEAST_SHARED", 1 << 62)
    assert "NCCL" in (devices.little_shared_memory(tmp_path) or "")


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError(),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory, says a file's name"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:40])
def test_every_way_to_say_that_memory_is_short_is_understood(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[:40])
def test_other_errors_do_not_split_batches(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.fixture
def no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of a device that is not there, which runs a forward where it is called."""
    lane = SimpleNamespace(run=lambda forward, write: forward())
    monkeypatch.setattr("encode_server.engine.rank.Lane", lambda device: lane)


class FailingEncoder:
    """Raises, with an activation in a layer's variables."""

    info = SimpleNamespace(device="cuda:0")

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.activation: weakref.ref[torch.Tensor] | None = None

    def forward(self, modality: Modality, items: list[Any]) -> list[torch.Tensor]:
        activation = torch.ones(3)
        self.activation = weakref.ref(activation)
        raise self._error


@pytest.mark.usefixtures("no_lane")
@pytest.mark.parametrize("error", [*MEMORY[:3], OTHER[2]], ids=lambda error: str(error)[:30])
def test_memory_is_given_back_when_nothing_holds_the_activations(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FailingEncoder(error)
    held: list[Any] = []
    monkeypatch.setattr(devices, "recover", lambda device: held.append(encoder.activation and encoder.activation()))
    worker = Worker(cast(Any, encoder), cast(Any, None), 0)
    done = worker.forward(m.Forward(7, Modality.IMAGE, ()))
    assert isinstance(done, m.Done) and done.seq == 7 and done.error
    assert done.out_of_memory is is_out_of_memory(error)
    assert held == [None]


@pytest.mark.usefixtures("no_lane")
def test_a_broken_context_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def recover(device: str) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(devices, "recover", recover)
    worker = Worker(cast(Any, FailingEncoder(RuntimeError("CUDA error"))), cast(Any, None), 0)
    failed = worker.forward(m.Forward(1, Modality.IMAGE, ()))
    assert isinstance(failed, m.Failed) and "illegal memory access" in failed.message


def test_a_rank_says_now_and_then_what_is_used_of_its_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(rank, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(rank, "Lane", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 10)

    def worker(device: str) -> Worker:
        return Worker(cast(Any, SimpleNamespace(info=SimpleNamespace(device=device))), cast(Any, None), 0)

    gpu, cpu = worker("cuda:1"), worker("cpu")
    said = m.DeviceMemory(used=50, reserved=20, peak=10, total=80)
    assert gpu.memory() == said and gpu.memory() is None and cpu.memory() is None
    clock[0] += rank.MEMORY_S
    assert gpu.memory() == said

    def broken(device: object) -> tuple[int, int]:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", broken)
    clock[0] += rank.MEMORY_S
    assert gpu.memory() is None
