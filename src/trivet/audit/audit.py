"""The audit: a finished model, some test records, a threat model; out come findings and adversarial examples."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet import display, machine
from trivet.audit import (
    certificates,
    consistency,
    diagnosis,
    explanations,
    gradients,
    masking,
    perturbation_types,
    probes,
    severity,
)
from trivet.audit.explanation_finding import ExplanationFinding
from trivet.audit.findings import (
    AttackFinding,
    CertificateFinding,
    Check,
    CostFinding,
    Curve,
    CurvePoint,
    Data,
    DiagnosisFinding,
    Findings,
    LatencyFinding,
)
from trivet.audit.leak_test import LeakTest
from trivet.audit.masking import Behaviour
from trivet.audit.perturbation_types import Types
from trivet.audit.probes import Probes
from trivet.audit.severity_finding import SeverityFinding
from trivet.audit.sweep import P, Sweep
from trivet.certify.certifier import Certificates, Certifier
from trivet.compression.cost import cost_of, measure_latency
from trivet.compression.energy import estimate
from trivet.data.dataset import Batch, Dataset
from trivet.data.hierarchy import Hierarchy
from trivet.errors import require
from trivet.methods import method, spec_of
from trivet.models.attribution import explain_class
from trivet.models.fingerprint import fingerprint
from trivet.models.foreign.twinned import Twinned
from trivet.models.modes import device_of, evaluating
from trivet.statistics import Rate
from trivet.threats.attack import Attack
from trivet.threats.hierarchy_pgd import HierarchyPGD
from trivet.threats.logit_scaled import quantized_battery
from trivet.threats.square import Square
from trivet.threats.threat import ThreatModel
from trivet.threats.wnll_pgd import WnllTransfer, wnll_battery

EOT_SAMPLES = 20
"""Draws averaged per gradient where the model turns out to be randomised, as in AutoAttack's version `rand`."""
_SQUARE_QUERIES = 500


@method(title="Audit", name="audit")
@dataclass(frozen=True)
class Audit:
    """Attack, certify and weigh a model under one threat.

    Attributes:
        threat: the perturbation set. Of a union every member is attacked, and the worst case is stated for each type
            and for all of them together; affine attacks, which mix types, are reported beside it.
        attacks: the battery; none given means PGD-40 with 5 restarts on the cross-entropy and on the margin, and
            AutoAttack, all averaging gradients where the model is randomised, with Square where it has no gradient. To
            a network with a WNLL head, whose own gradients mislead, `wnll_pgd` and `wnll_transfer` are always added,
            and to a quantised one, whose gradients may vanish, `logit_scaled_pgd`.
        points: audit the first so many test records; None for all.
        curve: radii of the reliability curve; None for multiples of the threat's radius and the whole range.
        curve_points: how many of the records are probed for that curve and for signs of gradient masking.
        certificate: what to prove with, if anything.
        certificate_points: on how many of the records; None for all.
        certified_radii: where certified accuracy is stated, the headline first; none given means the threat's radius
            if the certificate is about the same geometry, else 0.25, 0.5 and 1.
        diagnosis: at how many of the certified records slope, curvature and Lipschitz constant are set against the
            radii; 0 for none. Costs far less than the certificates.
        explanations: at how many records attributions are measured, how sparse they are and how stable; 0 for none.
        hierarchy: a tree of the data's classes, in the order of the labels. With it the audit says how severe mistakes
            are, and adds an attack that looks for severe ones; models that are randomised are left out of the former.
        leaks: attacks on the training records' privacy, for runs whose training can be repeated. `run` leaves them
            to its caller, who has the training: they make models of their own.
        latency: batch sizes to time.
        confidence: of every interval.
        batch_size: records attacked at once.
        examples: adversarial examples kept as pictures. They show test records.
    """

    room: ClassVar[str] = "audit"
    threat: ThreatModel
    attacks: tuple[Attack, ...] = ()
    points: int | None = None
    curve: tuple[float, ...] | None = None
    curve_points: int = 256
    certificate: Certifier | None = None
    certificate_points: int | None = 500
    certified_radii: tuple[float, ...] = ()
    diagnosis: int = 100
    explanations: int = 100
    hierarchy: Hierarchy | None = None
    leaks: tuple[LeakTest, ...] = ()
    latency: tuple[int, ...] = (1, 128)
    confidence: float = 0.95
    batch_size: int = 256
    examples: int = 10

    def __post_init__(self) -> None:
        require(self.points is None or self.points >= 1, f"points={self.points} must be at least 1.")
        for name in ("curve_points", "certificate_points", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1.")
        for name in ("diagnosis", "explanations", "examples"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative.")
        require(0 < self.confidence < 1, f"confidence={self.confidence} must lie strictly between 0 and 1.")
        require(all(size >= 1 for size in self.latency), f"latency={list(self.latency)} must be batch sizes.")
        for name in ("curve", "certified_radii"):
            radii = getattr(self, name) or ()
            require(all(radius >= 0 for radius in radii), f"{name}={list(radii)} must not hold negative radii.")
        require(
            not self.curve or self.threat.eps > 0 or not any(self.curve),
            "a reliability curve is drawn by scaling the threat, which eps=0 does not allow; set eps or drop curve.",
        )

    def battery(self, seen: Behaviour) -> tuple[Attack, ...]:
        """The attacks to run: those asked for, else the standard ones, and Square where gradients lead nowhere."""
        asked = perturbation_types.battery(self.threat, self.attacks, seen, EOT_SAMPLES)
        return asked + severity.attacks(self.threat, self.hierarchy, seen, EOT_SAMPLES)

    def run(
        self, model: nn.Module, data: Dataset, *, seed: int, name: str, source: str
    ) -> tuple[Findings, dict[str, Tensor]]:
        """Audit `model` on the records of `data`; it is left as it was.

        Returns:
            The findings, and the kept adversarial examples as tensors of E rows: index, clean [E, C, H, W],
            adversarial [E, C, H, W], label, clean_prediction and adversarial_prediction.

        Raises:
            BadValue: no records, or a model whose outputs are not logits of the data's classes.
        """
        began = time.perf_counter()
        require(len(data) > 0, f"dataset {data.name!r} has no records to audit.")
        data = data.select(slice(0, self.points))
        _require_logits(model, data)
        require(
            self.hierarchy is None or self.hierarchy.classes == data.classes,
            f"hierarchy=… must name the classes of {data.name!r} in the order of the labels: {_first(data.classes)}.",
        )
        cost = self._cost(model, data.input_shape)
        norm = self.threat.norm if self.certificate is None else getattr(self.certificate, "norm", self.threat.norm)
        sweep = Sweep(
            model, data, seed, self.confidence, self.batch_size, norm if norm in P else "Linf", keep=self.examples
        )
        first = data.select(slice(0, self.curve_points)).batch(torch.arange(min(self.curve_points, len(data))))
        first = first.to(device_of(model))
        seen = _behaviour(model, first, data.num_classes)
        checks = masking.of_behaviour(seen) + consistency.of_model(model, first, seen.randomised)
        # Networks whose output layer interpolates, or which are quantised, are never judged by plain gradients alone.
        battery = self.battery(seen)
        beside = wnll_battery(model, self.threat)
        beside += quantized_battery(model, self.threat, EOT_SAMPLES if seen.randomised else 1)
        battery += tuple(each for each in beside if each not in battery)
        labels = perturbation_types.labels(self.threat, battery)
        attacks = [sweep.attack(*pair) for pair in zip(battery, labels, strict=True)]
        transferred = [label for label, each in zip(labels, battery, strict=True) if isinstance(each, WnllTransfer)]
        checks += masking.of_transfers(sweep.white_box, {label: sweep.standing[label] for label in transferred})
        types = perturbation_types.by_type(self.threat, battery, sweep)
        curve, found = self._probe(sweep, first, seen, attacks, types)
        checks += found + consistency.of_attacks(sweep.right, sweep.standing, seen.randomised)
        proved, diagnosed, found = self._certify(sweep, seen)
        explained, pictures = self._explain(sweep, seen)
        severe = None if seen.randomised else self._severity(sweep, dict(zip(labels, battery, strict=True)))
        worst = sweep.worst
        return Findings(
            name=name,
            source=source,
            artefact=fingerprint(model),
            data=Data(name=data.name, points=len(data), digest=data.digest(), classes=data.classes),
            threat=spec_of(self.threat),
            settings=spec_of(self),
            seed=seed,
            provenance=machine.describe(),
            seconds=time.perf_counter() - began,
            randomised=seen.randomised,
            clean=sweep.rate(sweep.right),
            clean_by_class=sweep.by_class(sweep.right),
            attacks=tuple(attacks),
            worst_case=None if worst is None else sweep.rate(worst),
            worst_by_class=() if worst is None else sweep.by_class(worst),
            worst_by_type={name: sweep.rate(left) for name, left in types.standing.items()},
            curve=curve,
            certificate=proved,
            diagnosis=diagnosed,
            explanations=explained,
            severity=severe,
            checks=tuple(checks + found),
            cost=cost,
        ), pictures

    def _cost(self, model: nn.Module, shape: tuple[int, int, int]) -> CostFinding:
        model = model.twin if isinstance(model, Twinned) else model  # what a runtime does inside is not counted
        counted = cost_of(model, shape)
        energy = estimate(macs=counted.macs, weight_bits=8 * counted.packed_bytes, activations=counted.activations)
        timed = [measure_latency(model, shape, batch_size=size) for size in self.latency]
        return CostFinding(
            parameters=counted.parameters,
            nonzero_parameters=counted.nonzero_parameters,
            file_bytes=counted.file_bytes,
            flops=counted.flops,
            nonzero_flops=counted.nonzero_flops,
            packed_bytes=counted.packed_bytes,
            compressed_bytes=counted.compressed_bytes,
            bits_per_weight=counted.bits_per_weight,
            channel_sparsity=counted.channel_sparsity,
            energy=energy.total / 1e6,
            energy_table=energy.table,
            latency=tuple(LatencyFinding(**vars(each)) for each in timed),
        )

    def _probe(
        self, sweep: Sweep, first: Batch, seen: Behaviour, attacks: list[AttackFinding], types: Types
    ) -> tuple[Curve | None, list[Check]]:
        """The reliability curve and the checks that compare attacks; neither without a gradient."""
        found = masking.of_types(types.white_box, types.standing)
        composed = [attack.broke for attack in attacks if attack.broke]
        if len(self.threat.members) == 1:
            found += [check for broke in composed for check in masking.of_components(broke, len(sweep.data))]
        if not seen.differentiable:
            return None, found
        radii = probes.default_curve(self.threat, first.inputs[0].numel()) if self.curve is None else self.curve
        standing = torch.stack([sweep.right, *sweep.white_box.values()]).all(0)[: len(first)]
        # AutoAttack has its own Square, and its own flag for it.
        balls = () if composed else (each for each in self.threat.members if each.norm in P)
        black_box = tuple(Square(ball, queries=_SQUARE_QUERIES) for ball in balls)
        with display.progress("reliability curve and masking checks", probes.count(radii, black_box)) as advance:
            result = probes.probe(
                sweep.model,
                first,
                self.threat,
                radii,
                seed=sweep.seed,
                samples=EOT_SAMPLES if seen.randomised else 1,
                standing=standing.to(first.labels.device),
                batch_size=self.batch_size,
                black_box=black_box,
                advance=advance,
            )
        return self._curve(result), found + masking.of_probes(result, self.threat.eps, seen.classes)

    def _curve(self, result: Probes) -> Curve:
        points = (
            CurvePoint(eps=eps, accuracy=Rate(int(left.sum()), len(left), self.confidence))
            for eps, left in result.curve.items()
        )
        names = tuple(f"PGD-{probes.STEPS} ({loss})" for loss in ("ce", "margin"))
        return Curve(attacks=names, points=tuple(points))

    def _certify(
        self, sweep: Sweep, seen: Behaviour
    ) -> tuple[CertificateFinding | None, DiagnosisFinding | None, list[Check]]:
        if self.certificate is None:
            return None, None, []
        part = sweep.data.select(slice(0, self.certificate_points))
        obtained, seconds = certificates.certify(self.certificate, sweep.model, part, seed=sweep.seed)
        radii = self.certified_radii or self._radii(obtained)
        report = certificates.finding(self.certificate, obtained, part.labels, radii, seconds, self.confidence)
        near, said = sweep.distance[: len(part)], sweep.predicted[: len(part)]
        diagnosed = self._diagnose(sweep, obtained) if seen.differentiable and not seen.randomised else None
        found = consistency.of_certificates(obtained, self.certificate.about, part.labels, said, near)
        return report, diagnosed, found

    def _diagnose(self, sweep: Sweep, obtained: Certificates) -> DiagnosisFinding | None:
        first = obtained.first(self.diagnosis)
        if not len(first):
            return None
        batch = sweep.data.batch(first.index).to(sweep.device)
        began = time.perf_counter()
        with display.progress("diagnosis", len(first)) as advance:
            measured = diagnosis.diagnose(
                sweep.model,
                batch.inputs,
                batch.labels,
                seed=sweep.seed,
                batch_size=self.batch_size,
                advance=advance,
            )
        return diagnosis.finding(measured, first, sweep.data.labels[first.index], time.perf_counter() - began)

    def _explain(self, sweep: Sweep, seen: Behaviour) -> tuple[ExplanationFinding | None, dict[str, Tensor]]:
        """How the model can be explained, and the kept examples, with their attributions where there are any."""
        pictures = sweep.examples()
        if not self.explanations or not seen.differentiable or seen.randomised:
            return None, pictures
        batch = sweep.data.batch(torch.arange(min(self.explanations, len(sweep.data)))).to(sweep.device)
        found = explanations.explain(sweep.model, batch, self.threat, seed=sweep.seed, batch_size=self.batch_size)
        for name in ("clean", "adversarial") if found and len(pictures["index"]) else ():
            inputs, labels = (pictures[key].to(sweep.device) for key in (name, "label"))
            pictures[f"{name}_attribution"] = explain_class(sweep.model, inputs, labels).cpu()
        return found, pictures

    def _severity(self, sweep: Sweep, battery: dict[str, Attack]) -> SeverityFinding | None:
        if self.hierarchy is None:
            return None
        return severity.find(
            self.hierarchy,
            sweep.model,
            sweep.data,
            sweep.predicted,
            sweep.answers,
            [label for label in sweep.answers if isinstance(battery[label], HierarchyPGD)],
            confidence=self.confidence,
            batch_size=self.batch_size,
        )

    def _radii(self, obtained: Certificates) -> tuple[float, ...]:
        return (self.threat.eps,) if obtained.norm == self.threat.norm else (0.25, 0.5, 1.0)


def _first(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")


@torch.no_grad()
def _require_logits(model: nn.Module, data: Dataset) -> None:
    """One look at the outputs before hours of attack."""
    batch = data.select(slice(0, 2)).batch(torch.arange(min(2, len(data)))).to(device_of(model))
    with evaluating(model):
        outputs = model(batch.inputs)
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    require(
        shape == (len(batch), data.num_classes),
        f"the model must return one logit for each of the {data.num_classes} classes of {data.name!r}, "
        f"[{len(batch)}, {data.num_classes}] for a batch of {len(batch)}; it returned {shape}.",
    )


def _behaviour(model: nn.Module, batch: Batch, classes: int) -> Behaviour:
    with evaluating(model):
        differentiable = gradients.differentiable(model, batch.inputs)
        labels, logits = gradients.spread(model, batch.inputs)
        shares = gradients.zero_gradient_shares(model, batch.inputs, batch.labels) if differentiable else (None, None)
        stark = gradients.thresholding(model, batch.inputs, batch.labels) if differentiable else None
        return Behaviour(
            classes,
            labels,
            logits,
            gradients.are_probabilities(model, batch.inputs),
            gradients.differentiates_inside(model, batch.inputs),
            differentiable,
            *shares,
            *(stark or (None, None)),
        )
