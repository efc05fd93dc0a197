"""Frame 0 of a part as SGLang's receiver reads it: a pickled `EmbeddingData` without its tensor. Written, never read.

SGLang need not be there: the classes go by name. A pickle is a stack program: the instructions here build the object,
and each attribute's pickled value is spliced in. Torch objects are pickled by a process that has torch. Only what
SGLang's `SafeUnpickler` lets pass is used: plain containers, torch tensors and dtypes, two classes.
"""

from __future__ import annotations

import pickle
from typing import Any

from encode_server.delivery.base import Part
from encode_server.errors import EncodeError
from encode_server.wire.embedding import Encoded
from encode_server.wire.modality import Modality
from encode_server.wire.pickles import PROTOCOL, program
from encode_server.wire.preparers import Pickled

SGLANG_TIMEOUT_S = 170.0  # below the 180 s after which SGLang's prefill gives up: there an error answer is worse

MODALITY_VALUES = {Modality.IMAGE: 1, Modality.VIDEO: 2, Modality.AUDIO: 3}


class Program(bytes):
    """The pickle program of a value that another process wrote."""


class SGLangFrames:
    """Writes headers for one release of SGLang: `receiver_module` holds its EmbeddingData, `modality_module` its
    Modality."""

    def __init__(self, receiver_module: str, modality_module: str) -> None:
        self._embedding_data = _global(receiver_module, "EmbeddingData")
        self._modality = _global(modality_module, "Modality")

    def header(self, part: Part, encoded: Encoded, pickled: Pickled) -> bytes:
        """The header of an embedding, whose raw bytes are frame 1. `pickled`: the programs of `torch_values`."""
        values: dict[str, Any] = {"shape": list(encoded.shape), "dtype": Program(pickled.dtype)}
        if pickled.grid is not None:
            values["grid_dim"] = Program(pickled.grid)
        if all("video_timestamps" in item.extra for item in encoded.items):
            values["video_timestamps"] = [item.extra["video_timestamps"] for item in encoded.items]
        if pickled.seconds is not None:
            values["second_per_grid_ts"] = Program(pickled.seconds)
        return self._write(part, **values)

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
        state = b"".join(program(name) + _written(value) + pickle.SETITEM for name, value in attributes.items())
        modality = (
            program("modality")
            + self._modality
            + program(MODALITY_VALUES[part.modality])
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


def torch_values(encoded: Encoded) -> tuple[str, list[list[int]] | None, list[float] | None]:
    """What the header holds as torch objects: the dtype's name; [t, h, w] of each image or video, or the raw mel frames
    of each audio; and, where a model's positions need them, the seconds of one temporal patch of each video."""
    items = encoded.items
    grid: list[list[int]] | None
    if encoded.modality is Modality.AUDIO:
        grid = [[int(item.extra.get("mel_frames", item.info.tokens))] for item in items]  # type: ignore[arg-type]
    else:
        grids = [item.info.grid_thw for item in items]
        grid = [each for each in grids if each is not None]
        grid = grid if len(grid) == len(grids) else None
    seconds = None
    if all("second_per_grid_ts" in item.extra for item in items):
        seconds = [float(item.extra["second_per_grid_ts"]) for item in items]  # type: ignore[arg-type]
    return encoded.dtype, grid, seconds


def _written(value: Any) -> bytes:
    return value if isinstance(value, Program) else program(value)
