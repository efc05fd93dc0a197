"""A stand-in for vLLM's OpenAI server: it looks for the embeddings when a request arrives, and streams words back."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from encode_server.delivery.folder import ENTRY
from encode_server.wire.tensorfile import expected_size

WORDS = ["one", "two", "three"]
WAIT_S = 60.0


class EngineStandIn:
    """`seen`: the requests. `found`: for each chat, whether the entry of every `uuid` was there, whole.

    A stream goes on from word to word while `go_on` is set, or after `WAIT_S`; then `waited_in_vain` is set.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.found: list[dict[str, bool]] = []
        self.gone = threading.Event()
        self.go_on = threading.Event()
        self.key = ""  # wanted of everybody, where there is one
        self.paths: list[str] = []
        self.waited_in_vain = False
        self.metadata_status = 200  # of requests with metadata in place of media
        self.calls: dict[str, str] | None = None  # what it calls the media of a modality; None: it does not say
        self.url = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.seen.append(body)
            self.headers.append(dict(request.headers))
            parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
            self.found.append({p["uuid"]: self._whole(p["uuid"]) for p in parts if "uuid" in p})
            if self.metadata_status != 200 and any("_embeds" in p["type"] for p in parts):
                return JSONResponse({"error": {"message": "no metadata"}}, self.metadata_status)
            if body.get("model") == "unknown":
                return JSONResponse({"error": {"message": "no such model"}}, 404)
            if not body.get("stream"):
                return JSONResponse({"choices": [{"message": {"content": " ".join(WORDS)}}]})
            return StreamingResponse(self._words(), media_type="text/event-stream")

        @app.post("/v1/chat/completions/render")
        async def render(request: Request) -> Response:
            if self.calls is None:
                return JSONResponse({"error": {"message": "disabled"}}, 403)
            return JSONResponse({"features": {"mm_hashes": {modality: [n] for modality, n in self.calls.items()}}})

        @app.post("/v1/responses")
        async def responses(request: Request) -> Response:
            self.seen.append(await request.json())
            return JSONResponse({})

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return JSONResponse({"data": [{"id": "m"}]})

        @app.get("/v1/{path:path}")
        async def other(request: Request) -> Response:
            self.paths.append(request.scope["raw_path"].decode() + "?" + request.url.query)
            return JSONResponse({})

        @app.get("/health")
        async def health() -> None:
            return None

        return app

    def _whole(self, uuid: str) -> bool:
        path = self.store / uuid / ENTRY
        return path.exists() and expected_size(data := path.read_bytes()) == len(data)

    async def _words(self) -> AsyncIterator[str]:
        try:
            for word in WORDS:
                yield "data: " + json.dumps({"choices": [{"delta": {"content": word}}]}) + "\n\n"
                self.waited_in_vain |= not await asyncio.to_thread(self.go_on.wait, WAIT_S)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The URL of an application served in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
