"""Estimates against the sums by hand, and that they scale as counts do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivet.compression.energy import HOROWITZ, SMART_EXCHANGE, TABLES, estimate
from trivet.errors import BadValue

COUNTS = st.integers(0, 10**9)


def test_a_layer_by_hand() -> None:
    """1,000 weights of 32 bits: 1,000 words out of memory at 640 pJ, and half of the 10 pJ of a word of 64 inside."""
    found = estimate(macs=50_000, weight_bits=32_000, activations=300)
    assert found.table == "Horowitz 45 nm"
    assert found.weights == pytest.approx(1000 * (640 + 5))
    assert found.activations == pytest.approx(300 * 5)
    assert found.operations == pytest.approx(50_000 * 4.6)
    assert found.total == pytest.approx(645_000 + 1_500 + 230_000)


def test_a_word_from_memory_costs_6400_additions_of_32_bit_integers() -> None:
    """The ratio by which the table is usually quoted; its addition of 32 bits is 0.1 pJ."""
    assert HOROWITZ.dram * 32 / 0.1 == pytest.approx(6400)


def test_only_one_table_is_stated_without_reserve() -> None:
    assert [table.verified for table in TABLES] == ["unverified" not in table.name for table in TABLES] == [True, False]


@given(COUNTS, COUNTS, COUNTS, COUNTS, st.sampled_from(TABLES), st.integers(2, 9))
def test_an_estimate_is_linear_in_what_is_counted(
    macs: int, bits: int, activations: int, adds: int, table: Any, times: int
) -> None:
    counts = {"macs": macs, "weight_bits": bits, "activations": activations, "rebuild_adds": adds}
    once = estimate(**counts, arithmetic="int8", table=table).total
    more = estimate(**{k: times * v for k, v in counts.items()}, arithmetic="int8", table=table).total
    assert more == pytest.approx(times * once)
    assert once <= estimate(**counts | {"rebuild_adds": adds + 1}, arithmetic="int8", table=table).total


def test_what_the_table_lacks_is_refused() -> None:
    with pytest.raises(BadValue, match="arithmetic=float32 is not in the table"):
        estimate(macs=1, weight_bits=1, activations=1, table=SMART_EXCHANGE)
    with pytest.raises(BadValue, match="macs=-1 must not be negative"):
        estimate(macs=-1, weight_bits=1, activations=1)
