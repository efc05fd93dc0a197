"""The floors: a forward on ready tensors in one process, nothing else going on. transformers' own, and our rank's."""

from __future__ import annotations

import io
import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from encode_server.bench.source import PICTURES, pool
from encode_server.engine.rank import SMALL_BATCH
from encode_server.engine.side_by_side import SideBySide
from encode_server.errors import StartupError
from encode_server.media.audio import decode_audio
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import UniqueMedia
from encode_server.media.video import decode_video
from encode_server.models.encoder import DTYPES, load_encoder
from encode_server.models.preprocess import Preprocessor
from encode_server.models.processors import load_part
from encode_server.models.resolve import open_directory
from encode_server.models.weights import quiet
from encode_server.wire.modality import Modality


@dataclass(frozen=True)
class Rate:
    """What a floor reached at one batch size."""

    batch: int
    items_per_s: float
    tokens_per_s: float
    seconds_per_batch: float
    batches: int


class Floor(ABC):
    """A model on a device, and a batch of ready tensors for it, made of `distinct` pictures."""

    def __init__(self, device: str, distinct: int) -> None:
        self.device = torch.device(device)
        self.distinct = distinct

    @abstractmethod
    def prepare(self, what: str, batch: int) -> Callable[[], int]:
        """Make `batch` items of the medium `what` ready; the call returned encodes them, and says how many tokens."""

    @torch.inference_mode()
    def measure(self, what: str, batch: int, seconds: float) -> Rate:
        """Encode for `seconds`, at least once, after once unmeasured."""
        forward = self.prepare(what, batch)
        tokens = forward()
        self.synchronize()
        times: list[float] = []
        while sum(times) < seconds or not times:
            started = time.perf_counter()
            forward()
            self.synchronize()
            times.append(time.perf_counter() - started)
        mean = statistics.fmean(times)
        return Rate(batch, batch / mean, tokens / mean, mean, len(times))

    def best(self, what: str, batches: tuple[int, ...], seconds: float) -> dict[str, Any]:
        """The fastest of several batch sizes, and all of them."""
        rates = [self.measure(what, batch, seconds) for batch in batches]
        fastest = max(rates, key=lambda rate: rate.items_per_s)
        return asdict(fastest) | {"all": [asdict(rate) for rate in rates]}

    def synchronize(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class TransformersFloor(Floor):
    """The checkpoint in transformers as anybody loads it, with its `sdpa` attention."""

    def __init__(self, path: Path, device: str, dtype: str, distinct: int = PICTURES) -> None:
        super().__init__(device, distinct)
        self._path = path
        self._model = load_plain_model(path, device, dtype)
        self._dtype = DTYPES[dtype]

    def prepare(self, what: str, batch: int) -> Callable[[], int]:
        media = pool(what, count=self.distinct)
        modality = media[0].modality
        copies = [medium.copy() for medium in media[:batch]]
        if modality is Modality.IMAGE:
            return self._images(copies, batch)
        copies = list(itertools.islice(itertools.cycle(copies), batch))
        return self._videos(copies) if modality is Modality.VIDEO else self._audio(copies)

    def _part(self, modality: Modality) -> Any:
        """The checkpoint's processor with the settings that the server's own has."""
        return load_part(open_directory(self._path), modality)

    def _images(self, copies: list[bytes], batch: int) -> Callable[[], int]:
        processor = self._part(Modality.IMAGE)
        pictures = [Image.open(io.BytesIO(copy)).convert("RGB") for copy in copies]
        inputs = processor(images=pictures, return_tensors="pt")
        pixels = _repeated(inputs["pixel_values"], len(copies), batch).to(self.device, self._dtype)
        if (grids := inputs.get("image_grid_thw")) is None:
            tower = getattr(self._model, "vision_model", self._model)
            return lambda: _rows(tower(pixels).last_hidden_state)
        grids = _repeated(grids, len(copies), batch).to(self.device)
        return lambda: _rows(self._model.get_image_features(pixels, grids).pooler_output)

    def _videos(self, copies: list[bytes]) -> Callable[[], int]:
        processor = self._part(Modality.VIDEO)
        frames, metadata = _clip(copies[0])
        inputs = processor(videos=[frames] * len(copies), video_metadata=[metadata] * len(copies), return_tensors="pt")
        pixels = inputs["pixel_values_videos"].to(self.device, self._dtype)
        grids = inputs["video_grid_thw"].to(self.device)
        return lambda: _rows(self._model.get_video_features(pixels, grids).pooler_output)

    def _audio(self, copies: list[bytes]) -> Callable[[], int]:
        extractor = self._part(Modality.AUDIO)
        sounds = [decode_audio(copy, int(extractor.sampling_rate), MediaLimits()) for copy in copies]
        inputs = extractor(
            sounds, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt"
        )
        features = inputs["input_features"].to(self.device, self._dtype)
        mask = inputs["attention_mask"].to(self.device)
        if not hasattr(self._model, "get_audio_features"):
            base = getattr(self._model, "model", self._model)
            tower = getattr(base, "audio_tower", None) or base.encoder
            project = getattr(base, "multi_modal_projector", lambda hidden: hidden)
            told: dict[str, torch.Tensor] = {}
            if hasattr(base, "multi_modal_projector"):  # Qwen2-Audio masks what is padding
                valid = (mask.sum(-1) - 1) // 2 + 1
                positions = torch.arange((features.shape[-1] - 2) // 2 + 1, device=self.device)
                told["attention_mask"] = (positions < valid[:, None])[:, None, None, :]
            return lambda: _rows(project(tower(features, **told).last_hidden_state))
        return lambda: _rows(self._model.get_audio_features(features, feature_attention_mask=mask).last_hidden_state)


class OurFloor(Floor):
    """What a rank of the service runs: `load_encoder`, fed with what the service's preprocessing makes."""

    def __init__(self, path: Path, device: str, dtype: str, distinct: int = PICTURES) -> None:
        super().__init__(device, distinct)
        self._preprocessor = Preprocessor(open_directory(path), MediaLimits())
        self._encoder = load_encoder(str(path), device=device, dtype=dtype)
        self._cores = torch.get_num_threads() if device == "cpu" else 1
        self._threads = SideBySide(self._cores, self._cores)

    def prepare(self, what: str, batch: int) -> Callable[[], int]:
        media = pool(what, count=self.distinct)
        modality = media[0].modality
        prepared = [self._preprocessor.prepare(modality, medium.copy()) for medium in media[:batch]]
        ready = [{name: self._ready(tensor) for name, tensor in one.tensors.items()} for one in prepared]
        share = max(1, SMALL_BATCH // prepared[0].cost) if self._cores > 1 else batch
        items = list(itertools.islice(itertools.cycle(ready), batch))
        return lambda: self._forward(modality, items, share)

    def bare(self, what: str, seconds: float) -> dict[str, float]:
        """One item at a time through decoding, preprocessing, copying in, the forward and copying out.

        Medians of wall time and means of CPU time of all threads, in seconds by stage.
        """
        media = itertools.cycle(pool(what))
        walls: dict[str, list[float]] = {}
        cpus: dict[str, list[float]] = {}
        totals: list[float] = []
        self._bare_once(next(media), {}, {})
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends or len(totals) < 3:
            totals.append(self._bare_once(next(media), walls, cpus))
        wall = {f"{stage}_s": statistics.median(times) for stage, times in walls.items()}
        cpu = {f"{stage}_cpu_s": statistics.fmean(times) for stage, times in cpus.items()}
        return {"total_s": statistics.median(totals), **wall, **cpu}

    def _forward(self, modality: Modality, items: list[dict[str, torch.Tensor]], share: int) -> int:
        """Rows of the embeddings. A CPU's cores take `share` items at a time, as a rank's do."""
        parts: SimpleQueue[int | Exception] = SimpleQueue()

        def encode(part: list[dict[str, torch.Tensor]]) -> None:
            try:
                parts.put(sum(len(embedding) for embedding in self._encoder.forward(modality, part)))
            except Exception as error:
                parts.put(error)

        starts = range(0, len(items), share)
        if len(starts) == 1:
            return sum(len(embedding) for embedding in self._encoder.forward(modality, items))
        for start in starts:
            self._threads.submit(partial(encode, items[start : start + share]))
        total = 0
        for part in [parts.get() for _ in starts]:
            if isinstance(part, Exception):
                raise part
            total += part
        return total

    def _bare_once(self, medium: UniqueMedia, walls: dict[str, list[float]], cpus: dict[str, list[float]]) -> float:
        data = medium.copy()
        clock = _Clock(walls, cpus)
        prepared = self._preprocessor.prepare(medium.modality, data, None, lambda: clock.lap("decode"))
        clock.lap("preprocess")
        inputs = {name: tensor.clone() for name, tensor in prepared.tensors.items()}
        clock.lap("copy")
        embedding = self._encoder.forward(medium.modality, [inputs])[0]
        self.synchronize()
        clock.lap("forward")
        embedding.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        clock.lap("deliver")
        return clock.total

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device, but for small ones: a rank reads grids and lengths on the CPU."""
        return tensor.to(self.device) if tensor.numel() > 64 else tensor


class _Clock:
    def __init__(self, walls: dict[str, list[float]], cpus: dict[str, list[float]]) -> None:
        self._walls, self._cpus = walls, cpus
        self._begin = self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def lap(self, stage: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self._walls.setdefault(stage, []).append(wall - self._wall)
        self._cpus.setdefault(stage, []).append(cpu - self._cpu)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def total(self) -> float:
        return self._wall - self._begin


def load_plain_model(path: Path, device: str, dtype: str) -> Any:
    """The checkpoint's class in transformers, with its `sdpa` attention; of the language model no layers."""
    with quiet():
        config = transformers.AutoConfig.from_pretrained(path)
        text = getattr(config, "text_config", None)
        if text is not None and (hasattr(text, "num_key_value_heads")):
            # It isn't run, and would fill the memory.
            text.num_hidden_layers = 0
            text.layer_types = []
        model_class = getattr(transformers, config.architectures[0])
        model = model_class.from_pretrained(path, config=config, dtype=DTYPES[dtype], attn_implementation="sdpa")
    return model.eval().to(device)


def open_floor(kind: str, path: Path, device: str, dtype: str) -> Floor:
    """`transformers` or `ours`."""
    if kind == "transformers":
        return TransformersFloor(path, device, dtype)
    if kind == "ours":
        return OurFloor(path, device, dtype)
    raise StartupError(f"there is no floor {kind!r}")


def _clip(data: bytes) -> tuple[np.ndarray[Any, Any], Any]:
    found: dict[str, Any] = {}

    def choose(info: Any) -> range:
        found.update(fps=info.fps, duration=info.duration, height=info.height, width=info.width)
        found.update(total_num_frames=info.total_num_frames)
        return range(info.total_num_frames)

    frames, _ = decode_video(data, choose, MediaLimits())
    return frames, transformers.video_utils.VideoMetadata(**found)


def _repeated(tensor: torch.Tensor, items: int, wanted: int) -> torch.Tensor:
    """`tensor` holds `items` equally large items one after another: the same over and over, `wanted` in all."""
    times = -(-wanted // items)
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))[: tensor.shape[0] // items * wanted]


def _rows(output: Any) -> int:
    """Rows of an embedding: of one tensor per item, or of one for all ([tokens, dim] or [items, tokens, dim])."""
    parts = [output] if isinstance(output, torch.Tensor) else output
    return sum(part.shape[:-1].numel() for part in parts)
