"""The page in a real Chromium, over a real server: what a person sees, in both themes, wide and at 400 pixels.

Screenshots stay in build/screenshots, for a look at them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from encode_server.media import samples
from encode_server.media.samples import noise
from tests.fleet.encoder_standin import EncoderStandIn
from tests.live import LiveServer, eventually
from tests.models.samples import png

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian's package)"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 860}
KEY = "page-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LiveServer]:
    options = ["--api-keys", KEY, "--max-requests", "4", "--send-timeout-s", "1", "--tp", "2"]
    with LiveServer("demo", tmp_path_factory.mktemp("page"), *options) as live:
        yield live.healthy()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, server):
    """`open_page(scheme, viewport)`: the page with its key given. Whatever it complains of fails the test."""
    complaints: list[str] = []
    contexts = []

    def opened(scheme: str = "light", viewport: dict[str, int] = WIDE, at: str = "/"):
        context = browser.new_context(color_scheme=scheme, viewport=viewport)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if foreign(request.url) else None)
        page.goto(server.base_url + at)
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#tabs", state="visible")
        return page

    def foreign(url: str) -> bool:
        return not url.startswith((server.base_url, "blob:", "data:"))

    yield opened
    for context in contexts:
        context.close()
    # The browser itself reports answers of 401 (before the key) and 400 (media that cannot be decoded).
    assert [text for text in complaints if "Failed to load resource" not in text] == []


def keep(page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    width = page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "nothing is wider than the window"


def post(server: LiveServer, media: bytes, **more: object) -> int:
    form = {name: str(value) for name, value in ({"modality": "image"} | more).items()}
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(
        server.base_url + "/encode", data=form, files={"file": media}, headers=headers, timeout=60
    ).status_code


def test_a_wrong_key_is_told_and_the_right_one_opens(browser, server):
    page = browser.new_page()
    page.goto(server.base_url)
    page.wait_for_selector("#key", state="visible")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-wrong", state="visible")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Requests in progress")
    page.close()


def test_on_call_under_load_and_in_trouble(open_page, server):
    page = open_page()
    page.wait_for_selector(".verdict:has-text('Well')")
    with ThreadPoolExecutor(12) as threads:
        outcomes = list(threads.map(lambda seed: post(server, noise(448, 448, seed)), range(60)))
    assert 429 in outcomes and 200 in outcomes
    page.wait_for_selector(".verdict:has-text('Full')")
    page.wait_for_selector(".level.refusing:has-text('Refuses now')")
    keep(page, "oncall-full-light-wide")
    assert post(server, noise(56, 56, 900), prefill_host="127.0.0.1", embedding_port=9, req_id="<b>chat</b>-9") == 502
    before = server.rank_pids()
    os.kill(before[1], signal.SIGKILL)
    page.wait_for_selector("td:has-text('rank 1 exited with SIGKILL')")
    page.wait_for_selector("td:has-text('127.0.0.1:9')")
    page.wait_for_selector("text=<b>chat</b>-9")  # as text: no element was made of it
    assert page.locator("td b").count() == 0
    assert eventually(lambda: page.locator(".pill.good").count() >= 3)
    keep(page, "oncall-trouble-light-wide")
    narrow = open_page("dark", NARROW)
    narrow.wait_for_selector("td:has-text('rank 1 exited with SIGKILL')")
    keep(narrow, "oncall-trouble-dark-narrow")


def test_the_playground_by_keyboard(open_page):
    page = open_page("dark")
    page.focus("#tab-oncall")
    page.keyboard.press("ArrowRight")
    page.set_input_files(
        "input[type=file] >> nth=0", {"name": "one.png", "mimeType": "image/png", "buffer": png(168, 112, 3)}
    )
    page.wait_for_selector(".facts:has-text('6 × 4 tokens')")
    page.set_input_files(
        "input[type=file] >> nth=1", {"name": "two.png", "mimeType": "image/png", "buffer": png(112, 112, 4)}
    )
    page.wait_for_selector(".facts:has-text('4 × 4 tokens')")
    page.focus("canvas[tabindex] >> nth=0")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".controls:has-text('more like the chosen token')")
    first = pixels(page)
    page.keyboard.press("ArrowRight")
    assert eventually(lambda: pixels(page) != first), "the heat map is of the token beside"
    keep(page, "playground-compare-dark-wide")


def pixels(page) -> str:
    return page.locator("canvas[tabindex]").nth(1).evaluate("(canvas) => canvas.toDataURL()")


@pytest.mark.parametrize(
    ("name", "kind", "media", "facts"),
    [
        ("tone.wav", "audio/wav", samples.sound, "× 128"),
        ("clip.mp4", "video/mp4", samples.clip, "tokens"),
    ],
)
def test_audio_and_clips_are_shown(open_page, name, kind, media, facts):
    page = open_page("light", NARROW, "/#playground")
    page.wait_for_selector(".drop >> nth=0")
    page.set_input_files("input[type=file] >> nth=0", {"name": name, "mimeType": kind, "buffer": media()})
    page.wait_for_selector(f".facts:has-text('{facts}')", timeout=60_000)
    page.wait_for_selector(".controls:has-text('principal components')")
    keep(page, f"playground-{kind.partition('/')[0]}-light-narrow")


def test_media_that_cannot_be_decoded_say_why(open_page):
    page = open_page("light", WIDE, "/#playground")
    page.wait_for_selector(".drop >> nth=0")
    page.set_input_files("input[type=file] >> nth=0", {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_selector("[role=alert]:has-text('the image is in no format that is supported')")


def test_a_server_that_is_gone_is_told(browser, tmp_path):
    with LiveServer("demo", tmp_path / "s") as live:
        live.healthy()
        page = browser.new_page()
        page.goto(live.base_url)
        page.wait_for_selector(".verdict:has-text('Well')")
        live.kill_all()
        page.wait_for_selector(".verdict:has-text('No answer')")
        page.close()


def test_the_proxys_page_draws_its_requests(browser, tmp_path):
    arguments = ["route", "--protocol", "sglang", "--port", "0"]
    with EncoderStandIn() as encoder:
        command = [sys.executable, "-m", "encode_server.cli", *arguments, "--encoder-url", encoder.url]
        with LiveServer("", tmp_path / "route", command=command) as route:
            route.listening()
            for _ in range(3):
                httpx.post(route.base_url + "/encode", json={}, timeout=30)  # refused, and counted
            complaints: list[str] = []
            page = browser.new_page(viewport=NARROW)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(route.base_url)
            page.wait_for_selector("text=1 of 1")
            page.wait_for_selector(".chart canvas")
            assert page.locator(".chart canvas").count() == 2
            assert page.locator("h2:has-text('Latency')").is_visible()
            keep(page, "route-narrow")
            page.close()
    assert complaints == []
