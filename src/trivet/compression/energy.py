"""What one answer would cost in energy by published figures for single operations: an estimate, nothing is measured.

The figures are of silicon of their time and leave out control, clocks and leakage. Only ratios between networks counted
with the same table mean anything; so every estimate carries the name of its table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trivet.errors import require

Arithmetic = Literal["float32", "int8"]
_BITS: dict[Arithmetic, int] = {"float32": 32, "int8": 8}


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules of single operations.

    Attributes:
        name: what every result is stated with.
        source: where the figures stand.
        verified: whether they were compared with a text that quotes them.
        dram, sram: of moving one bit.
        mac: of a multiplication with addition, by arithmetic; what is not in it cannot be estimated.
        add: of an addition of 8-bit integers, and of a shift with addition.
    """

    name: str
    source: str
    verified: bool
    dram: float
    sram: float
    mac: dict[Arithmetic, float]
    add: float


HOROWITZ = EnergyTable(
    name="Horowitz 45 nm",
    source="Horowitz, ISSCC 2014",
    verified=True,
    dram=640 / 32,  # 640 pJ for a word of 32 bits
    sram=10 / 64,  # 10 pJ for a word of 64 bits out of 8 KB
    mac={"float32": 3.7 + 0.9, "int8": 0.2 + 0.03},
    add=0.03,
)
SMART_EXCHANGE = EnergyTable(
    name="SmartExchange 28 nm (unverified)",
    source="Zhao et al., ISCA 2020, from memory",
    verified=False,
    dram=100 / 8,  # all figures are for 8 bits
    sram=2.45 / 8,  # the upper end of 1.36 to 2.45, for larger memories
    mac={"int8": 0.143},
    add=0.019,
)
TABLES = (HOROWITZ, SMART_EXCHANGE)


@dataclass(frozen=True)
class Energy:
    """An estimate for one answer, in picojoules, and the table it was made with."""

    table: str
    arithmetic: Arithmetic
    weights: float
    activations: float
    operations: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.operations


def estimate(
    *,
    macs: int,
    weight_bits: int,
    activations: int,
    arithmetic: Arithmetic = "float32",
    rebuild_adds: int = 0,
    table: EnergyTable = HOROWITZ,
) -> Energy:
    """E = weight_bits (e_dram + e_sram) + rebuild_adds e_add + activations width e_sram + macs e_mac.

    Every stored weight is fetched once from outside and read once inside; what layers read and write stays inside.

    Args:
        macs: multiplications with addition for one input.
        weight_bits: of all weights as they are stored.
        activations: numbers that layers read and write for one input.
        arithmetic: what is multiplied; also the width of an activation.
        rebuild_adds: shifts with addition that make weights out of what is stored, as SmartDeal does: three for each
            coefficient that is not zero.
        table: of the energies of single operations.

    Raises:
        BadValue: negative counts, or an arithmetic that the table does not have.
    """
    counts = {"macs": macs, "weight_bits": weight_bits, "activations": activations, "rebuild_adds": rebuild_adds}
    for name, value in counts.items():
        require(value >= 0, f"{name}={value} must not be negative.")
    require(
        arithmetic in table.mac, f"arithmetic={arithmetic} is not in the table {table.name}: {', '.join(table.mac)}."
    )
    return Energy(
        table=table.name,
        arithmetic=arithmetic,
        weights=weight_bits * (table.dram + table.sram) + rebuild_adds * table.add,
        activations=activations * _BITS[arithmetic] * table.sram,
        operations=macs * table.mac[arithmetic],
    )
