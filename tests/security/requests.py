"""Requests of honest and of other clients."""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import Iterator

import httpx

from encode_server.media.samples import noise


def item(width: int = 56, height: int = 56, seed: int = 0) -> str:
    """A small image as base64."""
    return base64.b64encode(noise(width, height, seed)).decode()


def encode(server, items=None, *, modality="image", **fields) -> httpx.Response:
    body = {"modality": modality, "mm_items": items or [item()]} | fields
    return httpx.post(server.base_url + "/encode", json=body, timeout=60)


@contextlib.contextmanager
def raw(server) -> Iterator[socket.socket]:
    host, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def metric(server, name: str) -> float:
    lines = httpx.get(server.base_url + "/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)
