"""Runs where vLLM is installed: vLLM's own class of a checkpoint encodes media, and writes the rows of each item.

usage: vllm_rows.py CHECKPOINT MEDIA OUT

`MEDIA` holds `image-N.npy`, `video-N.npy` (8-bit frames at 2 a second) and `audio-N.npy` (samples at 16 kHz). The rows
are those that vLLM puts into its encoder cache. The last line printed says how many rows vLLM's prompt has room for.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.model_loader import get_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

RATE = 16_000


def loaded(file: Path) -> object:
    """One item as vLLM's processor takes it."""
    data = np.load(file)
    if file.name.startswith("image"):
        return Image.fromarray(data)
    if file.name.startswith("audio"):
        return data, RATE
    frames, height, width, _ = data.shape
    metadata = {
        "total_num_frames": frames,
        "fps": 2.0,
        "duration": frames / 2,
        "video_backend": "opencv",
        "frames_indices": list(range(frames)),
        "do_sample_frames": True,  # as vLLM's own loader says of a clip of which it took every frame
        "height": height,
        "width": width,
    }
    return data, metadata


def stand_ins() -> None:
    """What vLLM asks for on the way and no encoder runs: experts of a language model that is built and thrown away, and
    the memory of a GPU."""
    unquantized_fused_moe_method.select_unquantized_moe_backend = lambda *_, **__: (UnquantizedMoeBackend.OOT, None)
    torch.accelerator.get_memory_info = lambda *_, **__: (8 << 30, 8 << 30)


def main(checkpoint: str, media: Path, out: Path) -> None:
    stand_ins()
    files = sorted(media.glob("*.npy"))
    kinds = sorted({file.name.partition("-")[0] for file in files})
    arguments = EngineArgs(
        model=checkpoint,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        mm_encoder_only=True,
        skip_mm_profiling=True,
    )
    engine = arguments.create_engine_config()
    with set_current_vllm_config(engine), torch.inference_mode():
        init_worker_distributed_environment(engine, 0, f"file://{out}.rendezvous", 0, "gloo")
        model = get_model(vllm_config=engine)
        processor = MULTIMODAL_REGISTRY.create_processor(engine.model_config)
        rows: dict[str, torch.Tensor] = {}
        room: dict[str, int] = {}
        for kind in kinds:
            mine = [file for file in files if file.name.startswith(kind)]
            prompt = processor.dummy_inputs.get_dummy_text({kind: 1})
            items = []
            for file in mine:
                made = processor(prompt, mm_items=processor.info.parse_mm_data({kind: [loaded(file)]}))
                [item], [places] = made["mm_kwargs"][kind], made["mm_placeholders"][kind]
                items.append((kind, item))
                room[file.stem] = places.get_num_embeds()
            encoded: list[torch.Tensor] = []
            for _, _, batch in group_and_batch_mm_kwargs(items, device="cpu", pin_memory=False):
                encoded += list(model.embed_multimodal(**batch))
            rows |= {file.stem: row.float().contiguous().clone() for file, row in zip(mine, encoded, strict=True)}
    save_file(rows, out)
    print(json.dumps(room))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
