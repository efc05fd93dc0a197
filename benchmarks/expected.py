"""What every embedding of a chaos run must be: computed once, in this process, by the encoder without a service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_safetensors

from encode_server.bench.report import Result
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import UniqueMedia
from encode_server.models.encoder import load_encoder
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import open_directory

TOLERANCE = 1e-4


class Expected:
    """Embeddings by content, float32 [tokens, dim]."""

    def __init__(self, checkpoint: Path) -> None:
        self._encoder = load_encoder(str(checkpoint), device="cpu", dtype="float32")
        self._preprocessor = Preprocessor(open_directory(checkpoint), MediaLimits())
        self._embeddings: dict[str, npt.NDArray[np.float32]] = {}

    def learn(self, key: str, medium: UniqueMedia) -> None:
        """Encode a medium, whose copies all mean the same, under the key its requests will have."""
        prepared = self._preprocessor.prepare(medium.modality, medium.copy())
        (embedding,) = self._encoder.forward(medium.modality, [prepared.tensors])
        self._embeddings[key] = embedding.numpy()

    def right(self, result: Result) -> bool:
        """Whether a good answer holds the embedding of what its request sent."""
        got = load_safetensors(result.response.body)["embedding"]
        want = self._embeddings[result.request.key]
        return got.shape == want.shape and float(np.abs(got - want).max()) <= TOLERANCE
