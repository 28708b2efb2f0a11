"""Every draw has a name, and different names draw differently."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trivet.randomness import derive_seed, generator

PURPOSE = st.lists(st.one_of(st.integers(0, 10**6), st.text(max_size=8)), min_size=1, max_size=4)


@given(st.integers(0, 2**40), PURPOSE)
def test_a_stream_is_a_function_of_seed_and_purpose(seed: int, purpose: list) -> None:
    first, second = generator(seed, *purpose), generator(seed, *purpose)
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    assert 0 <= derive_seed(seed, *purpose) < 2**63


@given(st.integers(0, 2**40), PURPOSE, PURPOSE)
def test_different_purposes_have_different_seeds(seed: int, one: list, other: list) -> None:
    assert (derive_seed(seed, *one) == derive_seed(seed, *other)) == (one == other)


def test_a_number_and_its_digits_are_different_purposes() -> None:
    assert derive_seed(0, 1) != derive_seed(0, "1")
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab")


def test_seeds_do_not_change_between_releases() -> None:
    assert derive_seed(0, "attack", 7) == 7438920636694757461
