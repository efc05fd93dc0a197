"""Where embeddings may go unasked: this host and its networks, never a cloud's metadata service."""

import asyncio

import pytest

from encode_server.delivery.destinations import DestinationPolicy
from encode_server.errors import Forbidden


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "10.0.0.7", "192.168.1.1", "100.64.0.1", "192.0.2.2", "fd00::2"])
def test_private_and_loopback_addresses_are_allowed(host):
    assert host in asyncio.run(DestinationPolicy([]).endpoint(host, 5555))


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "169.254.169.254", "fd00:ec2::254", "100.100.100.200", "0.0.0.0", "224.0.0.1"]
)
def test_others_are_not(host):
    with pytest.raises(Forbidden):
        asyncio.run(DestinationPolicy([]).endpoint(host, 5555))


def test_what_the_operator_names_is_allowed():
    policy = DestinationPolicy(["8.8.8.0/24"])
    assert asyncio.run(policy.endpoint("8.8.8.8", 1)) == "tcp://8.8.8.8:1"
