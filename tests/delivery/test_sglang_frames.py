"""The frames that SGLang reads, read back as it reads them."""

import io
import pickle
import pickletools

import pytest
import torch

from encode_server.delivery.base import Part
from encode_server.delivery.sglang.frames import SGLangFrames, torch_values
from encode_server.errors import BadMedia
from encode_server.prepare import torch_pickles
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality
from encode_server.wire.preparers import Pickle
from tests.delivery import sglang_standin as sglang

FRAMES = SGLangFrames(sglang.RECEIVER, sglang.MODALITY)


def part(modality: Modality) -> Part:
    return Part("abc_local_part_1", 1, 3, modality, "model")


def encoded(modality: Modality, *items: tuple[int, list[int] | None, dict], dtype: str = "float32") -> Encoded:
    size = 4 if dtype == "float32" else 2
    return Encoded(
        modality,
        "model",
        dtype,
        8,
        [EncodedItem(ItemInfo(n, grid, ""), extra, memoryview(bytes(n * 8 * size))) for n, grid, extra in items],
    )


def read_back(frame: bytes):
    return sglang.SafeUnpickler(frame).load()


def header_of(frames, part, encoded):
    """As the server makes it: torch's objects are pickled by a process that has torch."""
    return frames.header(part, encoded, torch_pickles.make(Pickle(1, *torch_values(encoded))))


def test_images():
    data = read_back(
        header_of(FRAMES, part(Modality.IMAGE), encoded(Modality.IMAGE, (4, [1, 4, 4], {}), (6, [1, 4, 6], {})))
    )
    assert type(data) is sglang.EmbeddingData
    assert (data.req_id, data.num_parts, data.part_idx) == ("abc_local_part_1", 3, 1)
    assert data.modality is sglang.Modality.IMAGE
    assert data.grid_dim.dtype == torch.int64 and data.grid_dim.tolist() == [[1, 4, 4], [1, 4, 6]]
    assert data.shape == [10, 8] and data.dtype is torch.float32
    assert data.embedding is None and data.error_msg is None and data.error_code is None
    assert not hasattr(data, "video_timestamps")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype):
    header = header_of(FRAMES, part(Modality.IMAGE), encoded(Modality.IMAGE, (4, [1, 4, 4], {}), dtype=dtype))
    assert read_back(header).dtype is getattr(torch, dtype)


def test_video_with_seconds_per_grid():
    extras = [{"second_per_grid_ts": 1.0}, {"second_per_grid_ts": 0.5}]
    items = [(4, [2, 2, 4], extra) for extra in extras]
    data = read_back(header_of(FRAMES, part(Modality.VIDEO), encoded(Modality.VIDEO, *items)))
    assert data.modality is sglang.Modality.VIDEO
    assert data.second_per_grid_ts.tolist() == [1.0, 0.5]
    assert data.grid_dim.tolist() == [[2, 2, 4], [2, 2, 4]]


def test_video_with_timestamps():
    items = [(4, [2, 2, 4], {"video_timestamps": [0.25, 1.25]}), (4, [2, 2, 4], {"video_timestamps": [0.5, 1.5]})]
    data = read_back(header_of(FRAMES, part(Modality.VIDEO), encoded(Modality.VIDEO, *items)))
    assert data.video_timestamps == [[0.25, 1.25], [0.5, 1.5]]


def test_audio_has_its_mel_frames():
    items = [(25, None, {"mel_frames": 100}), (50, None, {"mel_frames": 201})]
    data = read_back(header_of(FRAMES, part(Modality.AUDIO), encoded(Modality.AUDIO, *items)))
    assert data.modality is sglang.Modality.AUDIO
    assert data.grid_dim.tolist() == [100, 201] and data.grid_dim.flatten().dtype == torch.int64


def test_errors():
    data = read_back(FRAMES.error(part(Modality.IMAGE), BadMedia("no picture: ü")))
    assert data.error_msg == "no picture: ü" and data.error_code == 400 and type(data.error_code) is int
    assert data.grid_dim is None and data.shape is None and data.dtype is None


def test_names_of_older_releases():
    frames = SGLangFrames("sglang.srt.disaggregation.encode_receiver", "sglang.srt.managers.schedule_batch")
    header = header_of(frames, part(Modality.IMAGE), encoded(Modality.IMAGE, (4, [1, 4, 4], {})))
    data = sglang.SafeUnpickler(
        header, "sglang.srt.disaggregation.encode_receiver", "sglang.srt.managers.schedule_batch"
    ).load()
    assert data.modality is sglang.Modality.IMAGE
    with pytest.raises(RuntimeError, match="blocked"):
        read_back(header)


def test_the_whole_is_one_sound_pickle():
    """Also for the strict reader of the standard library; strings with every kind of character stay themselves."""
    odd = Part("a\n'\"\\ \x00 é 漢 🙂", 0, 1, Modality.IMAGE, "model")
    header = header_of(FRAMES, odd, encoded(Modality.IMAGE, (4, [1, 4, 4], {})))
    pickletools.dis(header, out=io.StringIO())
    assert read_back(header).req_id == odd.req_id
    assert header.endswith(pickle.STOP)
