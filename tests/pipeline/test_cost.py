"""The cost of a batch follows what the device shows of itself."""

import random

import pytest

from encode_server.pipeline.cost import MOST_PATCHES_PER_PAIR, ForwardCost

PATCHES = [64, 256, 1024, 4096, 9216]


def device(cost: ForwardCost, per_pair: float, pictures: list[int], batches: int = 200, noise: float = 0.1) -> None:
    """A device of 1 us per patch, 2 ms per batch and `per_pair` us per pair executes batches of one to four of them."""
    rng = random.Random(1)
    for _ in range(batches):
        batch = [rng.choice(pictures) for _ in range(rng.randint(1, 4))]
        patches, pairs = sum(batch), sum(n * n for n in batch)
        seconds = (2000 + patches + per_pair * pairs) * 1e-6 * rng.uniform(1 - noise, 1 + noise)
        cost.observe(patches, pairs, seconds)


@pytest.mark.parametrize("per_pair", [1 / 2000, 1 / 7000])
def test_attention_is_found_out(per_pair: float) -> None:
    cost = ForwardCost()
    device(cost, per_pair, PATCHES)
    assert cost.patches_per_pair == pytest.approx(per_pair, rel=0.25)
    assert cost.of(9216, 9216**2) == pytest.approx(9216 + per_pair * 9216**2, rel=0.25)


def test_what_costs_by_the_patch_alone_stays_so() -> None:
    cost = ForwardCost()
    device(cost, 0.0, PATCHES)
    assert cost.of(4096, 4096**2) == pytest.approx(4096, rel=0.15)


@pytest.mark.parametrize("pictures", [[1024], [256, 256]])
def test_pictures_that_are_all_alike_tell_nothing(pictures: list[int]) -> None:
    cost = ForwardCost()
    device(cost, 1 / 2000, pictures)
    assert cost.of(16384, 16384**2) == 16384


def test_what_has_no_pairs_tells_nothing() -> None:
    cost = ForwardCost()
    for frames in [100, 200, 3000] * 20:
        cost.observe(frames, 0, frames * 1e-6)
    assert cost.of(3000, 0) == 3000


def test_a_change_of_the_device_is_followed() -> None:
    """Another tenant, another clock: what was seen long ago no longer counts."""
    cost = ForwardCost()
    device(cost, 1 / 500, PATCHES)
    device(cost, 1 / 7000, PATCHES)
    assert cost.patches_per_pair == pytest.approx(1 / 7000, rel=0.25)


def test_nonsense_does_not_make_pictures_dear_beyond_reason() -> None:
    cost = ForwardCost()
    device(cost, 1.0, PATCHES)
    assert cost.patches_per_pair == MOST_PATCHES_PER_PAIR
