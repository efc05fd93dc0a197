"""The exercise of a rolling upgrade: when its stand-in for an engine takes a chat, and, slowly, that nothing fails."""

from __future__ import annotations

import json
import threading

import httpx
import pytest

from benchmarks import upgrade
from encode_server.delivery.folder import ENTRY


def test_a_chat_whose_embedding_is_not_in_the_store_fails(tmp_path):
    with upgrade.Engine(tmp_path) as engine:
        threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

        def chat(*parts: dict[str, str]) -> int:
            body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]}
            return httpx.post(engine.url + "/v1/chat/completions", json=body, timeout=30).status_code

        (tmp_path / "here").mkdir()
        (tmp_path / "here" / ENTRY).touch()
        here, gone = {"type": "image_url", "uuid": "here"}, {"type": "image_url", "uuid": "gone"}
        statuses = [chat(here), chat(here, gone), chat()]
        engine.shutdown()
    assert statuses == [200, 424, 424] and engine.chats == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_chat_fails_while_every_server_is_replaced(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["upgrade", "--minutes=1", "--pause-s=1", f"--json={file}"])
    assert upgrade.main() == 0
    found = json.loads(file.read_text())
    assert found["requests"] == found["chats_with_embeddings"] > 100 and found["failed"] == 0
    assert {one["server"] for one in found["upgrades"]} == {0, 1, 2} and found["as_configured"]
    assert "0 failed" in capsys.readouterr().out
