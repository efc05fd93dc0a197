"""One vector for an image: what `get_image_features` of transformers, or its tower's pooler output, gives."""

from __future__ import annotations

import pytest
import torch
import transformers

from encode_server.media.limits import MediaLimits
from encode_server.models.encoder import load_encoder
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool
from tests.checkpoints import Checkpoints
from tests.models import samples
from tests.models.reference import image_inputs

IMAGE = Modality.IMAGE
SIZES = [(70, 123), (56, 56), (200, 90)]
CLASSES = {
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "metaclip_2": "MetaClip2Model",
    "clip": "CLIPModel",
    "siglip_vision_model": "SiglipVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip_projection": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
}


@torch.inference_mode()
def _expected(path: object, name: str) -> list[torch.Tensor]:
    model = getattr(transformers, CLASSES[name]).from_pretrained(path, dtype=torch.float32).eval()
    vectors = []
    for seed, size in enumerate(SIZES):
        inputs = image_inputs(path, samples.pixels(*size, seed))
        if hasattr(model, "get_image_features"):
            output = model.get_image_features(**inputs)
            vectors.append(getattr(output, "pooler_output", output))
        else:
            output = model(**inputs)
            vectors.append(output.image_embeds if name == "clip_projection" else output.pooler_output)
    return vectors


@pytest.mark.parametrize("name", CLASSES)
def test_the_models_own_vector_equals_transformers(checkpoints: Checkpoints, name: str) -> None:
    path = checkpoints.path(name)
    encoder = load_encoder(str(path), device="cpu", dtype="float32")
    preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
    media = [samples.png(*size, seed=seed) for seed, size in enumerate(SIZES)]
    plain = [preprocessor.prepare(IMAGE, data) for data in media]
    marked = [preprocessor.prepare(IMAGE, data, ItemOptions(pool=Pool.MODEL)) for data in media]
    # Rows and vectors of the same images in one batch.
    mixed = [plain[0].tensors, *[item.tensors for item in marked], plain[1].tensors]
    first, *vectors, last = encoder.forward(IMAGE, mixed)
    for want, vector, item, rows in zip(_expected(path, name), vectors, marked, plain, strict=True):
        assert want.std() > 0.01, "the vector is too flat to show an error"
        assert vector.shape == want.shape == (item.tokens, encoder.info.pooled[IMAGE]) == (1, want.shape[1])
        torch.testing.assert_close(vector, want, atol=1e-4, rtol=1e-5)
        assert item.extra["pooled_tokens"] == rows.tokens
    for rows, item in ((first, plain[0]), (last, plain[1])):
        torch.testing.assert_close(rows, encoder.forward(IMAGE, [item.tensors])[0])
    assert Pool.MODEL in encoder.info.pools(IMAGE)
    assert (Pool.CLS in encoder.info.pools(IMAGE)) == (not name.startswith("siglip"))


def test_a_checkpoint_without_the_head_has_no_vector_of_its_own(checkpoints: Checkpoints) -> None:
    encoder = load_encoder(str(checkpoints.path("siglip_headless")), device="cpu", dtype="float32")
    assert encoder.info.pools(IMAGE) == [Pool.MEAN]
