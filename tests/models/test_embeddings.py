"""Embeddings equal those of transformers on the same checkpoint: alone, and in a batch with others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from encode_server.media.limits import MediaLimits
from encode_server.models.encoder import Encoder, load_encoder
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.models import samples
from tests.models.reference import Reference, video_inputs

TOLERANCE = 1e-4
SEEING = ["qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_wide", "qwen3_vl", "qwen2_5_omni_thinker"]
STILL = ["siglip", "siglip_vision_model", "siglip2", "clip", "clip_vision_model", "metaclip_2", "dinov2"]
HEARING = ["qwen2_5_omni_thinker", "qwen2_audio", "whisper"]
SIZES = [(300, 420), (32, 32), (97, 333), (250, 250)]
"""Height, width: above and below one 112 px window, and no multiple of a window or patch."""


class Subject:
    """One checkpoint as this server runs it, and as transformers does."""

    def __init__(self, checkpoints: Checkpoints, name: str) -> None:
        path = checkpoints.path(name)
        self.path = path
        self.preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
        self.encoder: Encoder = load_encoder(str(path), device="cpu", dtype="float32", rank=0, world=1)
        self.reference = Reference(path, name)

    def check(self, modality: Modality, media: list[bytes], expected: list[torch.Tensor]) -> None:
        """`media` in one batch, and each alone, give `expected`, in the shape that was promised beforehand."""
        prepared = [self.preprocessor.prepare(modality, data) for data in media]
        batch = self.encoder.forward(modality, [item.tensors for item in prepared])
        alone = [self.encoder.forward(modality, [item.tensors])[0] for item in prepared]
        for want, one, together, item in zip(expected, alone, batch, prepared, strict=True):
            assert want.std() > 0.1, "the embedding is too flat to show an error"
            assert together.shape == one.shape == want.shape == (item.tokens, self.encoder.info.dims[modality])
            torch.testing.assert_close(one, want, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(together, want, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def subjects(checkpoints: Checkpoints) -> Iterator[dict[str, Subject]]:
    class Loading(dict[str, Subject]):
        def __missing__(self, name: str) -> Subject:
            self[name] = Subject(checkpoints, name)
            return self[name]

    yield Loading()


@pytest.mark.parametrize("name", SEEING + STILL)
def test_images(subjects: dict[str, Subject], name: str) -> None:
    subject = subjects[name]
    media = [samples.png(*size, seed=seed) for seed, size in enumerate(SIZES)]
    expected = [subject.reference.image(samples.pixels(*size, seed)) for seed, size in enumerate(SIZES)]
    subject.check(Modality.IMAGE, media, expected)


@pytest.mark.parametrize("name", SEEING)
def test_videos(subjects: dict[str, Subject], name: str) -> None:
    subject = subjects[name]
    clips = [samples.clip(7, 90, 150), samples.clip(4, 230, 130, seed=1)]
    expected = [subject.reference.video(video_inputs(subject.path, clip)) for clip in clips]
    subject.check(Modality.VIDEO, clips, expected)


@pytest.mark.parametrize("name", HEARING)
def test_sounds(subjects: dict[str, Subject], name: str) -> None:
    """Chunk borders of the Omni tower are at 0.4 s; the others pad or cut at 4 s."""
    subject = subjects[name]
    seconds = [1.93, 0.21, 0.8, 3.3]
    media = [samples.wav(length, seed) for seed, length in enumerate(seconds)]
    expected = [subject.reference.audio(samples.samples(length, seed)) for seed, length in enumerate(seconds)]
    subject.check(Modality.AUDIO, media, expected)


def test_sounds_whose_ends_the_convolutions_and_the_pooling_see_differently(subjects: dict[str, Subject]) -> None:
    """Even and odd counts of mel frames, the shortest, and up to the end of the 4 s window."""
    subject = subjects["qwen2_audio"]
    seconds = [0.1, 0.11, 1.23, 1.24, 1.25, 3.97, 3.98, 3.99, 4.0]
    media = [samples.wav(length, seed) for seed, length in enumerate(seconds)]
    expected = [subject.reference.audio(samples.samples(length, seed)) for seed, length in enumerate(seconds)]
    subject.check(Modality.AUDIO, media, expected)


def test_long_sound_is_cut_where_the_extractor_cuts(subjects: dict[str, Subject]) -> None:
    subject = subjects["qwen2_audio"]
    subject.check(Modality.AUDIO, [samples.wav(5.0)], [subject.reference.audio(samples.samples(5.0))])


def test_a_whole_omni_checkpoint_gives_its_thinkers_embeddings(
    subjects: dict[str, Subject], checkpoints: Checkpoints
) -> None:
    thinker = subjects["qwen2_5_omni_thinker"]
    whole = load_encoder(str(checkpoints.path("qwen2_5_omni")), device="cpu", dtype="float32", rank=0, world=1)
    for modality, data in ((Modality.IMAGE, samples.png(120, 150)), (Modality.AUDIO, samples.wav(0.9))):
        item = thinker.preprocessor.prepare(modality, data).tensors
        torch.testing.assert_close(whole.forward(modality, [item]), thinker.encoder.forward(modality, [item]))


def test_windows_matter_in_these_samples(subjects: dict[str, Subject]) -> None:
    """Were full attention used everywhere, the comparison above would notice: the embeddings differ visibly."""
    reference = Reference(subjects["qwen2_5_vl"].path, "qwen2_5_vl")
    picture = samples.pixels(*SIZES[0])
    windowed = reference.image(picture)
    tower = reference.model.model.visual
    tower.fullatt_block_indexes = list(range(len(tower.blocks)))
    assert (reference.image(picture) - windowed).abs().max() > 0.01


@pytest.mark.parametrize("name", SEEING + STILL + HEARING)
def test_probes_give_finite_embeddings(subjects: dict[str, Subject], name: str) -> None:
    subject = subjects[name]
    for modality in subject.preprocessor.modalities:
        prepared = subject.preprocessor.prepare(modality, subject.preprocessor.probe(modality), ItemOptions())
        [embedding] = subject.encoder.forward(modality, [prepared.tensors])
        assert prepared.tokens >= 1
        assert embedding.shape == (prepared.tokens, subject.encoder.info.dims[modality])
        assert embedding.isfinite().all()


def test_reading_inputs_leaves_them_unchanged(subjects: dict[str, Subject]) -> None:
    subject = subjects["qwen2_5_omni_thinker"]
    media = {Modality.IMAGE: samples.png(100, 80), Modality.AUDIO: samples.wav(0.5)}
    for modality, data in media.items():
        item = subject.preprocessor.prepare(modality, data).tensors
        before = {name: tensor.clone() for name, tensor in item.items()}
        subject.encoder.forward(modality, [item])
        assert all(torch.equal(item[name], before[name]) for name in before)
