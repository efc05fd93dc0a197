"""What is known of a checkpoint before its encoder is loaded."""

from __future__ import annotations

import msgspec

from encode_server.wire.modality import Modality


class Inspection(msgspec.Struct, frozen=True):
    """A checkpoint on this machine that this server can encode with.

    `path`: its directory. `name`: as the operator gave it. `revision`: the commit of a hub checkpoint, empty for a
    directory. `model_type`: the architecture's name in config.json. `modalities`: sorted by name. `dtype`: of the
    checkpoint's weights, in torch's name (`bfloat16`). `probes`: for each modality, tiny valid media (an encoded file).
    `preload`: modules to import before ranks and preparers are forked, so that these load quickly.
    """

    path: str
    name: str
    revision: str
    model_type: str
    modalities: list[Modality]
    dtype: str
    probes: dict[Modality, bytes]
    preload: list[str]
