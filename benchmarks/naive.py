"""The server one writes by hand: FastAPI, transformers, everything in the handler. What the service is compared with.

`python -m benchmarks.naive --model DIR --port N`; `--pool N` moves decoding and preprocessing to N threads. For
pictures only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image
from safetensors.torch import save

from encode_server.models.encoder import DTYPES


def create_app(path: Path, device: str, dtype: str, pool: int) -> FastAPI:
    """The application; with `pool` threads for preprocessing, or 0 for none."""
    from benchmarks.floors import load_plain_model

    app = FastAPI()
    processor: Any = transformers.AutoImageProcessor.from_pretrained(path)
    model = load_plain_model(path, device, dtype)
    executor = ThreadPoolExecutor(pool) if pool else None

    def preprocess(uris: list[str]) -> Any:
        pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB") for uri in uris]
        return processor(images=pictures, return_tensors="pt")

    @torch.inference_mode()
    def forward(inputs: Any) -> torch.Tensor:
        pixels = inputs["pixel_values"].to(device, DTYPES[dtype])
        if "image_grid_thw" not in inputs:
            tower = getattr(model, "vision_model", model)
            return torch.as_tensor(tower(pixels).last_hidden_state.flatten(0, 1))
        return torch.cat(list(model.get_image_features(pixels, inputs["image_grid_thw"].to(device)).pooler_output))

    @app.post("/encode")
    async def encode(request: Request) -> Response:
        body = await request.json()
        if executor is None:
            inputs = preprocess(body["mm_items"])
        else:
            inputs = await asyncio.get_running_loop().run_in_executor(executor, preprocess, body["mm_items"])
        content = save({"embedding": forward(inputs).cpu().contiguous()})
        return Response(content, media_type="application/octet-stream")

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


def main() -> int:
    """Serve until ended."""
    parser = argparse.ArgumentParser(prog="benchmarks.naive")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pool", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    app = create_app(args.model, args.device, args.dtype, args.pool)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
