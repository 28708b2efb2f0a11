"""Findings: what an audit measured, with everything needed to judge each number and to measure it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trivet.audit.counted import Counted
from trivet.audit.explanation_finding import ExplanationFinding
from trivet.audit.leak_finding import LeakFinding
from trivet.audit.severity_finding import SeverityFinding
from trivet.errors import TrivetError
from trivet.files import read_json, write_json


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Record):
    """The audited records: the name of their dataset, their number, their SHA-256, and the names of the classes."""

    name: str
    points: int
    digest: str
    classes: tuple[str, ...]


class AttackFinding(_Record):
    """Accuracy left by one attack.

    Attributes:
        label: how tables call the attack.
        spec: the attack with every setting.
        accuracy: points still classified correctly: an upper bound on robust accuracy. None if it could not run.
        seconds: wall-clock time.
        broke: how many points each component of a composed attack broke.
        note: why it could not run.
        outside: it looked beyond the threat, so that its accuracy bounds nothing about it; not in the worst case.
    """

    label: str
    spec: dict[str, Any]
    accuracy: Counted | None
    seconds: float
    broke: dict[str, int] = {}
    note: str = ""
    outside: bool = False


class CurvePoint(_Record):
    """Accuracy left at one radius."""

    eps: float
    accuracy: Counted


class Curve(_Record):
    """The reliability curve: accuracy left by the named attacks on the first points, radius by radius."""

    attacks: tuple[str, ...]
    points: tuple[CurvePoint, ...]


class CertifiedPoint(_Record):
    """Share of points certified with the right label at one radius.

    `guaranteed` is a lower bound on it that allows for the chance of single certificates being wrong.
    """

    radius: float
    accuracy: Counted
    guaranteed: float


class CertificateFinding(_Record):
    """What was proved.

    Attributes:
        spec: the certifier with every setting.
        norm, alpha, conditions: of the certificates; the conditions belong to every claim made from them.
        at: certified accuracy at the radii the audit names, the headline first.
        curve: the same over the whole range of radii.
        abstained: points about which nothing was proved.
        average_radius: ACR, in input units.
        shares: points by the share of noisy copies that voted for their class, in equal parts of [0, 1]; None where
            nothing was sampled.
    """

    label: str
    spec: dict[str, Any]
    norm: str
    alpha: float
    conditions: tuple[str, ...]
    at: tuple[CertifiedPoint, ...]
    curve: tuple[CertifiedPoint, ...]
    abstained: Counted
    average_radius: float
    seconds: float
    shares: tuple[int, ...] | None = None


class DiagnosisFinding(_Record):
    """Slope, curvature and stretch of the network at the first certified records, beside how far they are certified.

    One number for each record, in order; `trivet.audit.diagnosis` says what they are.

    Attributes:
        radius: certified with the right label; 0 where there is no certificate, or one of another label. In `norm`.
        curvature: None where the model cannot be differentiated twice.
        rank_correlation: Spearman's, of each measure with `radius`; None where one of both is constant.
        left_out: records at which a measure was not finite; they are in no list.
    """

    norm: str
    radius: tuple[float, ...]
    gradient: tuple[float, ...]
    curvature: tuple[float, ...] | None
    lipschitz: tuple[float, ...]
    rank_correlation: dict[str, float | None]
    left_out: int
    seconds: float


class Check(_Record):
    """One named test of whether the other numbers can be believed.

    Attributes:
        kind: "masking" looks for signs that attacks were hindered rather than withstood, "consistency" for numbers
            that contradict each other.
        severity: "error" for a contradiction, "warning" for what makes the bounds on robustness unreliable, "note"
            for what a reader should know.
        raised: None where the check could not be made.
        rule: when it is raised. measured: the numbers it was judged on. meaning: what follows if it is raised.
    """

    name: str
    title: str
    kind: Literal["masking", "consistency"]
    severity: Literal["error", "warning", "note"]
    raised: bool | None
    rule: str
    measured: dict[str, float]
    meaning: str


class LatencyFinding(_Record):
    """Seconds for one batch: the median of `repeats` runs and their quartiles; `path` is the fastest way of running."""

    batch_size: int
    median: float
    low: float
    high: float
    threads: int
    repeats: int
    path: str
    machine: str


class CostFinding(_Record):
    """Size and work, as `trivet.compression.cost` counts them; FLOPs are for one input.

    `energy` is an estimate in microjoules for one input in float32, by the table named in `energy_table`. What stands
    behind None was not counted by the audit that wrote this.
    """

    parameters: int
    nonzero_parameters: int
    file_bytes: int
    file_format: str = "safetensors"
    flops: int
    nonzero_flops: int
    packed_bytes: int | None = None
    compressed_bytes: int | None = None
    bits_per_weight: float | None = None
    channel_sparsity: float | None = None
    energy: float | None = None
    energy_table: str = ""
    latency: tuple[LatencyFinding, ...]

    @property
    def made_small(self) -> int | None:
        """Bytes as a packed file, if that is a tenth smaller; of a network that nobody made small there is none."""
        packed = self.packed_bytes
        return packed if packed is not None and packed < 0.9 * self.file_bytes else None


class Findings(_Record):
    """Everything one audit measured.

    Attributes:
        name: of the model, as people call it; source: the folder or file it came from.
        artefact: the fingerprint of the weights; the findings are about no others.
        threat, settings: the perturbation set and the audit's settings, as specs.
        randomised: whether the model answers the same question differently; attacks then averaged gradients.
        clean: accuracy on unperturbed points. clean_by_class and worst_by_class: in the order of `data.classes`.
        worst_case: points that no attack broke. None if no attack could run.
        worst_by_type: the same for each member of a union of threats alone, by its name and radius.
        leaks: what attacks on the privacy of training records found about the way the model was trained.
        provenance: command, date, versions and hardware.
    """

    format: Literal[1] = 1
    name: str
    source: str
    artefact: str
    data: Data
    threat: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    provenance: dict[str, Any]
    seconds: float
    randomised: bool
    clean: Counted
    clean_by_class: tuple[Counted, ...]
    attacks: tuple[AttackFinding, ...]
    worst_case: Counted | None
    worst_by_class: tuple[Counted, ...]
    worst_by_type: dict[str, Counted] = {}
    curve: Curve | None
    certificate: CertificateFinding | None
    diagnosis: DiagnosisFinding | None = None
    explanations: ExplanationFinding | None = None
    severity: SeverityFinding | None = None
    leaks: tuple[LeakFinding, ...] = ()
    checks: tuple[Check, ...]
    cost: CostFinding

    @property
    def flags(self) -> tuple[Check, ...]:
        """The checks that were raised and cast doubt on the numbers."""
        return tuple(check for check in self.checks if check.raised and check.severity != "note")

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Findings:
        """The findings in `path`.

        Raises:
            TrivetError: no such file, another format, or damaged content.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != 1:
            raise TrivetError(
                f"{path} has an unknown format; it was written by another version of Trivet, audit again."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TrivetError(f"{path} is no audit file ({where}: {first['msg']}); audit again.") from None
