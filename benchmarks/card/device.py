"""An emulated, asynchronous CUDA device.

Tensors say `cuda:0`. Their shapes are what torch's own rules give (FakeTensor); their values, where wanted, are
computed on the CPU, but only when somebody waits for the stream they were queued on. So a program that forgets to wait
finds nothing yet, and a program that gives memory back too early has it read or written late.

What the emulation cannot show: the kernels themselves (alignment, widths of heads), cuBLAS, cuDNN, NCCL, the driver,
the allocator, and time.
"""

from __future__ import annotations

import threading
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks.card.kernels import execute
from benchmarks.card.ledger import Attention, Kind, Launch, Ledger, Wait, launched, place, product_flops, unique_bytes
from benchmarks.card.streams import Event, Stream, Streams

aten = torch.ops.aten

SMALL = 1 << 20  # bytes: of integers of at most so many, counting keeps the values, to know what attention attends over


class HostWouldWait(Exception):
    """While only counting: a value was asked for that only computing would give."""


def on_device(value: Any) -> bool:
    """Whether `value` is a tensor of the emulated device."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


class _ReadScalars(TorchFunctionMode):
    """`torch.tensor` reads scalars of the device in C++, past every dispatch mode: here before, a wait for each.

    A replaced `torch.tensor` would no longer be the one that `with torch.device(…)` knows.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and args and isinstance(args[0], list) and any(map(on_device, args[0])):
            args = ([value.item() if on_device(value) else value for value in args[0]], *args[1:])
        return func(*args, **kwargs or {})


class EmulatedDevice(TorchDispatchMode):
    """Intercepts every operator of the threads that entered it.

    `values`: compute, rather than only count. `ledger`: what was asked for. `on_launch`: called with every launch
    before it is queued; may raise, as a device without memory does.
    """

    def __init__(self, *, values: bool) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.streams = Streams()
        self.on_launch: Callable[[Launch], None] = lambda launch: None
        self.pinned: list[range] = []
        self._values = values
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._lock = threading.RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._lock:
            return self._dispatch(func, args, kwargs or {})

    def wait(self, why: str) -> None:
        """The host waits for the current stream."""
        self.ledger.waits.append(Wait(why, place()))
        self.streams.current().synchronize()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `Tensor.pin_memory`."""
        pinned = tensor.clone()
        pinned._emulated_pinned = True  # type: ignore[attr-defined]
        return pinned

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        flat = tree_flatten((args, kwargs))[0]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        if not to_device and not any(map(on_device, flat)):
            return func(*args, **kwargs)
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if composite and not kernel:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
            self.wait(str(func))
            return self._computed(func, args, kwargs)
        if func is aten._to_copy.default:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device).type
            if target != source.device.type:
                return self._to_device(source, kwargs) if target == "cuda" else self._to_host(source, kwargs)
        if func is aten.copy_.default and on_device(args[0]) != on_device(args[1]):
            return self._copy_between(args, kwargs)
        return self._kernel(func, args, kwargs)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self._values:
            raise HostWouldWait(str(func))
        with _disable_current_modes():
            return execute(func, *_real(args, kwargs))

    def _kernel(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except DynamicOutputShapeException:
            self.wait(str(func))
            return tree_map(self._known, self._computed(func, args, kwargs))
        changes = func._schema.is_mutable
        is_view = any(value.alias_info is not None for value in func._schema.returns) and not changes
        inputs = [value for value in tree_flatten((args, kwargs))[0] if on_device(value)]
        outputs = [value for value in tree_flatten(out)[0] if isinstance(value, FakeTensor)]
        name = str(func).replace("aten.", "")
        if not is_view and launched(name):
            self._note(self._launch(name, args, inputs, outputs, func._schema))
        cells = {id(value): value._cell for value in inputs if hasattr(value, "_cell")}
        if changes:
            self._queue(lambda: self._compute(func, args, kwargs, cells))
            return out if not outputs else kwargs.get("out", args[0])
        return self._filled(out, lambda: self._compute(func, args, kwargs, cells))

    def _known(self, value: Any) -> Any:
        """A tensor of the device whose value, a CPU tensor, is known already."""
        if not isinstance(value, torch.Tensor):
            return value
        with self._fake:
            out: Any = torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
        out._cell = [value]
        return out

    def _launch(self, name: str, args: Any, inputs: Any, outputs: Any, schema: Any) -> Launch:
        first = outputs[0] if outputs else None
        written = unique_bytes(outputs)
        if not outputs:  # an operator that only changes what it is given
            written = unique_bytes(
                [
                    value
                    for value, argument in zip(args, schema.arguments, strict=False)
                    if argument.is_write and on_device(value)
                ]
            )
        attention = None
        if name.startswith("_flash_attention_forward"):
            attention = Attention(self._segments(args), args[0].shape[1], args[0].shape[2])
        elif name.startswith("_scaled_dot_product_flash_attention"):
            attention = Attention((args[0].shape[2],) * args[0].shape[0], args[0].shape[1], args[0].shape[3])
        flops = product_flops(name, args, first)
        if attention is not None:
            flops = 4 * sum(length**2 for length in attention.segments) * attention.heads * attention.width
        shape = tuple(first.shape) if first is not None else ()
        kind = Kind.COLLECTIVE if name.startswith("c10d.") else Kind.KERNEL
        if kind is Kind.COLLECTIVE:
            assert all(value.is_contiguous() for value in inputs), "a collective over memory with gaps"
            shape = tuple(inputs[0].shape)
        return Launch(name, kind, place(), unique_bytes(inputs), written, flops, attention, shape=shape)

    def _segments(self, args: Any) -> tuple[int, ...]:
        cell = getattr(args[3], "_cell", [None])
        if cell[0] is None:
            return (args[0].shape[0],)
        return tuple(cell[0].diff().tolist()) if not self._values else ()

    def _compute(self, func: Any, args: Any, kwargs: Any, cells: Any) -> Any:
        def real(value: Any) -> Any:
            if not on_device(value):
                return value
            found = cells[id(value)][0]
            assert found is not None, f"{func} reads what another stream has not computed yet"
            return found

        args, kwargs = tree_map(real, args), tree_map(real, kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with _disable_current_modes():
            return execute(func, args, kwargs)

    def _filled(self, out: Any, compute: Callable[[], Any]) -> Any:
        if not self._values:
            return out
        cells = []
        for value in tree_flatten(out)[0]:
            if isinstance(value, FakeTensor):
                if not hasattr(value, "_cell"):
                    value._cell = [None]
                cells.append(value._cell)

        def run() -> None:
            found = [value for value in tree_flatten(compute())[0] if isinstance(value, torch.Tensor)]
            for cell, value in zip(cells, found, strict=False):
                cell[0] = value

        self._queue(run)
        return out

    def _queue(self, task: Callable[[], None]) -> None:
        if self._values:
            self.streams.current().queue(task)

    def _note(self, launch: Launch) -> None:
        self.on_launch(launch)
        self.ledger.launches.append(launch)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return getattr(tensor, "_emulated_pinned", False) or any(tensor.data_ptr() in place for place in self.pinned)

    def _to_device(self, source: torch.Tensor, kwargs: Any) -> Any:
        with self._fake:
            out: Any = aten._to_copy.default(source, **kwargs)
        self._note(Launch("to_device", Kind.TO_DEVICE, place(), 0, unique_bytes([out]), pinned=self._is_pinned(source)))
        if not kwargs.get("non_blocking", False):
            self.wait("a blocking copy to the device")
        options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
        cell = out._cell = [None]

        def run() -> None:
            with _disable_current_modes():
                cell[0] = aten._to_copy.default(source, **options)

        if self._values and kwargs.get("non_blocking", False):
            self._queue(run)
        elif self._values or (source.nbytes <= SMALL and not source.is_floating_point()):
            run()
        return out

    def _to_host(self, source: Any, kwargs: Any) -> torch.Tensor:
        self._note(Launch("to_host", Kind.TO_HOST, place(), unique_bytes([source])))
        self.wait("a copy to the host")
        dtype = kwargs.get("dtype") or source.dtype
        return torch.empty(source.shape, dtype=dtype) if not self._values else source._cell[0].to(dtype, copy=True)

    def _copy_between(self, args: Any, kwargs: Any) -> Any:
        into, source = args[:2]
        if on_device(into):
            raise NotImplementedError("copy_ from the host into a tensor of the device")
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        self._note(Launch("to_host", Kind.TO_HOST, place(), unique_bytes([source]), pinned=self._is_pinned(into)))
        cell = getattr(source, "_cell", [None])

        def run() -> None:
            assert cell[0] is not None, "a copy to the host reads what another stream has not computed yet"
            with _disable_current_modes():
                into.copy_(cell[0])

        self._queue(run)
        if blocking:
            self.wait("a blocking copy to the host")
        return into


def _real(args: Any, kwargs: Any) -> tuple[Any, Any]:
    def real(value: Any) -> Any:
        return value._cell[0] if on_device(value) else value

    return tree_map(real, args), tree_map(real, kwargs)


@contextmanager
def emulated(*, values: bool = True, capability: tuple[int, int] = (9, 0)) -> Iterator[EmulatedDevice]:
    """An emulated device for this thread. Other threads that use the device have to enter the yielded mode too.

    Only one emulation may exist at a time: parts of torch.cuda are replaced meanwhile.
    """
    device = EmulatedDevice(values=values)
    streams = device.streams

    def register(address: int, size: int, _flags: int) -> int:
        device.pinned.append(range(address, address + size))
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)
    replaced: dict[str, Any] = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.get_device_capability": lambda device=None: capability,
        "torch.cuda.current_stream": streams.current,
        "torch.cuda.set_stream": streams.make_current,
        "torch.cuda.stream": streams.using,
        "torch.cuda.synchronize": streams.synchronize,
        "torch.cuda.Stream": streams.new,
        "torch.cuda.Event": Event,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.memory_reserved": lambda device=None: 0,
        "torch.accelerator.synchronize": streams.synchronize,
        "torch.accelerator.empty_cache": lambda: None,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.cudart": lambda: runtime,
        "torch.cuda.check_error": lambda code: None,
        "torch.Tensor.pin_memory": lambda tensor: device.pin(tensor),
    }
    if not values:  # then no kernel's values can be checked
        replaced["encode_server.models.attention.flash_works"] = lambda device: True
    torch._C._set_only_lift_cpu_tensors(True)
    with ExitStack() as stack:
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        for name, replacement in replaced.items():
            stack.enter_context(unittest.mock.patch(name, replacement))
        stack.enter_context(_ReadScalars())
        stack.enter_context(device)
        yield device


__all__ = ["EmulatedDevice", "Event", "HostWouldWait", "Stream", "emulated", "on_device"]
