"""`/docs`: works without internet, its examples run as they are, and it says who needs a key."""

from __future__ import annotations

import re

import httpx
import pytest

from encode_server import __version__
from encode_server.app import create_app
from encode_server.settings import Settings


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(server.base_url + "/openapi.json", timeout=30).json()


def test_the_page_loads_nothing_from_elsewhere(server):
    page = httpx.get(server.base_url + "/docs", timeout=30).text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(addresses) >= 3 and not [address for address in addresses if not address.startswith("/")]
    for address in addresses:
        answer = httpx.get(server.base_url + address, timeout=30)
        assert answer.status_code == 200 and len(answer.content) > 1000, address
    assert '"validatorUrl": null' in page


def test_its_examples_run_as_they_are(server, document):
    examples = document["paths"]["/encode"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert len(examples) >= 2
    for name, example in examples.items():
        answer = httpx.post(server.base_url + "/encode", json=example["value"], timeout=60)
        assert answer.status_code == 200, (name, answer.text)
        assert len(answer.json()["items"]) == len(example["value"]["mm_items"])


def test_it_says_what_needs_a_key(document):
    locked = create_app(Settings(api_keys=("secret",))).openapi()
    assert locked["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert locked["paths"]["/encode"]["post"]["security"] == [{"key": []}]
    assert locked["paths"]["/health"]["get"]["security"] == []
    assert {} in document["paths"]["/encode"]["post"]["security"]


@pytest.mark.parametrize("protocol", ["native", "sglang"])
def test_every_operation_has_an_id_of_its_own(protocol):
    """Or programs that make a client from the document would drop one of two."""
    document = create_app(Settings(protocol=protocol)).openapi()
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(ids) > 10 and len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", ["/livez", "/nothing", "/encode"])
def test_every_answer_names_the_version(server, path):
    assert httpx.post(server.base_url + path, timeout=30).headers["x-encode-server-version"] == __version__
