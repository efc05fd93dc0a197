"""Media bytes to tensors: decode, choose frames, and run the checkpoint's own processors. Safe from many threads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from encode_server.errors import BadMedia, BadRequest, TooLarge, UnsupportedModality, first_line
from encode_server.media.limits import MediaLimits
from encode_server.media.samples import probe_media
from encode_server.media.video import VideoInfo
from encode_server.models import on_device
from encode_server.models.checkpoint import Checkpoint
from encode_server.models.families import family_of
from encode_server.models.out_of_memory import is_out_of_memory
from encode_server.models.prepared import Prepared
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from encode_server.wire.pools import POOLED, POOLED_TOKENS, Pool


class Preprocessor:
    """Decodes and preprocesses single items as the checkpoint's own processors define it.

    `modalities`: what the model has an encoder for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        limits: MediaLimits,
        max_patches: int = 131_072,
        device: str = "cpu",
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Load the processors of the checkpoint's modalities; `limits` bound every item.

        `max_patches`: what `min_pixels` may enlarge an image or a video to. `device`: torch's name of where images and
        videos are resized, rescaled and normalised, as far as their processors can; `warn` is told which cannot.

        Raises:
            StartupError: a processor's configuration is missing or unreadable.
        """
        self._family = family_of(checkpoint)
        self.modalities = self._family.modalities
        self._limits, self._max_patches = limits, max_patches
        self._processors = {modality: self._family.load_processor(modality) for modality in sorted(self.modalities)}
        self._device, self._warn = device, warn
        self._on_device: frozenset[Modality] = frozenset()
        if device != "cpu":
            on_device.take_addresses(device)
            self._move(sorted(self.modalities))

    def prepare(
        self,
        modality: Modality,
        data: bytes,
        options: ItemOptions | None = None,
        on_decoded: Callable[[], None] = lambda: None,
    ) -> Prepared:
        """Preprocess one item from its encoded bytes; `on_decoded` is called between decoding and the processor.

        Raises:
            UnsupportedModality: the model has no encoder for it.
            BadRequest: options that contradict each other, the model or the media.
            BadMedia: the bytes cannot be decoded, or the processor refuses what they hold.
            TooLarge: beyond a limit.
        """
        options = options or ItemOptions()
        self._check(modality, options)
        if modality is Modality.IMAGE:
            prepared = self._image(data, options, on_decoded)
        elif modality is Modality.VIDEO:
            prepared = self._video(data, options, on_decoded)
        else:
            prepared = self._audio(data, on_decoded)
        return prepared if options.pool is not Pool.MODEL else _pooled(prepared)

    def decoded_bytes(self, modality: Modality, data: bytes, options: ItemOptions) -> int:
        """The most bytes that decoding the item holds at any moment beside `data` itself, from its header alone.

        An image's figure holds: the decode uses the same header. The headers of videos and of audio in MP4 or Matroska
        can be wrong; the limits bound what such files take.

        Raises what `prepare` raises for the same header.
        """
        self._check(modality, options)
        if modality is Modality.IMAGE:
            from encode_server.media.image import image_bytes

            return image_bytes(data, self._limits)
        if modality is Modality.VIDEO:
            from encode_server.media.video import video_bytes

            return video_bytes(data, self._chooser(options)[0], self._limits)
        from encode_server.media.audio import audio_bytes

        return audio_bytes(data, self._sampling_rate, self._limits)

    def split(self, prepared: Prepared, max_cost: int) -> list[Prepared]:
        """Pieces of a large item that can be encoded apart, see `Family.split`."""
        return [prepared] if POOLED in prepared.tensors else self._family.split(prepared, max_cost)

    def probe(self, modality: Modality) -> bytes:
        """Tiny valid media for a health probe (`samples.probe_media`); every family makes at least one token of it."""
        return probe_media(modality)

    def _check(self, modality: Modality, options: ItemOptions) -> None:
        if modality not in self.modalities:
            has = ", ".join(sorted(self.modalities))
            raise UnsupportedModality(f"this model does not encode {modality}; it encodes {has}")
        _check(options)

    def _image(self, data: bytes, options: ItemOptions, on_decoded: Callable[[], None]) -> Prepared:
        from encode_server.media.image import decode_image

        image = decode_image(data, self._limits)
        on_decoded()
        if options.max_side is not None:
            image.thumbnail((options.max_side, options.max_side))
        processor = self._processors[Modality.IMAGE]
        sizing = self._sizing(processor, options)
        self._check_enlarged(processor, options, 1)
        try:
            return self._processed(
                Modality.IMAGE, sizing, lambda options: self._family.prepare_image(processor, image, options)
            )
        except ValueError as error:
            raise BadMedia(f"the image cannot be preprocessed: {first_line(error)}") from error

    def _audio(self, data: bytes, on_decoded: Callable[[], None]) -> Prepared:
        from encode_server.media.audio import decode_audio

        extractor = self._processors[Modality.AUDIO]
        samples = decode_audio(data, self._sampling_rate, self._limits)
        on_decoded()
        try:
            return self._family.prepare_audio(extractor, samples)
        except ValueError as error:
            raise BadMedia(f"the audio cannot be preprocessed: {first_line(error)}") from error

    @property
    def _sampling_rate(self) -> int:
        """What audio is resampled to (Hz)."""
        return int(self._processors[Modality.AUDIO].sampling_rate)

    def _video(self, data: bytes, options: ItemOptions, on_decoded: Callable[[], None]) -> Prepared:
        from encode_server.media.video import decode_video

        processor = self._processors[Modality.VIDEO]
        sizing = self._sizing(processor, options)
        choose, chosen_from = self._chooser(options)
        frames, _ = decode_video(data, choose, self._limits)
        on_decoded()
        try:
            return self._processed(
                Modality.VIDEO,
                sizing,
                lambda options: self._family.prepare_video(processor, frames, chosen_from(), options),
            )
        except ValueError as error:
            raise BadMedia(f"the video cannot be preprocessed: {first_line(error)}") from error

    def _move(self, modalities: Sequence[Modality]) -> None:
        """Preprocess on the device what gives the same there as on the CPU; the trial also loads the kernels."""
        for modality in modalities:
            reason = on_device.unfit(self._processors[modality])
            if reason is None:
                want = self.prepare(modality, self.probe(modality))
                self._on_device |= {modality}
                try:
                    reason = on_device.difference(self.prepare(modality, self.probe(modality)), want)
                except Exception as error:  # of any processor class, on a device that this process has not used yet
                    reason = f"{type(error).__name__}: {first_line(error)}"
            if reason is not None:
                self._on_device -= {modality}
                self._warn(f"--preproc-device {self._device}: {modality} is preprocessed on the CPU: {reason}")

    def _processed(
        self, modality: Modality, options: Mapping[str, Any], prepare: Callable[[Mapping[str, Any]], Prepared]
    ) -> Prepared:
        """What `prepare` makes with these options of the processor, by way of the device where that can be used."""
        if modality not in self._on_device:
            return prepare(options)
        try:
            prepared = on_device.to_host(prepare({**options, "device": self._device}))
        except RuntimeError as error:
            short, reason = is_out_of_memory(error), first_line(error)
        else:
            on_device.trim(self._device)
            return prepared
        if short:  # the ranks, or a larger item, have what there is: this item takes the CPU
            on_device.trim(self._device)
            return prepare(options)
        prepared = prepare(options)  # raises where the fault is the item's
        self._on_device = frozenset()
        self._warn(f"{self._device} failed, everything is preprocessed on the CPU: {reason}")
        return prepared

    def _chooser(self, options: ItemOptions) -> tuple[Callable[[VideoInfo], Sequence[int]], Callable[[], Any]]:
        """What chooses a video's frames with these options, and what tells the metadata that were last chosen from."""
        from transformers.video_utils import VideoMetadata

        processor = self._processors[Modality.VIDEO]
        sampler, own = _with_frame_options(processor, options), self._family.sampling(processor)
        metadata = VideoMetadata(total_num_frames=0)

        def choose(info: VideoInfo) -> Sequence[int]:
            nonlocal metadata
            metadata = VideoMetadata(
                total_num_frames=info.total_num_frames,
                fps=info.fps,
                width=info.width,
                height=info.height,
                duration=info.duration,
                video_backend="pyav",
            )
            indices = _choose(sampler, own, metadata, options)
            metadata.frames_indices = indices
            self._check_enlarged(processor, options, len(indices))
            return indices

        return choose, lambda: metadata

    def _sizing(self, processor: Any, options: ItemOptions) -> dict[str, Any]:
        """The processor's `size` argument for this call; a bound that isn't given gives way to one that is."""
        low, high = options.min_pixels, options.max_pixels
        if low is None and high is None:
            return {}
        if not self._family.sizes_freely(processor):
            raise BadRequest("min_pixels and max_pixels do not apply: the model's own processor chooses the size")
        if low is None:
            low = min(int(processor.size["shortest_edge"]), high) if high is not None else None
        if high is None:
            high = max(int(processor.size["longest_edge"]), low) if low is not None else None
        return {"size": {"shortest_edge": low, "longest_edge": high}}

    def _check_enlarged(self, processor: Any, options: ItemOptions, frames: int) -> None:
        """`min_pixels` enlarges every frame, which costs gigabytes long before anybody counts patches."""
        if options.min_pixels is None:
            return
        steps = -(-frames // int(getattr(processor, "temporal_patch_size", 1)))
        patches = steps * options.min_pixels // int(processor.patch_size) ** 2
        if patches > self._max_patches:
            raise TooLarge(f"min_pixels {options.min_pixels} makes {patches} patches, at most {self._max_patches}")


def _pooled(prepared: Prepared) -> Prepared:
    """The item marked for the ranks, which give one vector of it."""
    return replace(
        prepared,
        tensors=prepared.tensors | {POOLED: torch.ones(1)},
        tokens=1,
        extra=prepared.extra | {POOLED_TOKENS: prepared.tokens},
    )


def _check(options: ItemOptions) -> None:
    for name in ("min_pixels", "max_pixels", "fps", "num_frames", "min_frames", "max_frames"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadRequest(f"{name} must be above 0, got {value}")
    if options.fps is not None and options.num_frames is not None:
        raise BadRequest("fps and num_frames exclude each other")
    for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
        least, most = getattr(options, low), getattr(options, high)
        if least is not None and most is not None and least > most:
            raise BadRequest(f"{low} {least} is above {high} {most}")


def _with_frame_options(processor: Any, options: ItemOptions) -> Any:
    """A shallow copy of the video processor with this call's frame options, the shared one left as it is.

    `sample_frames` of some processors reads them from the object only.
    """
    given: Mapping[str, Any] = {
        name: value
        for name in ("fps", "num_frames", "min_frames", "max_frames")
        if (value := getattr(options, name)) is not None
    }
    if not given:
        return processor
    sampler = copy.copy(processor)
    if "fps" in given or "num_frames" in given:
        sampler.fps = sampler.num_frames = None
        sampler.do_sample_frames = True
    for name, value in given.items():
        setattr(sampler, name, value)
    if options.min_frames is not None:
        sampler.max_frames = max(getattr(sampler, "max_frames", None) or 0, options.min_frames)
    if options.max_frames is not None:
        sampler.min_frames = min(getattr(sampler, "min_frames", None) or 0, options.max_frames)
    return sampler


def _choose(sampler: Any, own: Mapping[str, Any] | None, metadata: Any, options: ItemOptions) -> list[int]:
    """Indices of the frames to decode, by the processor's own `sample_frames`. `own`: see `Family.sampling`.

    A processor that doesn't sample takes every frame, or an even choice of `max_frames` where the request gives it; a
    clip of fewer frames than one temporal patch is taken whole, because `sample_frames` can't choose from it.
    """
    total = int(metadata.total_num_frames)
    whole = list(range(total))
    sampled = sampler.do_sample_frames and (own is not None or sampler.fps or sampler.num_frames)
    count = None
    if not sampled and options.max_frames is not None and options.max_frames < total:
        count = options.max_frames
    if total < int(getattr(sampler, "temporal_patch_size", None) or 1) or not (sampled or count):
        return whole
    # Given outright: not every processor's sample_frames looks for its own settings.
    given = dict(own) if own is not None else {"num_frames": sampler.num_frames}
    for name in ("fps", "num_frames", "min_frames", "max_frames"):
        if name in given:
            given[name] = getattr(sampler, name, None)
    if count is not None:
        given["num_frames"] = count
    try:
        chosen = sampler.sample_frames(metadata, **given)
    except (ValueError, ZeroDivisionError, TypeError) as error:
        if own is not None and _free(options):
            return whole
        raise BadRequest(f"no frames can be chosen from {total} with these options: {first_line(error)}") from error
    indices = [min(int(index), total - 1) for index in chosen]
    if not indices:
        if own is not None and _free(options):
            return whole  # a clip shorter than what the processor samples from
        raise BadRequest(f"these options choose no frame of {total}")
    return indices


def _free(options: ItemOptions) -> bool:
    """Whether the request leaves the choice of frames to the processor."""
    return options.fps is options.num_frames is options.min_frames is options.max_frames is None
