"""The page at `/` and its document, over HTTP. tests/page has the page in a browser."""

from __future__ import annotations

import base64
import re

import httpx


def encode(server, media: bytes | str, **more: object) -> httpx.Response:
    source = media if isinstance(media, str) else base64.b64encode(media).decode()
    body = {"modality": "image", "mm_items": [source]} | more
    return httpx.post(server.base_url + "/encode", json=body, timeout=60)


def status(server) -> dict:
    return httpx.get(server.base_url + "/status", timeout=10).json()


def files(server) -> dict[str, httpx.Response]:
    """Every file that the page names, and the files that those import."""
    found: dict[str, httpx.Response] = {}
    names = ["/"]
    while names:
        name = names.pop()
        if name in found:
            continue
        found[name] = answer = httpx.get(server.base_url + name, timeout=10)
        text = answer.text
        names += re.findall(r"""(?:src|href)="(/page/[^"#]+)["#]""", text)
        names += ["/page/" + path for path in re.findall(r"""from "\./([\w.]+)";""", text)]
        names += re.findall(r"""new Worker\("([^"]+)"\)""", text)
    return found


def test_every_file_of_the_page_is_served_and_nothing_comes_from_elsewhere(server):
    found = files(server)
    assert {"/page/page.js", "/page/playground.js", "/page/worker.js", "/page/uPlot.iife.min.js"} <= set(found)
    for name, answer in found.items():
        assert answer.status_code == 200, name
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy, name
        assert answer.headers["x-content-type-options"] == "nosniff"
        elsewhere = set(re.findall(r"https?://[^\s\"')]+", answer.text))
        assert elsewhere <= {"https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg"}, name
    page = found["/"].text
    assert "<style" not in page and " style=" not in page and not re.search(r"<script(?![^>]* src=)", page)
    again = httpx.get(server.base_url + "/", headers={"If-None-Match": found["/"].headers["etag"]}, timeout=10)
    assert again.status_code == 304 and not again.content


def test_status_shows_a_request_with_its_stages(server, picture):
    answer = encode(server, picture(84, 56, 501), req_id="page-slow")
    assert answer.status_code == 200
    assert re.match(r"fetch;dur=[\d.]+, preprocess;dur=[\d.]+", answer.headers["server-timing"])
    document = status(server)
    assert document["verdict"]["level"] in ("well", "full", "impaired") and document["verdict"]["reason"]
    assert document["modalities"] == ["audio", "image", "video"] and document["dtype"] == "float32"
    assert [rank["state"] for rank in document["ranks"]] == ["ready"] and document["ranks"][0]["pid"] > 0
    assert document["ranks"][0]["memory"] is None, "a CPU has no memory of its own"
    assert {"requests in progress", "arena", "oldest forward", "cache"} <= {one["name"] for one in document["levels"]}
    stages = {one["stage"]: one for one in document["stages"]}
    assert stages["total"]["count"] >= 1 and stages["forward"]["p99"] >= stages["forward"]["p50"] > 0
    assert sum(document["timeline"]["ok"]) >= 1


def test_status_names_a_failure_without_the_query_of_its_url(server):
    source = "file:///nowhere/x.png?token=very-secret"
    assert encode(server, source, req_id="page-failed").status_code in (400, 403)
    text = httpx.get(server.base_url + "/status", timeout=10).text
    assert "page-failed" in text and "very-secret" not in text
