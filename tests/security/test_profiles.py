"""A profile ends by itself."""

from __future__ import annotations

import httpx

from tests.live import eventually
from tests.security.requests import encode, item


def test_a_profile_has_a_bound_and_ends_by_itself(server):
    refused = httpx.post(server.base_url + "/start_profile", json={"num_steps": 1200})
    assert refused.status_code == 400 and "num_steps" in refused.json()["message"]
    assert httpx.post(server.base_url + "/start_profile", json={"num_steps": 1}).status_code == 200
    assert encode(server, [item(70, 70, 9)]).status_code == 200
    assert eventually(lambda: "no profile is running" in httpx.post(server.base_url + "/stop_profile").text, 20)
