"""Audits against unions of threats: a battery for each type of perturbation, and what it leaves of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from trivet.audit.labels import distinct, label_of, threat_name
from trivet.audit.masking import Behaviour
from trivet.audit.sweep import P, Sweep
from trivet.methods import spec_of
from trivet.threats.affine import Affine
from trivet.threats.attack import Attack
from trivet.threats.autoattack import AutoAttack
from trivet.threats.l1 import L1
from trivet.threats.pgd import PGD
from trivet.threats.pointwise import Pointwise
from trivet.threats.rotation_translation import RotationTranslation, RotationTranslationSearch
from trivet.threats.slide import Slide
from trivet.threats.square import Square
from trivet.threats.threat import ThreatModel
from trivet.threats.union import WorstOf, over_members


class Types(NamedTuple):
    """By type of perturbation, [N] bool each.

    Attributes:
        standing: after all attacks on that member of the union; empty unless the threat is a union.
        white_box: after those that follow gradients, of members that were also attacked without.
    """

    standing: dict[str, Tensor]
    white_box: dict[str, Tensor]


def battery(threat: ThreatModel, asked: Sequence[Attack], seen: Behaviour, samples: int) -> tuple[Attack, ...]:
    """The attacks to run against `threat`.

    Those `asked` for on the whole of a union are run on each member, and rotations among these are searched. If none
    is asked for, the standard ones on each member, and a mixture of them all.

    Args:
        samples: to average gradients over where the model turns out to be randomised.
    """
    if asked:
        made = [each for attack in asked for each in _spread(attack)]
        return tuple(made if len(threat.members) == 1 else dict.fromkeys(made))  # one search of rotations is enough
    members = threat.members
    several = len(members) > 1
    made = [each for member in members for each in _standard(member, seen, samples, several)]
    rotations = sum(isinstance(member, RotationTranslation) for member in members)
    if several and rotations < min(2, len(members)):
        made.append(Affine(threat))
    return tuple(made)


def _standard(member: ThreatModel, seen: Behaviour, samples: int, several: bool) -> tuple[Attack, ...]:
    if isinstance(member, RotationTranslation):
        return (RotationTranslationSearch(member),)
    samples = samples if seen.randomised else 1
    made: tuple[Attack, ...] = tuple(
        PGD(member, 40, restarts=5, loss=loss, samples=samples) for loss in ("ce", "margin")
    )
    if member.norm in P:  # AutoAttack and Square know no other geometry
        made += (AutoAttack(member, "rand" if seen.randomised else "standard"),)
        made += () if seen.differentiable else (Square(member),)
    if several and isinstance(member, L1):
        made += (Slide(member, restarts=5), Pointwise(member))
    return made


def _spread(attack: Attack) -> tuple[Attack, ...]:
    whole = len(attack.threat.members) > 1 and not attack.outside and not isinstance(attack, WorstOf)
    made = over_members(attack.threat, lambda member: replace(attack, threat=member)) if whole else attack
    return made.attacks if whole and isinstance(made, WorstOf) else (made,)


def labels(threat: ThreatModel, attacks: Sequence[Attack]) -> list[str]:
    """How tables call the attacks: with their type of perturbation where there are several."""
    if len(threat.members) == 1:
        return distinct([label_of(attack) for attack in attacks])
    said = ["mixing types" if attack.outside else threat_name(spec_of(attack.threat)) for attack in attacks]
    return distinct([f"{label_of(attack)}, {about}" for attack, about in zip(attacks, said, strict=True)])


def by_type(threat: ThreatModel, attacks: Sequence[Attack], sweep: Sweep) -> Types:
    """What stands of each member alone; members that no attack could be run on are left out."""
    standing: dict[str, Tensor] = {}
    white_box: dict[str, Tensor] = {}
    named = list(zip(attacks, labels(threat, attacks), strict=True))
    for member in threat.members if len(threat.members) > 1 else ():
        name = threat_name(spec_of(member))
        own = [(attack, label) for attack, label in named if attack.threat == member and label in sweep.standing]
        followed = [sweep.white_box[label] for _, label in own if label in sweep.white_box]
        if own:
            standing[name] = torch.stack([sweep.standing[label] for _, label in own]).all(0)
        if followed and any(attack.gradient_free or isinstance(attack, AutoAttack) for attack, _ in own):
            white_box[name] = torch.stack(followed).all(0)
    return Types(standing, white_box)
