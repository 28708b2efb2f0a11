"""AutoAttack for tests that are not about its strength."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trivet.threats.attack import Attack
from trivet.threats.autoattack import AutoAttack


@dataclass(frozen=True)
class QuickAutoAttack(AutoAttack):
    """AutoAttack with few steps, so that its contract can be tried often."""

    def components(self) -> dict[str, Attack]:
        short = {"steps": 6, "queries": 100, "restarts": 2}
        return {
            name: replace(attack, **{key: value for key, value in short.items() if hasattr(attack, key)})
            for name, attack in super().components().items()
        }
