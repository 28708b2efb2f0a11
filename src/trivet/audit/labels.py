"""How tables call an attack or a certifier: its name in the field with the settings that matter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trivet.methods import methods


def label_of(made: Any) -> str:
    """E.g. "PGD-40 x5 (margin)" or "AutoAttack (standard)"; the class name for the user's own."""
    known = [m for m in methods(made.room) if m.make is type(made)]
    text = known[0].title if known else type(made).__name__
    settings = vars(made)
    if "steps" in settings:
        text += f"-{settings['steps']}"
    if settings.get("restarts", 1) > 1:
        text += f" x{settings['restarts']}"
    details = [str(settings[key]) for key in ("version", "loss", "through") if settings.get(key)]
    if settings.get("sigma"):
        details.append(f"sigma {settings['sigma']:g}")
    if settings.get("samples", 1) > 1:
        details.append(f"EOT {settings['samples']}")
    return f"{text} ({', '.join(details)})" if details else text


def distinct(labels: Sequence[str]) -> list[str]:
    """The same labels, numbered where they repeat."""
    seen: dict[str, int] = {}
    out = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        out.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return out


def threat_name(threat: Mapping[str, Any]) -> str:
    """E.g. "linf 8/255", "linf 0.1 or l1 2": a threat model's spec in a few words."""
    name = str(threat.get("name", "threat"))
    scale = threat.get("eps", 1.0)  # of the two that have no radius
    if "threats" in threat:
        said = " or ".join(threat_name(each) for each in threat["threats"])
        return said if scale == 1 else f"{said}, {scale:.4g} times as large"
    if "shift" in threat and "angle" in threat:
        return f"{name} {scale * threat['shift']:.3g} px {scale * threat['angle']:.3g}°"
    return f"{name} {in_pixels(threat['eps'])}" if "eps" in threat else name


def in_pixels(eps: float) -> str:
    """A radius as people write it: 0.1 where that is exact, 8/255 where that is, else four digits."""
    if float(f"{eps:.3g}") != eps:
        levels = round(eps * 255)
        if abs(eps * 255 - levels) < 1e-6 * max(levels, 1):
            return f"{levels}/255"
    return f"{eps:.4g}"
