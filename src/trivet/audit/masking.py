"""Signs of gradient masking: attacks that were hindered rather than withstood.

The first group are the flags of AutoAttack (Croce & Hein, ICML 2020), the second the tests of Athalye, Carlini & Wagner
(ICML 2018) and Carlini et al. ("On evaluating adversarial robustness", 2019). None of them proves anything when it
stays down; when one is raised, accuracy under attack says little about robustness until an attack made for
this very model has been tried.

Two accuracies are compared on the same points. A difference counts where it exceeds its threshold by two standard
errors of a paired difference, so that no flag is raised by a few points that could have gone either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trivet.audit.findings import Check
from trivet.audit.probes import Probes
from trivet.statistics import Rate

SPREAD = 1e-4
ONE_STEP, AGREEMENT, BLACK_BOX, EFFORT, RISE = 0.005, 0.05, 0.002, 0.005, 0.005
ZERO_SHARE = 0.01
STARK, DEAD_PIXELS = 0.1, 0.5


@dataclass(frozen=True)
class Behaviour:
    """What a model's outputs and gradients look like, see `trivet.audit.gradients`. None: it has no gradient.

    `stark` and `dead_pixels` are what `thresholding` returns, None also where it saw nothing.
    """

    classes: int
    labels_change: float
    logits_change: float
    probabilities: bool
    inner_gradients: bool
    differentiable: bool
    zero_ce: float | None = None
    zero_dlr: float | None = None
    stark: float | None = None
    dead_pixels: float | None = None

    @property
    def randomised(self) -> bool:
        return self.labels_change > 0 or self.logits_change > SPREAD


def of_behaviour(seen: Behaviour) -> list[Check]:
    """The flags that need no attack."""
    return [
        _check(
            "randomised",
            "Randomised outputs",
            seen.randomised,
            f"any label, or the logits by more than {SPREAD:g} of their norm, differs between five passes",
            {"labels changed, %": 100 * seen.labels_change, "logits changed, %": 100 * seen.logits_change},
            "One answer is a draw: attacks must average gradients over draws (EOT: `samples: 20`, or AutoAttack's "
            "version `rand`), and single verdicts are luck.",
        ),
        _check(
            "probabilities",
            "Outputs look like probabilities",
            seen.probabilities,
            "all outputs lie in [0, 1] and every row sums to 1",
            {},
            "A softmax in the model flattens the loss where attacks need its slope; remove it and audit the logits.",
        ),
        _check(
            "no_gradient",
            "No input gradient",
            not seen.differentiable,
            "the logits cannot be differentiated by the input",
            {},
            "Only attacks that ask for outputs could run: a weak bound. Audit the differentiable original too.",
        ),
        _check(
            "zero_gradients",
            "Zero input gradients",
            None if seen.zero_ce is None else seen.zero_ce >= ZERO_SHARE,
            f"the cross-entropy's gradient is zero in every pixel for {100 * ZERO_SHARE:g} % of the points or more",
            {} if seen.zero_ce is None else {"points, %": 100 * seen.zero_ce},
            "Saturated logits or a rounding step hide the direction; attack the margin, or pass gradients straight "
            "through the step (BPDA).",
        ),
        _check(
            "zero_gradients_dlr",
            "Zero input gradients of the DLR loss",
            None if seen.zero_dlr is None else seen.zero_dlr > 0,
            "the DLR loss's gradient is zero in every pixel for any point",
            {} if seen.zero_dlr is None else {"points, %": 100 * seen.zero_dlr},
            "AutoAttack cannot move these points by gradients; it relies on its black-box part there.",
        ),
        _check(
            "thresholds_inputs",
            "Inputs are thresholded",
            None
            if seen.stark is None or seen.dead_pixels is None
            else seen.stark < STARK and seen.dead_pixels > DEAD_PIXELS,
            f"inputs made black and white change the logits by less than {100 * STARK:g} % of their norm, and more "
            f"than {100 * DEAD_PIXELS:g} % of the entries of the input gradient are zero",
            {}
            if seen.stark is None or seen.dead_pixels is None
            else {"logits changed, %": 100 * seen.stark, "zero entries, %": 100 * seen.dead_pixels},
            "A step in the first layer withstands small changes of all pixels by hiding the gradient of large changes "
            "of a few: under l_1 and l_2, believe only attacks that need no gradient (Tramer & Boneh 2019).",
        ),
        _check(
            "inner_gradients",
            "Gradients computed inside the model",
            seen.inner_gradients,
            "the forward pass calls the autograd engine",
            {},
            "The model optimises at test time: its outputs are a moving target, and attacks need to be adapted to it.",
        ),
        _check(
            "few_classes",
            "Few classes",
            seen.classes < 4,
            "fewer than four classes",
            {"classes": float(seen.classes)},
            "The DLR losses are not defined as published with so few classes; plainer differences of logits stand in.",
            severity="note",
        ),
    ]


def of_probes(probes: Probes | None, eps: float, classes: int) -> list[Check]:
    """The flags that compare attacks; None if there was no gradient to follow."""
    if probes is None or eps == 0:
        return []
    p = probes
    return [
        _comparison(
            "one_step_stronger",
            "One step beats many",
            ("FGSM", p.one_step),
            ("PGD", p.ce),
            ONE_STEP,
            "Small steps get stuck where one large one does not: the loss surface is rugged, on purpose or from "
            "overfitting to one-step attacks.",
        ),
        _comparison(
            "losses_disagree",
            "Losses disagree",
            ("PGD on the margin", p.margin),
            ("PGD on the cross-entropy", p.ce),
            AGREEMENT,
            "Scaled or saturated logits starve one of the losses; only the stronger one says anything.",
            both_ways=True,
        ),
        _comparison(
            "black_box_stronger",
            "Black box beats white box",
            ("search by outputs", p.black_box),
            ("search by gradients", p.white_box),
            BLACK_BOX,
            "Attacks that see only outputs break points that gradients do not: the gradients mislead.",
        ),
        _comparison(
            "more_effort",
            "Not converged",
            ("PGD-100", p.longer),
            ("PGD-20", p.ce),
            EFFORT,
            "More steps still break more points: raise `steps` and `restarts` until they no longer do.",
        ),
        _rising(p),
        _whole_range(p, classes),
    ]


def of_components(broke: dict[str, int], points: int) -> list[Check]:
    """AutoAttack's own flag: its black-box part, run last, breaks more than 0.2 % of the points."""
    by_square = sum(number for name, number in broke.items() if "square" in name.lower())
    return [
        _check(
            "square_stronger",
            "Square beats AutoAttack's gradients",
            by_square > max(BLACK_BOX * points, 2 * math.sqrt(by_square)),
            f"of all points, Square breaks more than {100 * BLACK_BOX:g} % that the other parts left",
            {"broken by Square, %": 100 * by_square / max(points, 1)},
            "Attacks that see only outputs break points that gradients do not: the gradients mislead.",
        )
    ]


def of_types(white_box: dict[str, Tensor], standing: dict[str, Tensor]) -> list[Check]:
    """The flag that Tramer & Boneh (NeurIPS 2019) owe their lesson to: by type of perturbation, what attacks that need
    no gradient break after all that follow gradients.

    Args:
        white_box, standing: [N] bool by type: what gradient attacks leave, and what all attacks of the type leave.
            Types that were attacked in one way only are not in `white_box`.
    """
    if not white_box:
        return []
    excess = {name: _excess(left, standing[name]) for name, left in white_box.items()}
    return [
        _check(
            "gradient_free_stronger",
            "Attacks without gradients find more",
            any(more - 2 * error > BLACK_BOX for more, error in excess.values()),
            f"of any type, they break more than {100 * BLACK_BOX:g} % of the points, by two standard errors, that "
            "attacks by gradients left",
            {f"{name}, %": 100 * more for name, (more, _) in excess.items()},
            "Gradients of this type of perturbation are masked; its accuracy under gradient attacks is too high, and "
            "so may be what is left here.",
        )
    ]


def of_transfers(white_box: dict[str, Tensor], transferred: dict[str, Tensor]) -> list[Check]:
    """The flag of an output layer that hides its gradients: points made for its twins break more than its own do.

    Args:
        white_box, transferred: by attack, [N] bool: what attacks by the model's gradients leave, and what those leave
            that were made for a twin. None of the latter: the model has no twin, and nothing is said.
    """
    if not white_box or not transferred:
        return []
    return [
        _comparison(
            "transfer_stronger",
            "Transfer beats white box",
            ("points made for a twin", torch.stack(list(transferred.values())).all(0)),
            ("all attacks by the model's own gradients", torch.stack(list(white_box.values())).all(0)),
            BLACK_BOX,
            "The output layer masks gradients: only the worst case over all attacks, transferred points among them, "
            "says anything, and it may still be too high.",
        )
    ]


def _rising(probes: Probes) -> Check:
    """Accuracy must not rise with the radius: a larger set holds the smaller one."""
    worst, where, raised = 0.0, 0.0, False
    radii = sorted(probes.curve)
    for small, large in pairwise(radii):
        rise, error = _excess(probes.curve[large], probes.curve[small])
        raised |= rise - 2 * error > RISE
        if rise > worst:
            worst, where = rise, large
    return _check(
        "rises_with_eps",
        "Accuracy rises with the radius",
        raised,
        f"more accuracy at a larger radius, by {100 * RISE:g} points and two standard errors",
        {"rise, points": 100 * worst} | ({"at eps": where} if worst else {}),
        "A larger set holds every adversarial point of the smaller one; the search lost them.",
    )


def _whole_range(probes: Probes, classes: int) -> Check:
    """When every image is allowed, at most one in K can stay right: the one input shown for all gives one answer."""
    rate = None if probes.whole is None else Rate(int(probes.whole.sum()), len(probes.whole))
    return _check(
        "survives_everything",
        "Survives an unbounded attack",
        None if rate is None else rate.interval[0] > 1 / classes,
        "accuracy clearly above chance when every pixel may take any value",
        {} if rate is None else {"accuracy, %": 100 * rate.value, "chance, %": 100 / classes},
        "Any image can be turned into any other at this radius, so what is left measures the attack's failure.",
    )


def _comparison(
    name: str,
    title: str,
    first: tuple[str, Tensor],
    second: tuple[str, Tensor],
    threshold: float,
    meaning: str,
    *,
    both_ways: bool = False,
) -> Check:
    """Raised where `first` leaves less than `second` (or, `both_ways`, another accuracy) by more than `threshold`."""
    excess, error = _excess(second[1], first[1])
    raised = (abs(excess) if both_ways else excess) - 2 * error > threshold
    how = "another" if both_ways else "less"
    return _check(
        name,
        title,
        raised,
        f"{first[0]} leaves {how} accuracy than {second[0]}, by {100 * threshold:g} points and two standard errors",
        {f"{name}, %": _percent(standing) for name, standing in (first, second)},
        meaning,
    )


def _excess(more: Tensor, less: Tensor) -> tuple[float, float]:
    """How much more accuracy `more` [N] bool holds than `less`, and the standard error of that.

    Of the points that differ, each falls to either side as a fair coin would if there were no difference.
    """
    gained, lost = int((more & ~less).sum()), int((less & ~more).sum())
    points = max(len(more), 1)
    return (gained - lost) / points, math.sqrt(gained + lost) / points


def _percent(standing: Tensor) -> float:
    return 100 * float(standing.double().mean()) if len(standing) else 0.0


def _check(
    name: str,
    title: str,
    raised: bool | None,
    rule: str,
    measured: dict[str, float],
    meaning: str,
    severity: str = "warning",
) -> Check:
    return Check(
        name=name,
        title=title,
        kind="masking",
        severity=severity,  # type: ignore[arg-type]
        raised=None if raised is None else bool(raised),
        rule=rule,
        measured=measured,
        meaning=meaning,
    )
