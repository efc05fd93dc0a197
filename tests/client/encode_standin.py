"""A small real server that speaks the documented `POST /encode`, and the embedding it answers with."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

VALUES = np.arange(12, dtype="<f4").reshape(3, 4) / 8 - 0.5


def stored(dtype: str) -> bytes:
    """`VALUES` as the server sends them; they are exact in every dtype."""
    if dtype == "bfloat16":
        return (VALUES.view("<u4") >> 16).astype("<u2").tobytes()
    return VALUES.astype(dtype).tobytes()


def safetensors_body(dtype: str, req_id: str, items: list[dict[str, object]]) -> bytes:
    data = stored(dtype)
    code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header = json.dumps(
        {
            "__metadata__": {
                "req_id": req_id,
                "model": "demo",
                "modality": "image",
                "dtype": dtype,
                "shape": json.dumps(VALUES.shape),
                "items": json.dumps(items),
            },
            "embedding": {"dtype": code, "shape": VALUES.shape, "data_offsets": [0, len(data)]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


class StandIn:
    """The server's state as tests see it. What it does hangs on `req_id`; `seen` holds the bodies it was sent."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.gone = threading.Event()
        self.healthy = True
        self.url = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/encode")
        async def encode(request: Request) -> Response:
            body = await request.json()
            self.seen.append(body)
            self.headers.append(dict(request.headers))
            req_id = body.get("req_id", "made-up")
            items: list[dict[str, object]] = [
                {"tokens": 1, "grid_thw": [1, 2, 2], "content_hash": "sha256:aa"},
                {"tokens": 2, "grid_thw": None, "content_hash": "sha256:bb"},
            ]
            match req_id:
                case "busy":
                    error = {"status": "error", "code": "too_busy", "message": "full", "req_id": req_id}
                    return JSONResponse(error, 429, {"Retry-After": "1.5"})
                case "proxy":
                    return PlainTextResponse("<h1>Bad Gateway</h1>", 502)
                case "garbage":
                    return PlainTextResponse("{}")
                case "short":
                    return Response(safetensors_body("float32", req_id, items)[:-1])
                case "slow":
                    while not await request.is_disconnected():  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                    self.gone.set()
            dtype = req_id if req_id in ("float32", "float16", "bfloat16") else "float32"
            answer = {"req_id": req_id, "model": "demo", "modality": "image", "dtype": dtype, "shape": VALUES.shape}
            answer["items"] = items
            if "prefill_host" in body:
                return JSONResponse(answer | {"status": "delivered"})
            if request.headers["accept"] == "application/octet-stream":
                return Response(safetensors_body(dtype, req_id, items), media_type="application/octet-stream")
            embedding = base64.b64encode(stored(dtype)).decode()
            return JSONResponse(answer | {"embedding": embedding})

        @app.get("/health")
        async def health() -> Response:
            if self.healthy:
                return JSONResponse({"status": "ok"})
            return JSONResponse({"status": "error", "reason": "loading"}, 503)

        return app
