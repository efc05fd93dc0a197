"""Requests of honest and of other clients."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
from collections.abc import Iterator

import httpx
from PIL import Image


def item(width: int = 56, height: int = 56, seed: int = 0) -> str:
    """A flat image as base64: few bytes, whatever its size."""
    data = io.BytesIO()
    Image.new("RGB", (width, height), (seed % 256, 80, 160)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def encode(server, items=None, *, modality="image", **fields) -> httpx.Response:
    body = {"modality": modality, "mm_items": items or [item()]} | fields
    return httpx.post(server.base_url + "/encode", json=body, timeout=60)


@contextlib.contextmanager
def raw(server) -> Iterator[socket.socket]:
    host, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection
