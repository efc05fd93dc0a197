"""Frame 0 of a part as SGLang's receiver reads it: a pickled `EmbeddingData` without its tensor. Written, never read.

SGLang need not be there: the classes go by name. A pickle is a program, and one value's leaves that value on the stack,
so the programs of the attributes, which the standard pickler writes, are put between the instructions that make the
object. Only what SGLang's `SafeUnpickler` lets pass is used: plain containers, torch tensors and dtypes, two classes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from encode_server.delivery.base import Part
from encode_server.errors import EncodeError
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.modality import Modality

PROTOCOL = 3  # the last without frames, so that one program can stand inside another
MODALITY_VALUES = {Modality.IMAGE: 1, Modality.VIDEO: 2, Modality.AUDIO: 3}


class SGLangFrames:
    """Writes headers for one release of SGLang: `receiver_module` holds its EmbeddingData, `modality_module` its
    Modality."""

    def __init__(self, receiver_module: str, modality_module: str) -> None:
        self._embedding_data = _global(receiver_module, "EmbeddingData")
        self._modality = _global(modality_module, "Modality")

    def header(self, part: Part, encoded: Encoded) -> bytes:
        """The header of an embedding; its raw bytes are frame 1. Imports torch."""
        import torch

        return self._write(
            part,
            grid_dim=_grid(part.modality, encoded.items),
            dtype=getattr(torch, encoded.dtype),
            shape=list(encoded.shape),
            **_timing(encoded.items),
        )

    def error(self, part: Part, error: EncodeError) -> bytes:
        """The only frame of a part that failed."""
        return self._write(part, error_msg=error.message, error_code=error.status)

    def _write(self, part: Part, **values: Any) -> bytes:
        attributes = {
            "req_id": part.req_id,
            "num_parts": part.num_parts,
            "part_idx": part.part_idx,
            "grid_dim": None,
            "embedding": None,
            "send_time": None,
            "dtype": None,
            "shape": None,
            "error_msg": None,
            "error_code": None,
        } | values
        state = b"".join(_program(name) + _program(value) + pickle.SETITEM for name, value in attributes.items())
        modality = (
            _program("modality")
            + self._modality
            + _program(MODALITY_VALUES[part.modality])
            + pickle.TUPLE1
            + pickle.REDUCE
            + pickle.SETITEM
        )
        return b"".join(
            (
                pickle.PROTO + bytes([PROTOCOL]),
                self._embedding_data + pickle.EMPTY_TUPLE + pickle.NEWOBJ,
                pickle.EMPTY_DICT + state + modality + pickle.BUILD,
                pickle.STOP,
            )
        )


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _program(value: Any) -> bytes:
    """What pushes `value`: its pickle without the head and the stop, and without a memo, whose keys would clash."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, PROTOCOL)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()[2:-1]


def _grid(modality: Modality, items: Sequence[EncodedItem]) -> Any:
    """[t, h, w] of each picture or video; the raw mel frames of each sound."""
    import torch

    if modality is Modality.AUDIO:
        return torch.tensor([item.extra.get("mel_frames", item.info.tokens) for item in items], dtype=torch.int64)
    grids = [item.info.grid_thw for item in items]
    return None if None in grids else torch.tensor(grids, dtype=torch.int64)


def _timing(items: Sequence[EncodedItem]) -> Mapping[str, Any]:
    """Per video, what positions (Qwen2.5) or the prompt (Qwen3) need of its time."""
    import torch

    timing: dict[str, Any] = {}
    if all("video_timestamps" in item.extra for item in items):
        timing["video_timestamps"] = [item.extra["video_timestamps"] for item in items]
    if all("second_per_grid_ts" in item.extra for item in items):
        timing["second_per_grid_ts"] = torch.tensor([item.extra["second_per_grid_ts"] for item in items])
    return timing
