"""What is known of a checkpoint before its encoder is loaded."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from encode_server.wire.modality import Modality


class Route(StrEnum):
    """How a modality's media become rows: through the model's features method, or through the model's own forward, as
    far as the language model."""

    FEATURES = "features"
    FORWARD = "forward"


class Batching(StrEnum):
    """Which items may share a call, the best first: all, padded to the largest; all, their images laid side by side in
    one row; those of equal shapes; those of equal shapes, positions in them shifted; none."""

    PADDED = "padded"
    ROW = "row"
    EQUAL = "equal"
    SHIFTED = "shifted"
    ALONE = "alone"


class Proof(StrEnum):
    """What a modality's rows were compared with when the checkpoint was inspected: what the language model receives in
    the model's own forward, or only the number of placeholders."""

    RECEIVED = "received"
    COUNTED = "counted"


class ModalityFacts(msgspec.Struct, frozen=True):
    """What was found out about one modality of a checkpoint that is loaded by the generic path. `dim`: width of a row.
    `token`: the placeholder's number. `padded`: tensors that `Batching.PADDED` may pad."""

    dim: int
    token: int
    route: Route
    batching: Batching
    proof: Proof
    padded: list[str] = []


class Facts(msgspec.Struct, frozen=True):
    """What was found out about a checkpoint by running it.

    `refused`: why a modality that the model has is not offered. `whole`: classes of modules that tensor parallelism
    must not cut, though they look as if it could. `undivided`: those whose heads the number of ranks does not divide.
    `speedups`: names of the changes for speed that leave the rows alone. `left_out`: names of modules that encode
    nothing, which ranks don't load.
    """

    modalities: dict[Modality, ModalityFacts]
    refused: dict[Modality, str] = {}
    whole: list[str] = []
    undivided: list[str] = []
    speedups: list[str] = []
    left_out: list[str] = []


class Inspection(msgspec.Struct, frozen=True):
    """A checkpoint on this machine that this server can encode with.

    `path`: its directory. `name`: as the operator gave it. `revision`: the commit of a hub checkpoint, empty for a
    directory. `model_type`: the architecture's name in config.json. `modalities`: sorted by name. `dtype`: of the
    checkpoint's weights, in torch's name (`bfloat16`). `probes`: for each modality, tiny valid media (an encoded file).
    `preload`: modules to import before ranks and preparers are forked, so that these load quickly. `facts`: for the
    ranks, where the checkpoint's family has no rules of its own. `notes`: what the operator should know, a line each.
    """

    path: str
    name: str
    revision: str
    model_type: str
    modalities: list[Modality]
    dtype: str
    probes: dict[Modality, bytes]
    preload: list[str]
    facts: Facts | None = None
    notes: list[str] = []
