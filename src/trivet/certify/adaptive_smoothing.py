"""Randomized smoothing that draws noise only where it changes the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from trivet.certify.certifier import ABSTAIN, Certificates, Resumable
from trivet.certify.ladder import EARLY, Ladder
from trivet.certify.noisy_votes import BLOCK, Block, NoisyVotes, blocks_of, noisy_votes
from trivet.certify.smoothing import SLACK, Smoothing, positions
from trivet.display import Advance
from trivet.errors import require
from trivet.methods import method
from trivet.statistics import binomial_lower, binomial_upper

_SAVE_EVERY = 5.0
"""Seconds between two reports of what has been counted."""

_GUESS = 0.005
"""How often a pilot may misjudge a probability, on each side. It costs radius or copies, never soundness."""

Save = Callable[[Certificates], object]


@method(
    title="Adaptive randomized smoothing",
    paper="Horvath et al., ICLR 2022; Voracek, NeurIPS 2024; by tolerance: Chen et al., AAAI 2022",
    year=2024,
    legs="robust",
)
@dataclass(frozen=True)
class AdaptiveSmoothing(Smoothing, Resumable):
    """CERTIFY of Cohen et al. with as many copies for each input as its answer needs, `n` at most.

    As there, `n0` copies choose the class c, and only fresh ones count for it. Then one of two questions is answered.

    Which of the `radii` hold (Horvath et al., Voracek): radius r holds where p = P(f(x + noise) = c) > q(r), with
    q(r) = Phi(r / sigma) for L2 and 1/2 + r / (2 lam) for L1. The thresholds are tested in sequence as the votes come
    in (`trivet.certify.ladder` says how, and proves that looking after every block of copies costs nothing); an input
    is done when its largest radius is reached, or the next one has become hopeless. The certified radius is the
    largest of `radii` that was reached; with 0 among them, to know the class is an answer, too. The curve of
    certified accuracy at these radii is that of n copies for every input, up to inputs within about a standard
    deviation of a threshold: three quarters of alpha are kept for the last look.

    How far the radius reaches up to `tolerance` (Chen et al.): max(n0, n / 100) pilot copies tell how many are needed
    for a bound at most that much below what n copies would give, judged at the votes to be expected at both ends of the
    pilot's interval for p and at its estimate; as many fresh ones are drawn, and give the Clopper-Pearson radius of
    Cohen et al. at the full alpha, for the pilot's votes do not count. An input whose pilot excludes p > 1/2 is
    abandoned at once.

    Either way, each certificate is wrong with probability at most alpha over its draws.

    Every block of 100 copies has noise of its own, named by seed, position, stage and number. So the certificates of
    an interrupted, resumed or sharded run are those of one that was not (up to ties that other batches round
    otherwise), and evidence says where to go on: `class`, `count` votes of `n` copies, and at which count (`reached`
    of `reached_n`) the radius was reached, or how many copies were `planned`.

    What it saves, simulated with vote shares as in a published MNIST log of Gaussian training (5,000 inputs, alpha
    0.001, n = 100,000; copies on average, and the most that certified accuracy differs from that of n copies at any
    radius): sigma 0.25, radii 0, 0.25, 0.5, 0.75: 8,500, 0.06 %. Sigma 0.5, radii 0, 0.5, 1, 1.5: 13,900, 0.13 %.
    Sigma 1, radii 0, 0.5, …, 2.5: 11,900, 0.12 %. The closer the radii, and the nearer to the largest that n copies
    can certify, the less: 21,700 at sigma 1 for 0, 0.25, …, 2.5, and 45,000 at sigma 0.5 for 0, 0.25, …, 1.75, whose
    last alone needs 38,000 votes without one against.

    Attributes:
        radii: to decide about, rising, in input units.
        tolerance: instead: how much radius may be given away, in input units.
        n: copies at most.
    """

    n: int = 100_000
    radii: tuple[float, ...] = ()
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.radii) != (self.tolerance is not None), "radii=… or tolerance=… must be given, and not both.")
        require(self.tolerance is None or self.tolerance > 0, f"tolerance={self.tolerance} must be positive.")
        rising = all(a < b for a, b in zip(self.radii, self.radii[1:], strict=False))
        require(rising and all(radius >= 0 for radius in self.radii), f"radii={self.radii} must be rising, from 0 up.")
        if self.radii:
            top = self.radius(binomial_lower(self.n, self.n, (1 - EARLY) * self.alpha) - SLACK)
            require(
                self.radii[-1] < top,
                f"radii={self.radii} must stay below {top:.4g}, the most that n={self.n} copies can certify; leave out "
                "larger ones or raise n.",
            )

    @cached_property
    def ladder(self) -> Ladder:
        """The tests behind `radii`."""
        return Ladder(tuple(self.threshold(radius) + SLACK for radius in self.radii), self.n, self.alpha)

    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        """Certificates for `x` [N, ...] in [0, 1]; see the class for the evidence.

        Raises:
            BadValue: inputs outside [0, 1], or a model whose answer for one input depends on the rest of the batch.
        """
        return self.go_on(model, x, seed=seed, index=index, advance=advance)

    def go_on(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        seed: int,
        index: Tensor | None = None,
        advance: Advance | None = None,
        earlier: Certificates | None = None,
        save: Save | None = None,
    ) -> Certificates:
        index = positions(x, index)
        run = _Run(self, index)
        if earlier is not None:
            run.take(earlier)
        if len(x):
            with noisy_votes(self, model, x, index, seed) as votes:
                run.note = votes.note
                run.to_the_end(votes, advance, save)
        return run.certificates

    def finished(self, certificates: Certificates) -> Tensor:
        run = _Run(self, certificates.index)
        run.take(certificates)
        return run.finished(torch.arange(len(certificates)))

    def follows(self, certificates: Certificates) -> bool:
        run, expected = _Run(self, certificates.index), (self.norm, self.alpha)
        if certificates.evidence.keys() != run.evidence.keys() or (certificates.norm, certificates.alpha) != expected:
            return False
        run.take(certificates)
        if not run.possible:
            return False
        best = run.certificates
        label = (certificates.labels == best.labels) | certificates.abstained
        # Special functions differ in the last digits between releases, but not in the ninth.
        return bool((label & (certificates.radii <= (1 + 1e-9) * best.radii)).all())

    def shares(self, certificates: Certificates) -> Tensor:
        return certificates.evidence["count"] / certificates.evidence["n"].clamp(min=1).double()

    def planned(self, count: int, pilot: int) -> int:
        """Copies that give all but `tolerance` of the radius of n, where `count` of `pilot` copies voted for the class.

        A multiple of the block; 0 where the pilot excludes a majority.
        """
        high = binomial_upper(count, pilot, _GUESS)
        if self.tolerance is None or high <= 0.5:
            return 0
        likely = (binomial_lower(count, pilot, _GUESS), count / pilot, high)
        return max(self._enough(p, self.tolerance) for p in likely)

    def _enough(self, p: float, tolerance: float) -> int:
        """The least copies, in blocks, that certify something, and all but `tolerance` of what n do, at p n votes.

        One block where n copies would certify nothing.
        """

        def reach(copies: int) -> float:
            return self.radius(binomial_lower(round(p * copies), copies, self.alpha) - SLACK)

        full = reach(self.n)
        low, high = 1, -(-self.n // BLOCK) if full else 1
        while low < high:
            middle = (low + high) // 2
            found = reach(middle * BLOCK)
            low, high = (low, middle) if 0 < found >= full - tolerance else (middle + 1, high)
        return min(low * BLOCK, self.n)

    def conditions(self, note: str) -> tuple[str, ...]:
        known = f"the answer at radii {', '.join(f'{r:g}' for r in self.radii)}" if self.radii else "the radius"
        more = "" if self.tolerance is None else f" up to {self.tolerance:g}"
        about, _, *rest = super().conditions(note)
        said = (
            f"each certificate is wrong with probability at most {self.alpha:g} over its draws: {self.n0} choose the "
            f"class, and fresh ones, {self.n} at most, are drawn until {known} is known{more}"
        )
        return (about, said, *rest)


class _Run:
    """What has been counted for each input, and what follows from it."""

    def __init__(self, settings: AdaptiveSmoothing, index: Tensor) -> None:
        self.settings, self.index, self.note = settings, index, ""
        names = ("class", "count", "n", *(("reached", "reached_n") if settings.radii else ("planned",)))
        self.evidence = {name: torch.zeros(len(index), dtype=torch.int64) for name in names}
        self.evidence["class"].fill_(ABSTAIN)  # not chosen yet

    def take(self, earlier: Certificates) -> None:
        """Go on from `earlier`, wherever it is about the same inputs."""
        rows = {position: row for row, position in enumerate(earlier.index.tolist())}
        for row, position in enumerate(self.index.tolist()):
            if position in rows:
                for name, values in self.evidence.items():
                    values[row] = earlier.evidence[name][rows[position]]

    @property
    def possible(self) -> bool:
        """Whether these numbers can have been counted at all."""
        e, most = self.evidence, torch.tensor(self.settings.n)
        pairs = [(e["count"], e["n"]), (e["n"], most)]
        if self.settings.radii:
            pairs += [(e["reached"], e["reached_n"]), (e["reached_n"], e["n"])]
        else:
            pairs += [(e["n"], e["planned"]), (e["planned"], most)]
        counts = [values for name, values in e.items() if name != "class"]
        return (
            all(bool((low <= high).all()) for low, high in pairs)
            and all(bool((values >= 0).all()) for values in counts)
            and bool(((e["class"] >= 0) | (e["n"] == 0)).all())
        )

    def level(self, rows: Tensor) -> Tensor:
        """How many of the radii are reached at some of the inputs."""
        return self.settings.ladder.passed(self.evidence["reached"][rows], self.evidence["reached_n"][rows])

    def finished(self, rows: Tensor) -> Tensor:
        """[len(rows)] bool: of which of these inputs nothing more is to be counted."""
        chosen, count, n = (self.evidence[name][rows] for name in ("class", "count", "n"))
        if self.settings.radii:
            return (chosen != ABSTAIN) & self.settings.ladder.decided(self.level(rows), count, n)
        return (chosen != ABSTAIN) & (n >= self.evidence["planned"][rows])

    @property
    def certificates(self) -> Certificates:
        s, e = self.settings, self.evidence
        if s.radii:
            level = self.level(torch.arange(len(self.index)))
            reached = level > 0
            radii = torch.tensor([0.0, *s.radii], dtype=torch.float64)[level]
        else:
            bounds = [
                s.radius(binomial_lower(count, n, s.alpha) - SLACK) if 0 < planned <= n else 0.0
                for count, n, planned in zip(*(e[name].tolist() for name in ("count", "n", "planned")), strict=True)
            ]
            radii = torch.tensor(bounds, dtype=torch.float64)
            reached = radii > 0
        labels = e["class"].where(reached, ABSTAIN)
        evidence = {name: values.clone() for name, values in e.items()}
        return Certificates(self.index, labels, radii, s.norm, s.alpha, s.conditions(self.note), evidence)

    def to_the_end(self, votes: NoisyVotes, advance: Advance | None, save: Save | None) -> None:
        """Count until every input is finished."""
        self._choose(votes)
        saved, done = time.monotonic(), 0
        active = torch.arange(len(self.index))
        while True:
            active = active[~self.finished(active)]
            if advance:
                advance(len(self.index) - len(active) - done)
            done = len(self.index) - len(active)
            if not len(active):
                return
            self._count(votes, active)
            if save and time.monotonic() - saved >= _SAVE_EVERY:
                save(self.certificates)
                saved = time.monotonic()

    def _choose(self, votes: NoisyVotes) -> None:
        """Choose the class of each input that has none, and plan its copies, on copies that count for nothing else."""
        s, rows = self.settings, (self.evidence["class"] == ABSTAIN).nonzero().flatten()
        labels = _totals(votes, rows, "select", s.n0)[:, :-1].argmax(1)
        if s.tolerance is not None:
            pilot = max(s.n0, s.n // 100)
            counts = _totals(votes, rows, "pilot", pilot).gather(1, labels[:, None]).squeeze(1)
            self.evidence["planned"][rows] = torch.tensor(
                [s.planned(count, pilot) for count in counts.tolist()], dtype=torch.int64
            )
        self.evidence["class"][rows] = labels

    def _count(self, votes: NoisyVotes, active: Tensor) -> None:
        """One round: a block for each of the `active` inputs, or several while they are few.

        Whatever was drawn beyond the block that decides is forgotten: what is found never depends on the company.
        """
        n, labels = self.evidence["n"], self.evidence["class"]
        each = max(1, votes.at_once // len(active))
        limits = self.evidence["planned"] if "planned" in self.evidence else torch.full_like(n, self.settings.n)
        rows = (limits[active, None] - n[active, None] - BLOCK * torch.arange(each)).clamp(0, BLOCK)
        places = rows.nonzero()
        blocks = [
            Block(image, "estimate", int(n[image]) // BLOCK + b, int(rows[a, b]))
            for a, b in places.tolist()
            for image in [int(active[a])]
        ]
        won = torch.zeros_like(rows)
        tally = votes.count(blocks)
        won[places[:, 0], places[:, 1]] = tally.gather(1, labels[active[places[:, 0]], None]).squeeze(1)
        for b in range(each):
            still = ~self.finished(active)
            self.evidence["count"][active] += won[:, b] * still
            n[active] += rows[:, b] * still
            if self.settings.radii:
                self._climb(active)

    def _climb(self, active: Tensor) -> None:
        """Note where a further radius is reached."""
        e, ladder = self.evidence, self.settings.ladder
        higher = active[ladder.passed(e["count"][active], e["n"][active]) > self.level(active)]
        e["reached"][higher], e["reached_n"][higher] = e["count"][higher], e["n"][higher]


def _totals(votes: NoisyVotes, rows: Tensor, stage: str, copies: int) -> Tensor:
    """[len(rows), K + 1]: how often each class won among all copies of a stage."""
    blocks = [block for row in rows.tolist() for block in blocks_of(row, stage, copies)]
    return votes.count(blocks).unflatten(0, (len(rows), -1)).sum(1) if blocks else votes.count([])
