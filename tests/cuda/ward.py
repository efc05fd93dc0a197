"""A real `Worker` with a real arena's memory over the emulated device, and the checks that a test makes of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from encode_server.engine.rank import TensorStore, Worker
from encode_server.media.limits import MediaLimits
from encode_server.models.encoder import DTYPES, load_encoder
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.wire import ranks as m
from encode_server.wire.layout import aligned
from encode_server.wire.modality import Modality
from tests.models import samples

ARENA = 8 << 20
SOILED = 0xAB  # what a slot's next owner writes

MEDIA: Mapping[Modality, list[bytes]] = {
    Modality.IMAGE: [samples.png(300, 420), samples.png(97, 233, seed=1)],
    Modality.VIDEO: [samples.clip(4, 90, 150)],
    Modality.AUDIO: [samples.wav(1.9), samples.wav(0.2, seed=1)],
}

Item = dict[str, torch.Tensor]
Items = list[Item]


def batches(path: Path) -> dict[Modality, Items]:
    """Prepared media of every modality that the checkpoint has."""
    preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
    return {
        modality: [dict(preprocessor.prepare(modality, data).tensors) for data in MEDIA[modality]]
        for modality in preprocessor.modalities
    }


def on_a_cpu(path: Path, modality: Modality, items: Items) -> list[torch.Tensor]:
    """The same batch's embeddings in float32 on a CPU."""
    return load_encoder(str(path), device="cpu", dtype="float32").forward(modality, items)


def relative_error(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, of all items together."""
    pairs = list(zip(got, want, strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    off = torch.cat([(one.float() - other.float()).flatten() for one, other in pairs]).norm()
    return float(off / torch.cat([other.float().flatten() for _, other in pairs]).norm())


class Ward:
    """An arena and a worker of this rank; commands are placed as the front places them."""

    def __init__(self, path: Path, dtype: str = "bfloat16", *, rank: int = 0, world: int = 1) -> None:
        self._fd = os.memfd_create("arena")
        os.ftruncate(self._fd, ARENA)
        self.memory = mmap.mmap(self._fd, ARENA)
        self._store = TensorStore(self._fd, ARENA)
        self._store.pin()
        encoder = load_encoder(str(path), device="cuda:0", dtype=dtype, rank=rank, world=world)
        self.worker = Worker(encoder, self._store, rank)
        self._dtype = dtype
        self._end = 0

    def place(self, seq: int, modality: Modality, items: Items, tokens: Sequence[int]) -> m.Forward:
        """Copies the items into the arena, with room for an embedding of so many `tokens` behind each."""
        refs = []
        for item, rows in zip(items, tokens, strict=True):
            inputs = tuple(self._input(name, tensor) for name, tensor in item.items())
            shape = (rows, self.worker.info.dims[modality])
            offset = self._take(rows * shape[1] * DTYPES[self._dtype].itemsize)
            refs.append(m.ItemRef(inputs, m.TensorRef("embedding", self._dtype, shape, offset), shape[0]))
        return m.Forward(seq, modality, tuple(refs))

    def embeddings(self, command: m.Forward) -> list[torch.Tensor]:
        """Copies of what the ranks have written for `command`."""
        return [self._store.tensor(item.output).clone() for item in command.items]

    def release(self, command: m.Forward) -> None:
        """The slots of `command` get a new owner, who writes all over them."""
        for item in command.items:
            for ref in (*item.inputs, item.output):
                tensor = self._store.tensor(ref)
                self.memory[ref.offset : ref.offset + tensor.nbytes] = bytes([SOILED]) * tensor.nbytes

    def is_soiled(self, command: m.Forward) -> bool:
        """Whether the slots of `command` still hold what their new owner wrote."""
        return all(
            self.memory[ref.offset : ref.offset + (size := self._store.tensor(ref).nbytes)] == bytes([SOILED]) * size
            for item in command.items
            for ref in (*item.inputs, item.output)
        )

    def _input(self, name: str, tensor: torch.Tensor) -> m.TensorRef:
        dtype = str(tensor.dtype).removeprefix("torch.")
        ref = m.TensorRef(name, dtype, tuple(tensor.shape), self._take(tensor.nbytes))
        self._store.tensor(ref).copy_(tensor)
        return ref

    def _take(self, size: int) -> int:
        offset, self._end = self._end, self._end + aligned(size)
        assert self._end <= ARENA
        return offset
