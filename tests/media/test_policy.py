"""The SSRF matrix: which URLs may be reached, without one packet on the wire."""

import asyncio
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpcore
import pytest

from encode_server.errors import BadMedia, EncodeError, Forbidden
from encode_server.media.addresses import parse_address
from encode_server.media.limits import MediaLimits
from encode_server.media.policy import UrlPolicy
from encode_server.media.web import WebFetcher

# Reading the system's certificates for each row would take most of the time.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Reached(Exception):
    """The policy let the request through to this address."""


class NoNetwork(httpcore.AsyncNetworkBackend):
    async def connect_tcp(self, host: str, port: int, *args: object) -> None:
        raise Reached(host)


def outcome(url: str, allow: Sequence[str] = (), answers: Sequence[str] = ("93.184.216.34",)) -> str:
    """The address connected to, or the word of the error's code. Every name resolves to `answers`."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        return answers

    async def fetch() -> None:
        with ThreadPoolExecutor(1) as executor:
            web = WebFetcher(
                UrlPolicy(allow),
                MediaLimits(fetch_seconds=5),
                executor,
                resolve=resolve,
                ssl_context=NO_CERTIFICATES,
                network=NoNetwork(),
            )
            try:
                await web.get(url)
            finally:
                await web.aclose()

    try:
        asyncio.run(fetch())
    except Reached as reached:
        return str(reached)
    except EncodeError as error:
        return error.code
    raise AssertionError("no outcome")


REFUSED = [
    "http://127.0.0.1/",
    "http://127.255.255.254/",
    "http://0.0.0.0/",
    "http://0.1.2.3/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://100.100.100.200/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/machine",
    "http://192.0.0.192/opc/v2/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://198.51.100.7/",
    "http://203.0.113.9/",
    "http://192.88.99.1/",
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    # The same addresses in notations that some resolvers read.
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0x7f.0.0.0x1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://3232235777/",
    "http://127.0.0.1./",
    "http://127.0.0.1.:80/",
    "http://0/",
    "http://0x/",
    "http://1.0x7f/",
    # IPv6, and IPv4 in IPv6.
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::ffff:0:127.0.0.1]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::127.0.0.1]/",
    "http://[64:ff9b::10.0.0.1]/",
    "http://[64:ff9b::169.254.169.254]/",
    "http://[64:ff9b:1::10.0.0.1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/",
    "http://[2606:4700::5efe:10.0.0.1]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[fd20:ce::254]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[100::1]/",
    "http://[5f00::1]/",
    # The host is what stands after the last @ and before the first slash.
    "https://[::1]:443/",
    "http://LOCALHOST.:0x50/",
]

MALFORMED = [
    "http://93.184.216.34@127.0.0.1/",
    "http://user:secret@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1%00.example.com/",
    "http://127.0.0.1%2f.example.com/",
    "http://[fe80::1%25eth0]/",
    "http://\uff11\uff12\uff17.0.0.1/",
    "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/",
    "http://exa mple.com/",
    "http://exam\tple.com/",
    "http://example.com\r\nX: y/",
    "http:///path",
    "http:example.com",
    "http://",
    "http://[::1",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://[::1]:80:80/",
    "http://" + "a" * 300 + ".com/",
]

# What a name resolves to, and what becomes of the request with the default policy.
RESOLUTIONS = [
    (["93.184.216.34"], "93.184.216.34"),
    (["2606:4700::1111"], "2606:4700::1111"),
    (["::ffff:93.184.216.34"], "93.184.216.34"),
    (["64:ff9b::5db8:d822"], "64:ff9b::5db8:d822"),
    (["127.0.0.1"], "forbidden"),
    (["::1"], "forbidden"),
    (["93.184.216.34", "10.0.0.1"], "forbidden"),
    (["10.0.0.1", "93.184.216.34"], "forbidden"),
    (["::ffff:10.0.0.1"], "forbidden"),
    (["fe80::1%eth0"], "forbidden"),
    (["169.254.169.254"], "forbidden"),
    ([], "bad_media"),
]

ALLOWED = [
    # (entries, URL, what the name resolves to, outcome)
    (["public"], "http://example.com/", "93.184.216.34", "93.184.216.34"),
    (["public"], "http://localhost/", "127.0.0.1", "forbidden"),
    (["off"], "http://example.com/", "93.184.216.34", "forbidden"),
    (["off"], "http://93.184.216.34/", "", "forbidden"),
    (["127.0.0.1"], "http://127.0.0.1:81/", "", "127.0.0.1"),
    (["127.0.0.1"], "http://localhost/", "127.0.0.1", "127.0.0.1"),
    (["127.0.0.1"], "http://[::ffff:127.0.0.1]/", "", "127.0.0.1"),
    (["127.0.0.1"], "http://127.0.0.2/", "", "forbidden"),
    (["127.0.0.1"], "http://example.com/", "93.184.216.34", "forbidden"),
    (["127.0.0.1:8000"], "http://127.0.0.1:8000/", "", "127.0.0.1"),
    (["127.0.0.1:8000"], "http://127.0.0.1:8001/", "", "forbidden"),
    (["127.0.0.0/8"], "http://2130706433/", "127.0.0.1", "forbidden"),
    (["public", "10.0.0.0/8"], "http://10.1.2.3/", "", "10.1.2.3"),
    (["public", "10.0.0.0/8"], "http://example.com/", "93.184.216.34", "93.184.216.34"),
    (["public", "10.0.0.0/8"], "http://192.168.0.1/", "", "forbidden"),
    (["public", "10.0.0.0/8:9000"], "http://10.1.2.3:9000/", "", "10.1.2.3"),
    (["public", "10.0.0.0/8:9000"], "http://10.1.2.3/", "", "forbidden"),
    (["[fd00::/8]:9000"], "http://[fd00::1]:9000/", "", "fd00::1"),
    (["fd00::/8"], "http://[fd00::1]:9000/", "", "fd00::1"),
    (["[::1]"], "http://[::1]/", "", "::1"),
    (["media.internal"], "http://media.internal/", "10.0.0.7", "10.0.0.7"),
    (["media.internal"], "http://MEDIA.internal./", "10.0.0.7", "10.0.0.7"),
    (["media.internal"], "http://media.internal/", "169.254.169.254", "forbidden"),
    (["media.internal"], "http://media.internal/", "fd00:ec2::254", "forbidden"),
    (["media.internal"], "http://other.internal/", "10.0.0.7", "forbidden"),
    (["media.internal"], "http://10.0.0.7/", "", "forbidden"),
    (["media.internal:8000"], "http://media.internal/", "10.0.0.7", "forbidden"),
    (["*.example.com"], "https://a.b.example.com/", "93.184.216.34", "93.184.216.34"),
    (["*.Example.com"], "https://A.EXAMPLE.COM/", "93.184.216.34", "93.184.216.34"),
    (["*.example.com"], "https://example.com/", "93.184.216.34", "forbidden"),
    (["*.example.com"], "https://badexample.com/", "93.184.216.34", "forbidden"),
    (["*.example.com"], "https://example.com.evil.net/", "93.184.216.34", "forbidden"),
    (["*.example.com"], "https://a.example.com/", "10.0.0.1", "forbidden"),
    (["*.example.com", "10.0.0.0/8"], "https://a.example.com/", "10.0.0.1", "10.0.0.1"),
    (["169.254.169.254"], "http://169.254.169.254/", "", "169.254.169.254"),
]


@pytest.mark.parametrize("url", REFUSED)
def test_addresses_off_the_public_internet_are_refused(url: str) -> None:
    # A resolver that would be asked for an odd notation says what the C library says: loopback.
    assert outcome(url, answers=["127.0.0.1"]) in ("forbidden", "bad_media")


@pytest.mark.parametrize("url", MALFORMED)
def test_malformed_urls_are_refused(url: str) -> None:
    assert outcome(url) in ("bad_media", "forbidden")


@pytest.mark.parametrize(("answers", "expected"), RESOLUTIONS)
def test_every_address_of_a_name_counts(answers: list[str], expected: str) -> None:
    assert outcome("https://example.com/cat.jpg", answers=answers) == expected


@pytest.mark.parametrize(("allow", "url", "answer", "expected"), ALLOWED)
def test_the_allow_list(allow: list[str], url: str, answer: str, expected: str) -> None:
    assert outcome(url, allow, [answer] if answer else []) == expected


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "172.32.0.1", "100.128.0.1", "[2606:4700::1111]"])
def test_public_addresses_are_reached(address: str) -> None:
    assert outcome(f"http://{address}/") == address.strip("[]")


@pytest.mark.parametrize(
    "entry", ["", "http://example.com", "10.0.0.1/8", "*", "*.", "a*.com", "example.com:0", "127.1", "300.1.1.1", "a b"]
)
def test_an_entry_that_means_nothing_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match=r"expected|port"):
        UrlPolicy([entry])


def test_off_stands_alone() -> None:
    with pytest.raises(ValueError, match="alone"):
        UrlPolicy(["off", "public"])


def test_a_name_no_entry_can_allow_is_not_even_resolved() -> None:
    with pytest.raises(Forbidden):
        UrlPolicy(["*.example.com"]).check_host("secret.attacker.net", 80)


def test_a_refusal_names_the_host_and_not_what_it_resolved_to() -> None:
    with pytest.raises(Forbidden) as caught:
        UrlPolicy().check_address("intranet.example", 80, parse_address("10.9.8.7"))
    assert "intranet.example" in caught.value.message
    assert "10.9" not in caught.value.message
    assert isinstance(caught.value, EncodeError)
    assert not isinstance(caught.value, BadMedia)
