"""Every message between the front and a preparer: msgspec structs, msgpack on the wire.

A job is one media item. Its media bytes follow `Prepare` in a second frame; its tensors never cross the link: the
preparer keeps them until `Place` says where in the arena they go.
"""

from __future__ import annotations

import msgspec

from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality

Extra = dict[str, float | int | list[float]]
"""What an engine wants beside the embedding (`video_timestamps`, `second_per_grid_ts`, `mel_frames`, …)."""


class TensorPart(msgspec.Struct, frozen=True):
    """A contiguous tensor of an item: `dtype` is torch's name, `offset` bytes from the start of the item's room."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class PreparedPiece(msgspec.Struct, frozen=True):
    """An item, or a part of a large item that can be encoded apart. `tokens`, `cost` and `pairs`: see
    `models.prepared.Prepared`."""

    tensors: tuple[TensorPart, ...]
    tokens: int
    cost: int
    pairs: int


class PreparedItem(msgspec.Struct, frozen=True):
    """What preprocessing made of one item. `nbytes`: the room its tensors take in the arena."""

    pieces: tuple[PreparedPiece, ...]
    nbytes: int
    grid_thw: tuple[int, int, int] | None
    extra: Extra

    @property
    def tokens(self) -> int:
        """Rows of the embedding."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def cost(self) -> int:
        """Patches or mel frames."""
        return sum(piece.cost for piece in self.pieces)


# Commands, front to preparer.


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Decode and preprocess one item; cut an item that costs more than `max_cost` into pieces where the architecture
    allows. `express`: on the thread that is kept for health probes."""

    job: int
    modality: Modality
    options: ItemOptions
    max_cost: int
    express: bool = False


class Place(msgspec.Struct, frozen=True, tag="place"):
    """Copy the job's tensors into the arena, beginning at byte `offset`, and forget them."""

    job: int
    offset: int


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """Nobody wants the job any more."""

    job: int


class Pickle(msgspec.Struct, frozen=True, tag="pickle"):
    """Make the pickle programs of torch objects that SGLang's header holds; see `prepare.torch_pickles`."""

    job: int
    dtype: str
    grid: list[list[int]] | None
    seconds: list[float] | None


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Exit with status 0."""


# Events, preparer to front.


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The processors are loaded."""


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """The job's decode waits for memory that other jobs hold. `Began` follows."""

    job: int


class Began(msgspec.Struct, frozen=True, tag="began"):
    """The decode of a job that waited for memory begins: its time counts from now."""

    job: int


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """The job's tensors exist. `decode_s`, `preprocess_s`: processor time."""

    job: int
    item: PreparedItem
    decode_s: float
    preprocess_s: float


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """The job's tensors are in the arena. `copy_s`: processor time."""

    job: int
    copy_s: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The job ended in an error that its caller is told. `code`: see `errors.by_code`. `out_of_memory`: the process had
    no memory left; another job of the same process may have taken the memory."""

    job: int
    code: str
    message: str
    out_of_memory: bool = False


class Pickled(msgspec.Struct, frozen=True, tag="pickled"):
    """The programs of a `Pickle`, each None where nothing was given."""

    job: int
    dtype: bytes
    grid: bytes | None
    seconds: bytes | None


class Warned(msgspec.Struct, frozen=True, tag="warned"):
    """Something that the operator should know. `message` is one line."""

    message: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The preparer cannot load or go on, and exits. `message` is one line for the operator."""

    message: str


Command = Prepare | Place | Drop | Pickle | Shutdown
Event = Ready | Waiting | Began | Prepared | Placed | Refused | Pickled | Warned | Failed


class PreparerSetup(msgspec.Struct, frozen=True):
    """What a preparer is started with. `threads`: of its pool. `memory_bytes`: what it may take beyond what it starts
    with. The descriptor of the arena, of `arena_bytes`, is handed over with the fork. `device`: `--preproc-device`.
    `index`: of the preparer, counted from 0."""

    socket: str
    path: str
    name: str
    limits: msgspec.Raw
    max_item_tokens: int
    threads: int
    memory_bytes: int
    arena_bytes: int
    device: str = "cpu"
    index: int = 0


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
