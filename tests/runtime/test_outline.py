"""A JSON body is read in steps that are short, whatever the body holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any

import pytest

from encode_server.api import body
from encode_server.api.schemas import EncodeBody
from encode_server.client.affinity import item_key
from encode_server.client.media import items_json
from encode_server.errors import BadRequest
from encode_server.route.chat import MESSAGES, RESPONSES, media_items, media_parts, name_parts, put_metadata
from encode_server.runtime import outline as module
from encode_server.runtime.bodies import from_json
from encode_server.runtime.outline import LONG, OutlineLimits, outline
from encode_server.wire.modality import Modality

MIB = 1 << 20
LIMITS = OutlineLimits(4 * LONG, 40)


def read(document, limits=LIMITS, raw=None):
    found = outline(raw or json.dumps(document).encode(), Any, limits)

    def whole(value):
        if isinstance(value, str):
            text = found.text(value)
            return text if isinstance(text, str) else "".join(text)
        if isinstance(value, list):
            return [whole(one) for one in value]
        return {key: whole(one) for key, one in value.items()} if isinstance(value, dict) else value

    return whole(found.body)


@pytest.mark.parametrize("length", [0, 10, LONG, LONG + 1, module.TEXT, module.TEXT + 1, 3 * MIB + 5])
def test_long_strings_are_what_they_were(length):
    document = {"a": ["x" * length, {"url": "y" * length, "n": 1.5}], "b": 'z"\\/' + "é" * 7, "c": "w" * 5000}
    assert read(document) == document


def test_escapes_and_characters_of_several_bytes_are_not_torn(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 50)
    monkeypatch.setattr(module, "TEXT", 100)
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice(["a", "b" * 9, "\\/", "\\n", "\\u002b", "é", "€", "\U0001f600"]) for _ in range(900))
        raw = b'{"a": "' + text.encode() + b'", "b": "' + b"q" * 2000 + b'"}'
        assert read(None, raw=raw) == json.loads(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": "' + b"x" * 9000,
        b'{"a": "' + b"x" * 9000 + b'\\"}',
        b'{"a": "' + b"\\" * 9000 + b'"}',
        b'{"a": "' + b'\\"' * 9000 + b'"}',
        b"[" + b'"",' * 9000 + b'""]',
        b'{"a": "b"}' + b" " * 9000,
        b"[" + b"1" * 9000 + b"]",
        b"[" * 9000,
        b'{"a": "' + b"\\u00zz" * 20000 + b'"}',
        b'{"a": "' + b"\xff" * 90000 + b'"}',
        b'{"a": "' + b"\\\\" * 90000 + b'"}',
        b'{"a": "' + b"\\ud83d" * 90000 + b'"}',
        b'"' * 9000,
    ],
)
def test_other_large_bodies_are_refused(raw):
    with pytest.raises(BadRequest):
        read(None, raw=raw)


def test_a_stand_in_passes_for_no_other_string():
    long = "u" * 5000
    with pytest.raises(BadRequest, match="uuid"):
        raw = json.dumps({"modality": "image", "mm_items": [{"url": "A", "uuid": long}]}).encode()
        outline(raw, EncodeBody, LIMITS)


def test_a_document_is_put_together_again():
    long = ["x" * 5000, "é\\/" * 3000]
    raw = b'{"k": ["%s", {"twice": "%s", "twice": "y"}], "other": "%s"}' % tuple(
        text.encode() for text in (long[0], long[1], long[1])
    )
    found = outline(raw, Any, LIMITS)
    found.body["more"] = 1
    assert json.loads(b"".join(found.restored(json.dumps(found.body).encode()))) == json.loads(raw) | {"more": 1}


def test_a_chat_of_any_size_is_named_alike_and_keeps_its_media(monkeypatch):
    media = ["data:image/png;base64," + "QUJD" * 5000, "https://example.com/" + "a" * 20]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in (media[0], media[1], media[0])]
    raw = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    documents = []
    for limits in (OutlineLimits(1 << 20, 100), OutlineLimits(8000, 100)):
        found = outline(raw, Any, limits)
        parts = media_parts(found)
        items = name_parts(parts, 2.0)[Modality.IMAGE]
        assert len(items) == len(media_items(parts)[Modality.IMAGE]) == 2
        assert [json.loads(b"".join(asyncio.run(items_json([item]))))[0]["url"] for item in items] == media
        assert [item_key(item) for item in items] == [item_key(url) for url in media]
        documents.append(json.loads(b"".join(found.restored(json.dumps(found.body).encode()))))
    assert documents[0] == documents[1]


@pytest.mark.parametrize("limits", [OutlineLimits(1 << 20, 100), OutlineLimits(8000, 100)], ids=["whole", "cut"])
def test_every_kind_of_request_is_read_in_any_size(limits):
    data = "QUJD" * 5000
    uri = "data:image/webp;base64," + data
    source = {"type": "base64", "media_type": "image/webp", "data": data}
    result = {"type": "tool_result", "content": [{"type": "image", "source": source}]}
    for path, document in (
        (RESPONSES, {"input": [{"content": [{"type": "input_image", "image_url": uri}]}]}),
        (MESSAGES, {"messages": [{"content": [{"type": "image", "source": source}, result]}]}),
    ):
        parts = media_parts(outline(json.dumps(document).encode(), Any, limits), path)
        [item] = media_items(parts)[Modality.IMAGE]
        assert json.loads(b"".join(asyncio.run(items_json([item])))) == [{"url": uri}]
        assert item_key(item) == item_key(uri), "it goes to the encoder that the part will go to"


@pytest.mark.parametrize("limits", [OutlineLimits(1 << 20, 100), OutlineLimits(8000, 100)], ids=["whole", "cut"])
def test_the_same_image_of_another_size_is_another_item(limits):
    url = "data:image/png;base64," + "QUJD" * 5000
    asked: list[dict[str, object]] = [{}, {"detail": "low"}, {"max_long_side_pixel": 100}, {"detail": "low"}]
    content = [{"type": "image_url", "image_url": {"url": url} | more} for more in asked]
    found = outline(json.dumps({"messages": [{"content": content}]}).encode(), Any, limits)
    items = media_items(media_parts(found))[Modality.IMAGE]
    written = json.loads(b"".join(asyncio.run(items_json(items))))
    assert written == [{"url": url} | more for more in asked[:3]]


@pytest.mark.parametrize("limits", [OutlineLimits(1 << 20, 100), OutlineLimits(8000, 100)], ids=["whole", "cut"])
def test_metadata_take_the_place_of_media_of_any_size(limits):
    url = "data:image/png;base64," + "QUJD" * 5000
    image = {"type": "image_url", "image_url": {"url": url}}
    audio = {"type": "input_audio", "input_audio": {"data": "QUJD" * 4000, "format": "wav"}}
    text = {"type": "text", "text": "x" * 5000}
    raw = json.dumps({"messages": [{"content": [image, audio, text]}]}).encode()
    found = outline(raw, Any, limits)
    parts = media_parts(found)
    name = name_parts(parts, 2.0)[Modality.IMAGE][0].uuid
    grid = {"image_grid_thw": [1, 4, 4]}
    assert put_metadata(found.body, parts, {name: grid}) == {Modality.IMAGE}
    document = json.loads(b"".join(found.restored(json.dumps(found.body).encode())))
    placed = {"type": "image_embeds", "image_embeds": grid, "uuid": name}
    assert document["messages"][0]["content"] == [placed, audio | {"uuid": parts[1].part["uuid"]}, text]


@pytest.mark.parametrize(
    "rest",
    [
        b'"mm_items":["' + b"A" * (8 * MIB) + b'"]}',
        b'"mm_items":["' + b"\\u0041" * (2 * MIB) + b'"]}',
        b'"mm_items":["' + b"\\/" * (4 * MIB) + b'"]}',
        b'"x":' + b" " * (8 * MIB) + b'0,"mm_items":["A"]}',
        b'"x":0.' + b"1" * (8 * MIB) + b',"mm_items":["A"]}',
        b'"mm_items":[' + b'"",' * (3 * MIB) + b'""]}',
        b'"x":[' + b"[]," * (3 * MIB) + b'[]],"mm_items":["A"]}',
    ],
    ids=["string", "escapes", "slashes", "space", "digits", "strings", "arrays"],
)
def test_no_step_holds_the_interpreter_for_long(monkeypatch, rest):
    """The decoder holds it for a time in proportion to the bytes it is given."""
    sizes = []

    def noted(raw, kind):
        sizes.append(len(raw))
        return from_json(raw, kind)

    monkeypatch.setattr(module, "from_json", noted)
    with contextlib.suppress(BadRequest):
        raw = bytearray(b'{"modality":"image",' + rest)
        body._from_document(256, outline(raw, EncodeBody, body.json_limits(256)))
    assert max(sizes, default=0) <= MIB + 2
