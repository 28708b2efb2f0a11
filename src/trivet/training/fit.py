"""The training stage: mini-batches, an objective, a gradient rule, an optimizer, and exact resumption."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trivet import display
from trivet.claims import Effect, Verdict
from trivet.compression.compression import Compression, Moment
from trivet.compression.structure import Structure
from trivet.data.augment import Augmentation
from trivet.data.dataset import Batch, Dataset
from trivet.errors import TrivetError, require
from trivet.methods import method, spec_of
from trivet.models.modes import device_of, evaluating
from trivet.models.surrogate import Precision
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.privacy.dp_sgd import PrivatePlan
from trivet.privacy.gradient_rule import GradientRule, PerExample
from trivet.privacy.mean import MeanGradient
from trivet.randomness import derive_seed, generator
from trivet.threats.pgd import PGD, fgsm
from trivet.threats.union import over_members
from trivet.training.averaging import MovingAverage
from trivet.training.independence import require_independence
from trivet.training.optimizers import Optimizer, Sgd
from trivet.training.private_stage import PrivateStage
from trivet.training.schedules import Cosine, Schedule
from trivet.training.stage import Checkpoint, Context, Stage

_LOG_EVERY = 50  # steps between log lines: enough for a curve, too few to slow a step down
_SAVE_EVERY = 30.0  # seconds between saved states, when `save_every` is not set: what a kill may cost
_SAVE_PRIVATE_EVERY = 5.0  # the same where steps cannot be taken again, because their privacy is spent


@method(title="Training")
@dataclass(frozen=True)
class Fit(Stage):
    """Minimise an objective by mini-batch steps over the training records, each epoch in a fresh random order.

    Every random draw is a function of the run's seed and the step, so that a run killed at any moment resumes to
    bit-identical weights on the CPU (with the same number of threads).

    Attributes:
        objective: what is minimised.
        epochs: passes over the training records.
        batch_size: records per optimiser step; the last batch of an epoch may be smaller.
        optimizer, schedule: the peak rate and its course over training.
        rule: from per-example losses to the update direction; the mean gradient unless privacy is asked for.
        augment: applied to each batch before the objective sees it.
        compression: what makes the weights small while they train, and stays on them in later stages.
        average: decay of an exponential moving average of the weights, which then is the result; None for none.
        l1: weight of the sum of all absolute weights (not biases, nor those of norms), added to the mean loss.
        max_grad_norm: clip the whole gradient to this l2 norm; None for no clipping.
        precision: "bf16" runs forward passes under autocast and attacks on a bfloat16 stand-in.
        channels_last: store convolution weights and images in the layout that is faster on most processors.
        compile: run the model through `torch.compile` (a minute's wait; pays on long runs of convolution nets).
        holdout: training records set aside; accuracy on them, clean and under PGD-10, is logged every epoch, with
            whatever the objective finds out there.
        keep: "last" weights, or those "best" on the held-out records (under PGD where the objective has a threat).
        save_every: optimiser steps between saved states; None saves every 30 seconds.
    """

    objective: Objective
    epochs: int = 10
    batch_size: int = 128
    optimizer: Optimizer = field(default_factory=Sgd)
    schedule: Schedule = field(default_factory=Cosine)
    rule: GradientRule = field(default_factory=MeanGradient)
    augment: tuple[Augmentation, ...] = ()
    compression: Compression | None = None
    average: float | None = None
    l1: float = 0.0
    max_grad_norm: float | None = None
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    holdout: int = 0
    keep: str = "last"
    save_every: int | None = None

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"epochs={self.epochs} must be at least 1.")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        require(self.average is None or 0 < self.average < 1, f"average={self.average} must lie between 0 and 1.")
        require(self.l1 >= 0, f"l1={self.l1} must not be negative.")
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm must be positive.")
        require(self.holdout >= 0, f"holdout={self.holdout} must not be negative.")
        require(self.keep in ("last", "best"), f"keep={self.keep!r} must be 'last' or 'best'.")
        require(self.keep == "last" or self.holdout > 0, "keep='best' needs holdout > 0: the records to judge on.")
        require(
            self.holdout > 0 or not self.objective.needs_holdout,
            f"holdout={self.holdout} leaves {type(self.objective).__name__} no records to adapt to; set aside some.",
        )
        require(self.save_every is None or self.save_every >= 1, f"save_every={self.save_every} must be at least 1.")
        require(
            self.compression is None or self.average is None,
            f"average={self.average} would mix weights of different masks or grids; leave it out of this stage.",
        )
        require(
            self.objective.record_isolated or not self.rule.needs_isolation,
            f"{type(self.objective).__name__} couples the records of a batch, so {type(self.rule).__name__} cannot "
            "bound what one record contributes; choose an objective whose losses are per record.",
        )
        require(
            self.objective.replays == 1 or not self.rule.needs_isolation,
            f"{type(self.objective).__name__} steps {self.objective.replays} times on one batch, which "
            f"{type(self.rule).__name__} would have to pay for each time; choose pgd_at or fast_at.",
        )
        require(
            not self.holdout or not self.rule.needs_isolation,
            f"holdout={self.holdout} would publish exact accuracies of private records; leave it out and judge the "
            "model on the test records.",
        )

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "the weights were trained further")
        kept = (Verdict.KEEP, "training changes values, not shapes")
        cost = kept if self.compression is None else (Verdict.VOID, "the weights were compressed")
        return Effect(privacy=self.rule.on_privacy, certificate=changed, attack=changed, accuracy=changed, cost=cost)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        loop = _Loop(self, checkpoint.model.to(context.device), context)
        with torch.random.fork_rng(devices=[]):  # layers draw from the global stream
            loop.run()
        if loop.private is not None:
            loop.result["privacy"] = loop.private.record(checkpoint.history)
        record = {
            "stage": "fit",
            "settings": spec_of(self),
            "steps": loop.steps,
            "records": len(loop.train),
            "data": loop.digest,
            **loop.result,
        }
        context.files.clear_state()
        structure = [*checkpoint.structure, *loop.attached()]
        after = replace(checkpoint, model=loop.model, history=[*checkpoint.history, record], structure=structure)
        if loop.private is not None:
            after.ledger.add(*loop.private.claims(after))
        return after


class _Loop:
    """One execution of a `Fit`: the mutable part."""

    def __init__(self, fit: Fit, model: nn.Module, context: Context) -> None:
        self.fit, self.model, self.context = fit, model, context
        self.seed = derive_seed(context.seed, "fit", context.files.number)
        self.train, self.held = self._split(context.splits.train)
        self.digest = self.train.digest()
        self.plan = fit.rule.plan(len(self.train), fit.batch_size, fit.epochs, self.seed)
        self.per_epoch = self.plan.per_epoch
        self.replays = fit.objective.replays
        self.steps = fit.epochs * self.per_epoch * self.replays
        if fit.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if fit.compression is not None:
            fit.compression.attach(model)
            fit.compression.begin(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = fit.optimizer.on(self.parameters)
        self.average = MovingAverage(model, fit.average) if fit.average else None
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.result: dict[str, Any] = {}
        self.private: PrivateStage | None = None
        self.left: Compression | None = None
        if isinstance(self.plan, PrivatePlan):
            require_independence(model, fit.objective, self.train, self.plan.rule.engine)
            self.private = PrivateStage(self.plan, self.train, self.digest, context, self.steps)
            if self.plan.secret:  # who knew the objective's draws could subtract the other records
                self.seed = secrets.randbits(63)

    def _split(self, train: Dataset) -> tuple[Dataset, Dataset | None]:
        if not self.fit.holdout:
            return train, None
        require(
            self.fit.holdout < len(train),
            f"holdout={self.fit.holdout} leaves no record to train on: there are {len(train)}.",
        )
        return train.split(self.fit.holdout, generator(self.context.seed, "holdout"))

    def run(self) -> None:
        step = self._resume()
        if self.fit.compile:
            self.model.compile()
        title = f"{self.context.files.name} {type(self.fit.objective).__name__}"
        self.saved = time.monotonic()
        with display.progress(title, self.steps) as advance:
            advance(step)
            while step < self.steps:
                for batch in self._epoch(step):
                    step = self._batch(batch, step, advance)
                    # Not at the end of an epoch: that is judged first, or a resumed run would leave it unjudged.
                    if step % (self.per_epoch * self.replays) and self._save_is_due(step):
                        self._save(step)
                self._judge(step)
                if self.held is not None or (step < self.steps and self._save_is_due(step)):
                    self._save(step)
        if self.fit.compile:
            self.model._compiled_call_impl = None
        self._finish()

    def _epoch(self, step: int) -> Iterator[Batch]:
        """The batches of the epoch that `step` lies in, from that step on."""
        first = step // self.replays
        for number in range(first, (first // self.per_epoch + 1) * self.per_epoch):
            batch = self.train.batch(self.plan.draw(number))
            inputs, augmenting = batch.inputs, generator(self.seed, "augment", *divmod(number, self.per_epoch))
            for augmentation in self.fit.augment if len(batch) else ():
                inputs = augmentation(inputs, augmenting)
            if self.fit.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield replace(batch, inputs=inputs).to(self.context.device)

    def _batch(self, batch: Batch, step: int, advance: display.Advance) -> int:
        for _ in range(self.replays):
            losses = self._step(batch, step)
            if step % _LOG_EVERY == 0 or step + 1 == self.steps:
                advance(0, note=self._log(losses, step))
            advance(1)
            step += 1
        return step

    def _step(self, batch: Batch, step: int) -> Losses:
        fit, epoch = self.fit, step / (self.per_epoch * self.replays)
        progress = Progress(step, self.steps, epoch, self.seed, fit.precision)
        moment = Moment(step, self.steps, self.per_epoch * self.replays)
        rate = fit.optimizer.lr * fit.schedule(progress.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout and noise layers draw from the global stream.
        torch.manual_seed(derive_seed(self.seed, "layers", step))
        self.model.train()
        if fit.compression is not None:
            fit.compression.before(self.model, moment)
        self.optimizer.zero_grad(set_to_none=True)
        if self.private is not None:
            self.private.reserve()
        found = self.plan.gradients(self.model, batch, _Moment(self, progress, rate))
        # A private run must not stop because of one record: its gradient counts as zero, and nobody hears of it.
        if self.private is None and not bool(found.per_example.detach().isfinite().all()):
            raise TrivetError(
                f"the loss is not finite at step {step} of {self.context.files.name}; lower the learning rate "
                f"(now {rate:.3g}), set max_grad_norm, or check the images for outliers. The last saved state is kept."
            )
        if fit.l1:
            for parameter in self.parameters:
                if parameter.ndim > 1 and parameter.grad is not None:
                    parameter.grad.add_(parameter.detach().sign(), alpha=fit.l1)
        if fit.compression is not None:
            fit.compression.adjust(self.model, moment)
        if fit.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, fit.max_grad_norm)
        self.optimizer.step()
        if fit.compression is not None:
            fit.compression.after(self.model, moment)
        if self.average:
            self.average.update(self.model, step)
        return Losses(found.per_example, found.log)

    def _log(self, losses: Losses, step: int) -> str:
        numbers: dict[str, float] = {}
        if self.private is None or self.private.diagnostics:
            numbers = {"loss": float(losses.per_example.detach().mean()) if len(losses.per_example) else 0.0}
            numbers |= {name: float(value.detach().float().mean()) for name, value in losses.log.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        self.context.files.log(
            {"step": step, "epoch": round(step / (self.per_epoch * self.replays), 4), "lr": lr, **numbers}
        )
        return f"loss {numbers['loss']:.3f}" if numbers else ""

    def _judge(self, step: int) -> None:
        """Measure the epoch's end on the held-out records, if there are any, and remember the best weights if asked."""
        if self.held is None:
            return
        epoch = step // (self.per_epoch * self.replays)
        progress = Progress(step, self.steps, epoch, derive_seed(self.seed, "held", epoch))
        with self._result_weights():
            found = held_out(self.model, self.held, self.fit.objective, progress)
            self.context.files.log({"step": step - 1, "epoch": epoch, **found})
            score = found.get("held_pgd", found["held_clean"])
            if self.fit.keep == "best" and (self.best is None or score > self.best[0]):
                self.best = score, {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        if found.get("held_fgsm", 0.0) - found.get("held_pgd", 0.0) > 0.2:
            self.result["catastrophic_overfitting"] = f"epoch {epoch}: robust to FGSM, not to PGD"

    def _result_weights(self) -> AbstractContextManager[Any]:
        """The weights that would be the result if training ended now, inside."""
        if self.fit.compression is not None:
            return self.fit.compression.as_shipped(self.model)
        return _swapped(self.model, self.average.weights) if self.average else nullcontext()

    def _finish(self) -> None:
        chosen = self.best[1] if self.best else self.average.weights if self.average else None
        if chosen is not None:
            self.model.load_state_dict(chosen)
        if self.best:
            self.result["best_held_out"] = self.best[0]
        if self.fit.compression is not None:
            self.result |= self.fit.compression.report(self.model)
            self.left = self.fit.compression.end(self.model)
        self.model.eval()
        self.model.zero_grad(set_to_none=True)

    def attached(self) -> Structure:
        """What this stage put on the model for good: by the names of the layers, which patterns would not pin down."""
        if self.left is None:
            return []
        return [spec_of(replace(self.left, include=tuple(self.left.layers(self.model)), exclude=()))]

    def _save_is_due(self, step: int) -> bool:
        if self.fit.save_every is None:
            return time.monotonic() - self.saved > (_SAVE_EVERY if self.private is None else _SAVE_PRIVATE_EVERY)
        return step % self.fit.save_every < self.replays

    def _save(self, step: int) -> None:
        self.saved = time.monotonic()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state = self.optimizer.state_dict()["state"]
        tensors |= {
            f"optimizer.{i}.{k}": torch.as_tensor(v)
            for i, each in state.items()
            for k, v in each.items()
            if v is not None
        }
        tensors |= {f"objective.{name}": tensor for name, tensor in self.fit.objective.state().items()}
        if self.average:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.weights.items()}
        if self.best:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best[1].items()}
        best = self.best[0] if self.best else None
        self.context.files.save_state(tensors, {"step": step, "data": self.digest, "best": best, "result": self.result})

    def _resume(self) -> int:
        """Take up the saved state, if there is one; the step to go on from."""
        saved = self.context.files.load_state()
        if saved is None:
            if self.fit.compression is not None:
                self.fit.compression.initialise(self.model)
            self.fit.objective.load_state({})
            self.context.files.rewind_log(0)
            return 0 if self.private is None else self.private.resume(0)
        tensors, metadata = saved
        if metadata["data"] != self.digest:
            raise TrivetError(
                f"{self.context.files.run.path} was trained on other records than the data now hold; bring those back, "
                "or start a new run with another --out."
            )
        self.model.load_state_dict(_under("model.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.fit.objective.load_state(_under("objective.", tensors))
        if self.average:
            self.average.load(_under("average.", tensors))
        if metadata["best"] is not None:
            self.best = metadata["best"], _under("best.", tensors)
        self.result = metadata["result"]
        step: int = metadata["step"]
        self.context.files.rewind_log(step)
        return step if self.private is None else self.private.resume(step)


@dataclass(frozen=True)
class _Moment:
    """The objective's two acts at one moment of a loop: what a gradient rule works with."""

    loop: _Loop
    progress: Progress
    rate: float

    def perturb(self, model: nn.Module, batch: Batch, part: int = 0) -> Tensor:
        with self._autocast():
            return self.loop.fit.objective.perturb(model, batch, replace(self.progress, part=part))

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> PerExample:
        with self._autocast():
            found = self.loop.fit.objective.losses(model, batch, perturbed, replace(self.progress, part=part))
        return found._replace(per_example=found.per_example.float())

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.progress.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.loop.context.device.type, torch.bfloat16)


@contextmanager
def _swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in a model, for as long as the context lasts."""
    own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


def held_out(model: nn.Module, held: Dataset, objective: Objective, progress: Progress) -> dict[str, float]:
    """Accuracy on held-out records: clean, under FGSM and PGD-10 where the objective has a threat, and what it adds."""
    threat = getattr(objective, "threat", None)
    attacks = {}
    if threat is not None:  # rotations, which have no gradient, are tried: one and ten
        attacks["held_fgsm"] = over_members(threat, fgsm, draws=1)
        attacks["held_pgd"] = over_members(threat, partial(PGD, steps=10), draws=10)
    right = dict.fromkeys(["held_clean", *attacks], 0)
    device = device_of(model)
    with evaluating(model):
        for number, batch in enumerate(each.to(device) for each in held.batches(500)):
            with torch.no_grad():
                right["held_clean"] += int((model(batch.inputs).argmax(1) == batch.labels).sum())
            for name, attack in attacks.items():
                draw = generator(progress.seed, name, number, device=device)
                right[name] += int((~attack.run(model, batch.inputs, batch.labels, generator=draw).broken).sum())
        more = objective.judge(model, held, progress)
    return {name: count / len(held) for name, count in right.items()} | dict(more)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
