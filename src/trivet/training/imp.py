"""Iterative magnitude pruning: train, drop a fifth of what is left, go back to the first weights, and again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from trivet.claims import Effect, Ledger, Verdict
from trivet.compression.magnitude import Magnitude
from trivet.compression.masks import Masks
from trivet.errors import require
from trivet.methods import method, spec_of
from trivet.models.taps import last_linear
from trivet.training.fit import Fit
from trivet.training.prune import Prune, live
from trivet.training.stage import Checkpoint, Context, Stage


@method(
    title="Iterative magnitude pruning (IMP, A-IMP)",
    paper="Frankle & Carbin, ICLR 2019; for transfer Fu et al., DAC 2023",
    year=2019,
    legs="robust small",
    note="for transfer written from the published settings, the paper's text was not at hand",
)
@dataclass(frozen=True)
class Imp(Stage):
    """`rounds` times: train from theta * m, drop the `share` smallest of what is left, rewind to theta.

        m_0 = 1;   theta_t = fit(theta * m_(t-1));   m_t keeps the largest |theta_t|, (1 - share)^t of all weights

    theta are the weights this stage is given: of a pre-trained network, for a ticket that transfers; of a fresh one,
    for the lottery ticket of Frankle and Carbin. What is handed on is theta * m, bit by bit, statistics of BatchNorm
    and head included, under masks that later stages keep. The objective of `fit` makes it IMP (natural) or A-IMP
    (adversarial); inside `pretrain` it trains on the source (upstream), else on the recipe's data (downstream).

    Weights of all chosen layers compete. The head, the last linear layer, is trained in each round but never pruned.
    In the authors' scripts the first convolution is dense, too: add it to `exclude` for that. Where weights are held
    at zero already, these stay so, and shares are of the others.

    The masks are read off weights that `fit` trained on the records: they are as private as its rule. Each round of a
    private rule spends its budget anew, and all rounds together are what the claim counts.

    Attributes:
        fit: the training of one round.
        rounds: how often; 18 rounds of a fifth leave 1.8 %.
        share: of the remaining weights, dropped in each round.
        include, exclude: shell patterns over the names of layers, as in a compression.
    """

    fit: Fit
    rounds: int = 18
    share: float = 0.2
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds={self.rounds} must be at least 1.")
        require(0 < self.share < 1, f"share={self.share} must lie strictly between 0 and 1.")
        compression = type(self.fit.compression).__name__
        require(
            self.fit.compression is None,
            f"fit.compression={compression} would be left on what is rewound; leave it out.",
        )

    def effect(self) -> Effect:
        return replace(self.fit.effect(), cost=(Verdict.VOID, "the weights were pruned"))

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model = checkpoint.model.to(context.device)
        names = self._names(model)
        free = [live(model.get_submodule(name)) for name in names]
        before = sum(int(each.sum()) for each in free) / sum(each.numel() for each in free)
        masks = Masks(include=names)
        masks.attach(model)
        theta = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        now = replace(checkpoint, model=model, structure=[*checkpoint.structure, spec_of(masks)])
        done, now = self._resumed(now, masks, context)
        files = context.files.inside()
        for number in range(done, self.rounds):
            now.ledger.apply(context.files.name, self.effect())  # claims about the round before
            trained = self.fit.run(now, replace(context, files=files.stage(number, "fit")))
            kept = _kept(trained, names, before * (1 - self.share) ** (number + 1), context)
            model.load_state_dict(theta)
            for name, each in masks.maps(model).items():
                each.mask.copy_(kept[name])
            now = replace(trained, model=model)
            self._save(now, kept, number + 1, context)
        model.eval()
        return replace(now, history=[*now.history, self._record(masks, model)])

    def _names(self, model: nn.Module) -> tuple[str, ...]:
        """The layers to prune."""
        head = last_linear(model)
        layers = Masks(include=self.include, exclude=self.exclude).layers(model)
        names = tuple(name for name, layer in layers.items() if layer is not head)
        require(bool(names), f"include={list(self.include)} leaves the head alone, which is not pruned.")
        return names

    def _record(self, masks: Masks, model: nn.Module) -> dict[str, Any]:
        kept = {name: each.mask for name, each in masks.maps(model).items()}
        weights = sum(mask.numel() for mask in kept.values())
        return {
            "stage": "imp",
            "settings": spec_of(self),
            "kept": {name: int(mask.sum()) for name, mask in kept.items()},
            "density": sum(int(mask.sum()) for mask in kept.values()) / weights,
        }

    def _save(self, now: Checkpoint, kept: Mapping[str, Tensor], done: int, context: Context) -> None:
        # Weights need no saving: those of a ticket are the stage's first ones.
        about = {"round": done, "history": now.history, "ledger": now.ledger.dump()}
        context.files.save_state(kept, about)

    def _resumed(self, fresh: Checkpoint, masks: Masks, context: Context) -> tuple[int, Checkpoint]:
        """How many rounds are over, and the ticket after them."""
        saved = context.files.load_state()
        if saved is None:
            return 0, fresh
        kept, about = saved
        for name, each in masks.maps(fresh.model).items():
            each.mask.copy_(kept[name])
        ledger = Ledger.parse(about["ledger"], context.files.name)
        return about["round"], replace(fresh, ledger=ledger, history=about["history"])


def _kept(trained: Checkpoint, names: tuple[str, ...], density: float, context: Context) -> dict[str, Tensor]:
    """The masks that keep the largest trained weights, of all weights the share `density`."""
    stage = Prune(Magnitude(), density, scope="global", include=names)
    pruned = stage.run(replace(trained, model=copy.deepcopy(trained.model)), context).model
    return {name: each.mask for name, each in Masks(include=names).maps(pruned).items()}
