"""The stage that finds an adversarial winning ticket: a sparse start that trains as the dense network would."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trivet import display
from trivet.claims import Effect, Verdict
from trivet.compression.compression import originals
from trivet.compression.masks import Masks
from trivet.compression.pattern import largest
from trivet.data.dataset import Batch
from trivet.errors import TrivetError, require
from trivet.methods import method, spec_of
from trivet.models.lazy_regime import LazyBound, has_batch_norm, lazy_bound
from trivet.models.tangent_kernel import Linearization, linearize, relative_distance, signs, tangent_kernel
from trivet.objectives.objective import Objective, Progress
from trivet.objectives.plain import Plain
from trivet.randomness import derive_seed, generator
from trivet.training.prune import balanced
from trivet.training.stage import Checkpoint, Context, Stage

_PROBES = 32
"""Records, the same all along, on which the distances of the log and of the record are taken."""
Kernel = Literal["masked", "unmasked"]


@method(
    title="Adversarial winning ticket (AWT)",
    paper="Shi, Zheng, Ding, Gao & Zhang, AISTATS 2022",
    year=2022,
    legs="robust small",
    note="reconstruction: no code and no text of the paper could be read",
)
@dataclass(frozen=True)
class Awt(Stage):
    """Before training, find sparse weights whose outputs and mixed tangent kernel are those of the dense network.

        min over theta of   mean (f_m(X~) - f_0(X~))^2 + gamma * mean (K_m(X, X~) - K_0(X, X~))^2
                            + (l2 / density) * || m * theta ||^2

    f_0 is the network as it comes, freshly initialised, f_m(x) = f(m * theta, x), X a batch and X~ adversarial for it.
    theta starts at the dense weights, m keeps the largest of each layer, and every `refresh` steps (not in the last
    `refresh`) m is chosen again from the raw theta: dropped weights, which get no gradient, may come back when kept
    ones shrink. K_m(x, x') = J(x) diag(m) J(x')^T is the kernel that training m * theta follows (`tangent_kernel`).
    Labels serve the attack alone. By Adam, in eval mode, where BatchNorm knows no statistics yet: prefer networks
    without. What is left is m * theta with m frozen; an ordinary `fit` trains it. Biases are learnt, never dropped.

    This is a reconstruction. The two terms, the budget and the mixed kernel are the paper's idea; the optimiser, the
    refresh and the constants are those of its predecessor's code, Neural Tangent Transfer (NTT: Liu & Zenke, ICML
    2020). With `objective: plain` nothing is attacked and this is NTT with a kernel between a batch and itself; NTT's
    own code takes it between two halves of a batch, and all of the Jacobian at the masked weights
    (`kernel: unmasked`).

    Promises nothing about robustness. The paper's theorem is about infinitely wide networks; its computable form for
    the lazy regime is in the record of the stage, with the reasons why it is VOID (`LazyBound`): adversarial training
    makes its examples anew, which alone is enough.

    Measured on the digits (perceptron 64-256-128-10, 5 % kept, l_inf 0.1, 30 epochs of PGD-5, AutoAttack on 200 test
    points, two seeds): the relative mean square of the kernels' difference falls from 0.95 and 0.96 to 0.12 and 0.20,
    and 71.3 % withstand, against 41.8 of magnitude at the start, 17.2 at random, 84.8 of the dense network. But SNIP on
    the adversarial loss reaches 76.2, SynFlow 74.3, GraSP 73.3, the mask on the first weights 75.0, the clean kernel
    73.3, and mask and weights shuffled in each layer 64.3: much of what is gained over random masks is the scale of the
    weights. With 3 % kept it is 32.3 here, 72.8 by SynFlow, 70.5 by SNIP and 36.0 with the clean kernel. Nor does the
    match last: after 5 epochs the kernels are 0.52 to 0.60 apart, and the dense network's own has changed by 1.1 and
    2.3 times its norm. A reason to prefer this to SNIP was not found.

    A killed run begins the transfer again. The stage reads records, without noise: a privacy claim ends here, and no
    later stage can make one.

    Attributes:
        objective: its `perturb` makes X~: pgd_at; trades for an attack that needs no labels; plain for NTT.
        density: the share of weights each layer keeps, in (0, 1].
        steps, batch_size, lr: of Adam; each batch is drawn anew, without replacement.
        gamma: weight of the kernel term. Kernels grow with width: `kernel_scale` in the record is mean(K_0^2).
        l2: weight of the regulariser.
        refresh: steps between choices of the mask.
        kernel: "masked" takes the derivatives by kept weights, "unmasked" by all of them.
        attacked: which network X~ is adversarial for, "dense" or the "student" at that step.
        sketches: random sign vectors, drawn anew at each step, that outputs are projected on for the kernel term;
            None takes all outputs.
        include, exclude: shell patterns over the names of the layers, as in a compression.
    """

    objective: Objective
    density: float = 0.05
    steps: int = 1500
    batch_size: int = 16
    lr: float = 5e-4
    gamma: float = 1e-3
    l2: float = 1e-4
    refresh: int = 100
    kernel: Kernel = "masked"
    attacked: Literal["dense", "student"] = "dense"
    sketches: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, f"density={self.density} must lie in (0, 1].")
        require(self.steps >= 0, f"steps={self.steps} must not be negative.")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        require(0 < self.lr < float("inf"), f"lr={self.lr} must be positive and finite.")
        require(self.gamma >= 0, f"gamma={self.gamma} must not be negative.")
        require(self.l2 >= 0, f"l2={self.l2} must not be negative.")
        require(self.refresh >= 1, f"refresh={self.refresh} must be at least 1.")
        require(self.sketches is None or self.sketches >= 1, f"sketches={self.sketches} must be at least 1.")

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "the weights were pruned")
        privacy = (Verdict.VOID, "which weights stay, and their values, were read off the records, without noise")
        return Effect(privacy=privacy, certificate=changed, attack=changed, accuracy=changed, cost=changed)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        if checkpoint.structure:
            raise TrivetError(
                f"{context.files.name} starts from plain weights, and an earlier stage has put "
                f"{checkpoint.structure[-1].get('name', 'a compression')} on them; let awt come first."
            )
        model = checkpoint.model.to(context.device)
        masks = Masks(include=self.include, exclude=self.exclude)
        transfer = _Transfer(self, model, tuple(masks.layers(model)), context)
        record = transfer.run()
        masks.attach(model)
        layers, maps = masks.layers(model), masks.maps(model)
        with torch.no_grad():
            values = dict(transfer.sparse())
            for name, layer in layers.items():
                (stored,) = originals(layer)
                stored.copy_(values.pop(f"{name}.weight"))
                maps[name].mask.copy_(transfer.masks[f"{name}.weight"])
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
        model.eval()
        structure = [spec_of(Masks(include=tuple(layers)))]
        return replace(checkpoint, model=model, history=[*checkpoint.history, record], structure=structure)


class _Transfer:
    """One execution of an `Awt`: the dense network, the student, and what they are compared on."""

    def __init__(self, awt: Awt, model: nn.Module, layers: tuple[str, ...], context: Context) -> None:
        self.awt, self.context = awt, context
        self.seed = derive_seed(context.seed, "awt", context.files.number)
        self.train = context.splits.train
        self.dense, self.student = copy.deepcopy(model), copy.deepcopy(model)
        learnt = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        self.start = {name: value.clone() for name, value in learnt.items()}
        self.theta = {name: value.clone().requires_grad_() for name, value in learnt.items()}
        self.prunable = tuple(f"{name}.weight" for name in layers)
        for name in self.prunable:
            require(
                name in self.theta,
                f"{name} is no tensor that learns by itself, so no ticket can be found in it; exclude the layer.",
            )
        self.masks = self._choose()
        awt.objective.load_state({})

    def run(self) -> dict[str, Any]:
        """Move theta and the masks; the record of the stage."""
        awt, files = self.awt, self.context.files
        files.rewind_log(0)
        probe = self._batch(balanced(self.train, _PROBES, generator(self.seed, "probes")))
        judged = _Probe(self, probe)
        first, curve = dict(self.masks), [{"step": 0, **judged.distances()}]
        files.log(curve[0])
        optimizer = torch.optim.Adam(list(self.theta.values()), lr=awt.lr)
        with display.progress(f"{files.name} transfer", awt.steps) as advance:
            for step in range(1, awt.steps + 1):
                loss = self._loss(step)
                if not bool(loss.detach().isfinite()):
                    raise TrivetError(
                        f"the loss is not finite at step {step} of {files.name}; lower lr ({awt.lr:g}) or gamma "
                        f"({awt.gamma:g})."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if step % awt.refresh == 0:
                    if step < awt.steps - awt.refresh:
                        self.masks = self._choose()
                    curve.append({"step": step, **judged.distances()})
                    files.log(curve[-1])
                    advance(0, note=f"kernel distance {curve[-1]['kernel_distance']:.3f}")
                advance(1)
        if curve[-1]["step"] != awt.steps:
            curve.append({"step": awt.steps, **judged.distances()})
        came = sum(int((self.masks[name] & ~first[name]).sum()) for name in self.prunable)
        weights = sum(mask.numel() for mask in self.masks.values())
        kept = {name.removesuffix(".weight"): int(mask.sum()) for name, mask in self.masks.items()}
        return {
            "stage": "awt",
            "settings": spec_of(awt),
            "kept": kept,
            "density": sum(kept.values()) / weights,
            "came_back": came,
            "kernel_scale": judged.scale,
            "curve": curve,
            "lazy_regime_bound": judged.lazy_bound(),
            "records": len(self.train),
            "data": self.train.digest(),
        }

    def sparse(self) -> dict[str, Tensor]:
        """The student's parameters: m * theta, differentiable in theta."""
        return {
            name: torch.where(self.masks[name], value, 0.0) if name in self.masks else value
            for name, value in self.theta.items()
        }

    @torch.no_grad()
    def _choose(self) -> dict[str, Tensor]:
        """Of each layer, the largest raw weights."""
        return {
            name: largest(self.theta[name].abs().reshape(-1), self.awt.density).view_as(self.theta[name])
            for name in self.prunable
        }

    def _batch(self, index: Tensor) -> Batch:
        return self.train.batch(index).to(self.context.device)

    def _loss(self, step: int) -> Tensor:
        awt = self.awt
        order = torch.randperm(len(self.train), generator=generator(self.seed, "batch", step))
        batch = self._batch(order[: awt.batch_size])
        attacked = self.perturbed(batch, step)
        left, right = self.projections(step)
        sparse = self.sparse()
        here = linearize(self.student, batch.inputs, sparse, project=left, create_graph=True)
        there = linearize(self.student, attacked, sparse, project=right, create_graph=True)
        dense_here = linearize(self.dense, batch.inputs, self.start, project=left)
        dense_there = linearize(self.dense, attacked, self.start, project=right)
        gap = self.kernel(here, there, awt.kernel) - tangent_kernel(dense_here, dense_there)
        loss = (there.outputs - dense_there.outputs).square().mean() + awt.gamma * gap.square().mean()
        norm = torch.stack([sparse[name].square().sum() for name in self.prunable]).sum()
        return loss + awt.l2 / awt.density * norm

    def kernel(self, here: Linearization, there: Linearization, which: Kernel) -> Tensor:
        # A mask that keeps everything is left out: the closed forms with and without one round differently.
        partial = {name: mask for name, mask in self.masks.items() if not bool(mask.all())}
        return tangent_kernel(here, there, partial if which == "masked" else None)

    def perturbed(self, batch: Batch, step: int) -> Tensor:
        """X~ for a batch."""
        model = self.dense
        if self.awt.attacked == "student":
            model = self.student
            with torch.no_grad():
                for name, value in self.sparse().items():
                    model.get_parameter(name).copy_(value)
        return _adversarial(self.awt.objective, model, batch, derive_seed(self.seed, "attack", step))

    def projections(self, when: int | str) -> tuple[Tensor | None, Tensor | None]:
        """What the outputs at X and at X~ are projected on, drawn apart; None for neither."""
        count, outputs = self.awt.sketches, self.train.num_classes
        if count is None:
            return None, None
        left, right = (signs(outputs, count, self.seed, side, when) for side in ("left", "right"))
        return left.to(self.context.device), right.to(self.context.device)


class _Probe:
    """The same few records, attacked once on the dense network: distances that can be compared along the way."""

    def __init__(self, transfer: _Transfer, batch: Batch) -> None:
        self.transfer, self.batch = transfer, batch
        seed = derive_seed(transfer.seed, "attack", "probes")
        self.x, self.attacked = batch.inputs, _adversarial(transfer.awt.objective, transfer.dense, batch, seed)
        self.sides: tuple[Tensor | None, Tensor | None] = transfer.projections("probes")
        self.here, self.there = self._of(transfer.start)
        self.reference = tangent_kernel(self.here, self.there)
        self.scale = float(self.reference.square().mean())

    def _of(self, parameters: Mapping[str, Tensor]) -> tuple[Linearization, Linearization]:
        at = {name: value.detach() for name, value in parameters.items()}
        model, (left, right) = self.transfer.dense, self.sides
        return linearize(model, self.x, at, project=left), linearize(model, self.attacked, at, project=right)

    def distances(self) -> dict[str, float]:
        """Of the student from the dense network: mean squares, the kernel's relative to the dense one's."""
        here, there = self._of(self.transfer.sparse())
        found = self.transfer.kernel(here, there, "masked")
        return {
            "target_distance": float((there.outputs - self.there.outputs).square().mean()),
            "kernel_distance": float(relative_distance(found, self.reference)),
        }

    def lazy_bound(self) -> dict[str, Any] | None:
        """The diagnostic for the ticket on the attacked probes, one-hot targets; None where outputs are sketched."""
        if self.transfer.awt.sketches is not None:
            return None
        _, there = self._of(self.transfer.sparse())
        with torch.no_grad():
            classes = self.there.outputs.shape[1]
            targets = nn.functional.one_hot(self.batch.labels, classes).to(self.there.outputs)
            bound = lazy_bound(
                tangent_kernel(self.there, self.there),
                self.transfer.kernel(there, there, "masked"),
                self.there.outputs,
                there.outputs,
                targets,
            )
        return _described(bound, self.transfer)


def _adversarial(objective: Objective, model: nn.Module, batch: Batch, seed: int) -> Tensor:
    """What `objective` makes of a batch, at the end of training: radii that grow are at their full size."""
    found = objective.perturb(model, batch, Progress(step=999, steps=1000, epoch=0.0, seed=seed)).detach()
    require(
        found.shape == batch.inputs.shape,
        f"objective={type(objective).__name__} makes several views of a record, and a mixed kernel needs one; choose "
        "pgd_at or trades.",
    )
    return found


def _described(bound: LazyBound, transfer: _Transfer) -> dict[str, Any]:
    """The bound in words. What comes after this stage is not known to it, and is taken to be the usual."""
    reasons = bound.void(
        drift=None,
        squared_loss=False,
        batch_norm=has_batch_norm(transfer.dense),
        momentum_or_decay=False,
        inputs_change=not isinstance(transfer.awt.objective, Plain),
    )
    standing = "VOID: " + "; ".join(reasons)
    print(f"{transfer.context.files.name}: lazy-regime bound {standing}.", file=sys.stderr)
    return {
        "standing": standing,
        "ever": bound.ever if bound.lam > 0 else None,
        "initial": bound.initial,
        "gap": bound.gap,
        "residual": bound.residual,
        "lam": bound.lam,
        "records": bound.records,
    }
