"""What SGLang does on the other side: its two classes, and an unpickler that lets pass what its own lets pass."""

from __future__ import annotations

import enum
import io
import pickle

import torch

RECEIVER = "sglang.srt.disaggregation.encoder.receiver"
MODALITY = "sglang.srt.multimodal.modality"


class EmbeddingData:
    pass


class Modality(enum.Enum):
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


def _storage(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=True)


class SafeUnpickler(pickle.Unpickler):
    """Only these globals, of SGLang's longer list; every other one is an error, as it is there."""

    def __init__(self, data: bytes, receiver: str = RECEIVER, modality: str = MODALITY) -> None:
        super().__init__(io.BytesIO(data))
        self.seen: set[tuple[str, str]] = set()
        self._classes = {
            (receiver, "EmbeddingData"): EmbeddingData,
            (modality, "Modality"): Modality,
            ("torch.storage", "_load_from_bytes"): _storage,
        }

    def find_class(self, module: str, name: str):
        self.seen.add((module, name))
        if (module, name) in self._classes:
            return self._classes[module, name]
        if (module, name) in {
            ("torch._utils", "_rebuild_tensor_v2"),
            ("collections", "OrderedDict"),
            ("torch", "float32"),
            ("torch", "bfloat16"),
            ("torch", "float16"),
        }:
            return super().find_class(module, name)
        raise RuntimeError(f"blocked: {module}.{name}")


def read(frames: list[bytes], receiver: str = RECEIVER, modality: str = MODALITY) -> EmbeddingData:
    """A message as SGLang's receiver takes it, its tensor put together from frame 1."""
    data = SafeUnpickler(frames[0], receiver, modality).load()
    if data.error_msg is None and len(frames) > 1:  # by Mooncake the values come another way
        data.embedding = torch.frombuffer(bytearray(frames[1]), dtype=data.dtype).reshape(data.shape)
    return data
