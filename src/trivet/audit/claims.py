"""From findings to claims, and what a new audit does to the claims of an earlier one."""

from __future__ import annotations

from typing import Any

from trivet.audit.findings import AttackFinding, CertificateFinding, CertifiedPoint, Findings, LatencyFinding
from trivet.audit.labels import in_pixels, threat_name
from trivet.audit.privacy_standing import rounded_down
from trivet.certify.curves import format_radius
from trivet.claims import AccuracyClaim, AttackClaim, CertificateClaim, Claim, CostClaim, Ledger, PrivacyClaim
from trivet.statistics import Rate
from trivet.training.private_stage import delta_text

PERCENT = "%"


def claims_from(findings: Findings, made_by: str, recheck: str) -> list[Claim]:
    """Every claim that `findings` support; `recheck` is the command that would measure them again."""
    make = _Maker(findings, {"artefact": findings.artefact, "made_by": made_by, "recheck": recheck})
    claims: list[Claim] = [make.accuracy()]
    ran = [attack for attack in findings.attacks if not attack.outside]
    claims += [make.attack(attack, attack.accuracy) for attack in ran if attack.accuracy is not None]
    if findings.worst_case is not None and len(claims) > 2:
        claims.append(make.worst_case(findings.worst_case))
    if findings.certificate is not None:
        claims += [make.certificate(findings.certificate, point) for point in findings.certificate.at]
    return claims + make.costs()


class _Maker:
    """Words and conditions of the claims about one set of findings."""

    def __init__(self, findings: Findings, common: dict[str, Any]) -> None:
        self.findings, self.common = findings, common
        data = findings.data
        self.records = {"name": data.name, "points": data.points, "digest": data.digest}
        self.on = f"the {data.points} audited records of {data.name}"
        self.conditions: tuple[str, ...] = (
            f"about these records only: {data.name}, {data.points} points, SHA-256 {data.digest[:16]}…",
        )
        if findings.randomised:
            self.conditions += ("the model is randomised: one draw per answer, another run differs",)

    def _rate(self, rate: Rate) -> dict[str, Any]:
        low, high = rate.interval
        return {
            "value": 100 * rate.value,
            "unit": PERCENT,
            "interval": (100 * low, 100 * high),
            "confidence": rate.confidence,
        }

    def _obtained(self, name: str, **settings: Any) -> dict[str, Any]:
        return {"name": name, "data": self.records, "seed": self.findings.seed, **settings}

    def accuracy(self) -> Claim:
        rate = self.findings.clean
        return AccuracyClaim(
            statement=f"Labels {_of(rate)} of {self.on} correctly.",
            obtained=self._obtained("accuracy"),
            conditions=self.conditions,
            points=rate.trials,
            **self._rate(rate),
            **self.common,
        )

    @property
    def _radius(self) -> str:
        threat = self.findings.threat
        if "threats" in threat:
            return threat_name(threat)
        return f"{threat.get('name', 'threat')} radius {in_pixels(threat.get('eps', 0.0))}"

    @property
    def _bound(self) -> str:
        if self.findings.flags:
            return "an upper bound, and a doubtful one, because checks of the measurement were raised"
        return "robust accuracy is at most that"

    @property
    def _doubts(self) -> tuple[str, ...]:
        flags = [check.title.lower() for check in self.findings.flags]
        return (f"doubtful, an adaptive attack may leave far less: {'; '.join(flags)}",) if flags else ()

    def attack(self, attack: AttackFinding, rate: Rate) -> Claim:
        return AttackClaim(
            statement=f"{attack.label} at {self._radius} leaves {_of(rate)} of {self.on} correctly labelled: "
            f"{self._bound}.",
            obtained=self._obtained("attack", attack=attack.spec),
            conditions=(*self.conditions, "an upper bound: only this attack was tried", *self._doubts),
            threat=self.findings.threat,
            points=rate.trials,
            **self._rate(rate),
            **self.common,
        )

    def worst_case(self, rate: Rate) -> Claim:
        ran = [attack for attack in self.findings.attacks if attack.accuracy is not None and not attack.outside]
        return AttackClaim(
            statement=f"All {len(ran)} attacks together at {self._radius} leave {_of(rate)} of {self.on} correctly "
            f"labelled: {self._bound}.",
            obtained=self._obtained("worst_case", attacks=[attack.spec for attack in ran]),
            conditions=(*self.conditions, "an upper bound: only these attacks were tried", *self._doubts),
            threat=self.findings.threat,
            points=rate.trials,
            **self._rate(rate),
            **self.common,
        )

    def certificate(self, found: CertificateFinding, point: CertifiedPoint) -> Claim:
        rate = point.accuracy
        sure = f", each with confidence {1 - found.alpha:g}" if found.alpha else ""
        return CertificateClaim(
            statement=f"{found.label} certifies the right label within {found.norm} radius "
            f"{format_radius(point.radius)} for {_of(rate)} of the first {rate.trials} records of "
            f"{self.findings.data.name}{sure}.",
            obtained=self._obtained("certificate", certifier=found.spec),
            conditions=(*self.conditions, *found.conditions, *_allowing(found, point)),
            norm=found.norm,
            radius=point.radius,
            points=rate.trials,
            **self._rate(rate),
            **self.common,
        )

    def costs(self) -> list[Claim]:
        cost = self.findings.cost
        packed = cost.packed_bytes
        article = f"an {cost.file_format}" if cost.file_format == "onnx" else f"a {cost.file_format}"
        counted = (
            ("parameters", cost.parameters, "", f"Has {cost.parameters:,} parameters."),
            (
                "nonzero_parameters",
                cost.nonzero_parameters,
                "",
                f"{cost.nonzero_parameters:,} parameters are not zero.",
            ),
            ("file_bytes", cost.file_bytes, "bytes", f"Takes {cost.file_bytes:,} bytes as {article} file."),
            *((("packed_bytes", packed, "bytes", f"Takes {packed:,} bytes as a packed file."),) if packed else ()),
            ("flops", cost.flops, "FLOPs", f"Spends {cost.flops:,} FLOPs on one input."),
        )
        sizes: list[Claim] = [
            CostClaim(
                statement=sentence,
                value=float(value),
                unit=unit,
                obtained={"name": "count", "measure": measure},
                measure=measure,
                **self.common,
            )
            for measure, value, unit, sentence in counted
        ]
        return sizes + [self._latency(each) for each in cost.latency]

    def _latency(self, found: LatencyFinding) -> Claim:
        where = f"{found.machine}, threads: {found.threads}"
        return CostClaim(
            statement=f"Answers a batch of {found.batch_size} in {1e3 * found.median:.3g} ms (median of "
            f"{found.repeats} runs in {found.path}) on {where}.",
            value=1e3 * found.median,
            unit="ms",
            interval=(1e3 * found.low, 1e3 * found.high),
            obtained={"name": "latency", "batch_size": found.batch_size, "machine": where},
            conditions=("the interval spans the quartiles of the runs",),
            measure=f"latency of a batch of {found.batch_size}",
            **self.common,
        )


def recheck(ledger: Ledger, findings: Findings) -> None:
    """Void what `findings` make obsolete, and say why; the caller enters the new claims.

    An earlier holding claim that answers a question the findings answer is voided:
    because the weights are others than it was made for; or because both intervals (exact numbers: the values)
    exclude each other; or else because it was simply measured again. Accuracies, attacks and certificates
    of other weights are voided whatever was asked of them. A privacy claim ends where a leak test refutes it and
    where the weights are others; nothing else an audit finds touches it.
    """
    answers = {_question(claim): claim for claim in claims_from(findings, made_by="", recheck="")}
    for old in ledger.holding:
        if isinstance(old, PrivacyClaim):
            reason = _ends(old, findings)
            if reason:
                ledger.void(old, "audit", reason)
            continue
        new = answers.get(_question(old))
        if old.artefact != findings.artefact:
            if new is not None or old.kind != "cost":  # type: ignore[attr-defined]
                ledger.void(old, "audit", "the weights are not those it was made for")
        elif new is not None:
            reason = "contradicted on re-check" if _contradict(old, new) else "measured again"
            ledger.void(old, "audit", reason)


def _ends(claim: PrivacyClaim, findings: Findings) -> str | None:
    """Why a privacy claim holds no longer, if it does not."""
    if claim.artefact != findings.artefact:
        return "the weights are not those it was made for"
    for leak in findings.leaks:
        # What is not (epsilon, delta)-private is not so with a smaller delta either.
        if leak.lower is not None and leak.delta is not None and leak.lower > claim.value and leak.delta >= claim.delta:
            return (
                f"contradicted by {leak.label}: epsilon is at least {rounded_down(leak.lower)} at delta "
                f"{delta_text(leak.delta)}, with {100 * leak.confidence:g} % confidence"
            )
    return None


def _question(claim: Claim) -> str:
    """What a claim answers; the seed of a measurement is part of how, not of what."""
    kept = claim.model_dump(
        mode="json",
        include={"kind", "unit", "threat", "norm", "radius", "measure", "points"},
    )
    how = {key: value for key, value in claim.obtained.items() if key != "seed"}
    return repr((sorted(kept.items()), sorted(how.items())))


def _contradict(old: Claim, new: Claim) -> bool:
    if old.interval is None or new.interval is None:
        return old.value != new.value
    return old.interval[1] < new.interval[0] or new.interval[1] < old.interval[0]


def _allowing(found: CertificateFinding, point: CertifiedPoint) -> tuple[str, ...]:
    if not found.alpha:
        return ()
    return (f"{100 * point.guaranteed:.1f} % at least, with confidence 99.9 %, if some certificates are wrong",)


def _of(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * rate.confidence:g} % interval {100 * low:.1f} to {100 * high:.1f})"
