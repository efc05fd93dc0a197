"""What serving a checkpoint would take, found out without loading its weights."""

from __future__ import annotations

import re

from encode_server.errors import EncodeError, StartupError
from encode_server.media.limits import MediaLimits
from encode_server.media.samples import noise, silence, still_clip
from encode_server.models.checkpoint import Checkpoint, stored_tensors, weight_files
from encode_server.models.families import family_of
from encode_server.models.families.base import Family
from encode_server.models.preprocess import Preprocessor
from encode_server.models.quantised import check_unquantised
from encode_server.models.resolve import resolve
from encode_server.models.structure import find_blocks
from encode_server.models.verify import build_empty, check_tensors
from encode_server.wire.modality import Modality

_TPS = (1, 2, 4, 8)
_SIZES = ("448x448", "1024x768", "1920x1080")
_CLIPS = ("640x360x10",)
_AUDIOS = ("10",)


def report(
    model: str,
    revision: str | None,
    sizes: tuple[str, ...] = _SIZES,
    clips: tuple[str, ...] = _CLIPS,
    audios: tuple[str, ...] = _AUDIOS,
) -> str:
    """Lines for a terminal: class, tensors and bytes that would be read, memory per rank, tokens of media.

    `model`, `revision`: as for `resolve.resolve`; a hub checkpoint is fetched as far as serving it needs. `sizes`:
    of images, as `WIDTHxHEIGHT`. `clips`: of videos, 10 frames a second, as `WIDTHxHEIGHTxSECONDS`. `audios`: seconds.

    Raises:
        StartupError: the checkpoint cannot be served (a missing package is named), or a size is no size.
    """
    checkpoint = resolve(model, revision)
    check_unquantised(checkpoint)
    family = family_of(checkpoint)
    check_tensors(family)
    preprocessor = Preprocessor(checkpoint, MediaLimits())
    cls, _ = family.model_class()
    lines = [
        f"model        {checkpoint.name}",
        f"model type   {checkpoint.model_type}",
        f"class        {cls.__name__}",
        f"encodes      {', '.join(sorted(preprocessor.modalities))}",
        *_weights(checkpoint, family),
    ]
    if Modality.IMAGE in preprocessor.modalities:
        lines += [f"tokens       {_tokens(preprocessor, size)} for an image of {size}" for size in sizes]
    if Modality.VIDEO in preprocessor.modalities:
        lines += [f"tokens       {_of_clip(preprocessor, clip)} for a clip of {clip} s" for clip in clips]
    if Modality.AUDIO in preprocessor.modalities:
        lines += [f"tokens       {_of_audio(preprocessor, length)} for {length} s of audio" for length in audios]
    return "\n".join(lines)


def _weights(checkpoint: Checkpoint, family: Family) -> list[str]:
    stored = {key: tensor for file in weight_files(checkpoint) for key, tensor in stored_tensors(file).items()}
    read = checkpoint.encoder_keys(stored)
    size = sum(stored[key].nbytes for key in read)
    total = sum(tensor.nbytes for tensor in stored.values())
    model = build_empty(family)
    parameters = sum(weight.numel() for weight in model.parameters())
    lines = [f"reads        {len(read)} of {len(stored)} tensors, {_mib(size)} of {_mib(total)}"]
    for tp in _TPS:
        blocks = [block for block in find_blocks(model) if block.divides(tp)]
        weights = [model.get_submodule(name).weight for block in blocks for name in (*block.into, block.out)]
        share = sum(weight.numel() for weight in weights) / max(1, parameters)
        lines.append(
            f"tp {tp}         {_mib(size * (1 - share + share / tp))} a rank, {share:.0%} of the weights divided"
        )
    return lines


def _tokens(preprocessor: Preprocessor, size: str) -> str:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if match is None or not all(int(side) for side in match.groups()):
        raise StartupError(f"{size!r} is no size of an image, expected WIDTHxHEIGHT")
    return _count(preprocessor, Modality.IMAGE, noise(int(match[1]), int(match[2])))


def _of_clip(preprocessor: Preprocessor, size: str) -> str:
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,4})", size)
    if match is None or not all(int(side) for side in match.groups()):
        raise StartupError(f"{size!r} is no size of a clip, expected WIDTHxHEIGHTxSECONDS")
    width, height, seconds = (int(side) for side in match.groups())
    return _count(preprocessor, Modality.VIDEO, still_clip(width + width % 2, height + height % 2, seconds))


def _of_audio(preprocessor: Preprocessor, seconds: str) -> str:
    if re.fullmatch(r"\d{1,5}(\.\d{1,3})?", seconds) is None or not float(seconds):
        raise StartupError(f"{seconds!r} is no length of audio, expected seconds")
    return _count(preprocessor, Modality.AUDIO, silence(float(seconds)))


def _count(preprocessor: Preprocessor, modality: Modality, media: bytes) -> str:
    try:
        return str(preprocessor.prepare(modality, media).tokens)
    except EncodeError as error:
        return f"none ({error.message})"


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.1f} MiB"
