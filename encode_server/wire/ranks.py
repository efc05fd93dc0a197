"""Every type that crosses between the front and the ranks: msgspec structs, msgpack on the wire.

Commands go from the front to every rank over one PAIR socket per rank, in one order, and each is acknowledged by
every rank. Tensors stay in the shared arena; messages only say where.
"""

from __future__ import annotations

import msgspec

from encode_server.wire.checkpoint import Facts
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool


class TensorRef(msgspec.Struct, frozen=True):
    """A contiguous tensor in the arena: `dtype` is torch's name (`float32`, `uint8`, …), `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class ItemRef(msgspec.Struct, frozen=True):
    """One media item of a batch: its preprocessed tensors, and where its embedding goes ([tokens, dim]). `cost`: its
    patches or mel frames."""

    inputs: tuple[TensorRef, ...]
    output: TensorRef
    cost: int


class EncoderInfo(msgspec.Struct, frozen=True):
    """What a rank loaded: embedding width per modality, dtype of the embeddings, bytes of weights on this rank.

    `pooled`: width of the one vector that the model itself makes for an item, by modality, where it makes one.
    `class_token`: the first row of an item is that of a class token. `at_once`: forwards that the rank
    has in progress; they start in the order sent. `computing`: how many of them are computed concurrently, so that
    `Done.forward_s` is the time of each beside so many others: all of them on a CPU, one on a GPU, where the others are
    queued behind that one (`engine.lane`). `batch_cost`: patches or mel frames of the batches it does
    best with, None for as many as the budget allows.
    """

    model_type: str
    dims: dict[Modality, int]
    dtype: str
    device: str
    weight_bytes: int
    at_once: int = 1
    batch_cost: int | None = None
    pooled: dict[Modality, int] = {}
    class_token: bool = False
    computing: int = 1

    def pools(self, modality: Modality) -> list[Pool]:
        """How items can be pooled."""
        return [Pool.MEAN, *[Pool.CLS] * self.class_token, *[Pool.MODEL] * (modality in self.pooled)]


class RankSetup(msgspec.Struct, frozen=True):
    """What a rank is started with: become rank `rank` of `world` and load the encoder of the checkpoint in `path`.

    `device_index`: which of the host's GPUs is this rank's, of the `devices` that all groups of ranks need. `device`
    and `dtype` may be `auto`; `checkpoint_dtype` is what the checkpoint holds. `tf32`: whether a GPU may multiply
    float32 matrices in TF32. `flash_attention`: version of the kernels on a GPU. `threads`: CPU threads of this rank.
    The descriptors of the arena, of `arena_bytes`, and of torch.distributed's FileStore come with the fork. `facts`:
    what the checkpoint's inspection found.
    """

    socket: str
    path: str
    rank: int
    world: int
    device: str
    dtype: str
    checkpoint_dtype: str
    threads: int
    arena_bytes: int
    facts: Facts | None = None
    device_index: int = 0
    devices: int = 1
    tf32: bool = False
    flash_attention: str = "2"


# Commands, front to rank.


class Forward(msgspec.Struct, frozen=True, tag="forward"):
    """Encode one batch; rank 0 writes each item's embedding to its `output`."""

    seq: int
    modality: Modality
    items: tuple[ItemRef, ...]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Acknowledge immediately: shows that an idle rank still answers."""

    seq: int


class StartProfile(msgspec.Struct, frozen=True, tag="start_profile"):
    """Record what runs, for so many forwards or until `StopProfile`, within the bounds of `engine.profiler`. The trace
    goes to `path` + `rank<N>.json.gz`; until the trace is complete there is a file of that name + `.part`."""

    seq: int
    path: str
    forwards: int | None


class StopProfile(msgspec.Struct, frozen=True, tag="stop_profile"):
    """End the profile that runs, and begin to write its trace."""

    seq: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave the group and exit 0."""


Acknowledged = Forward | Ping | StartProfile | StopProfile
Command = Acknowledged | Shutdown


# Events, rank to front.


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A step of loading, for the operator."""

    rank: int
    step: str


class Warned(msgspec.Struct, frozen=True, tag="warned"):
    """The rank works, and something about it costs time or memory; `message` is one line for the operator."""

    rank: int
    message: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The encoder is loaded."""

    rank: int
    info: EncoderInfo


class DeviceMemory(msgspec.Struct, frozen=True):
    """Bytes of a device. `total`: what the device has. `used`: by all processes on the device. `reserved`: by this
    rank's torch. `peak`: the most that this rank's tensors have held so far."""

    used: int
    reserved: int
    peak: int
    total: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Command `seq` is finished on this rank. `error` is empty on success. `forward_s`: seconds of its forward.
    `memory`: of the rank's device, with some answers; never of a CPU."""

    rank: int
    seq: int
    error: str = ""
    out_of_memory: bool = False
    forward_s: float = 0.0
    memory: DeviceMemory | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank cannot load or go on, and exits. `message` is one line for the operator."""

    rank: int
    message: str


Event = Progress | Warned | Ready | Done | Failed


_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """Raises msgspec.MsgspecError for what is no command."""
    return _command_decoder.decode(data)


def decode_event(data: bytes) -> Event:
    """Raises msgspec.MsgspecError for what is no event."""
    return _event_decoder.decode(data)
