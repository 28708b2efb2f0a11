"""Defensive tensorization: factorised kernels with random components, judged over draws and by averaging attacks.

    python bench/tensorization.py --data digits --threads 1 --rounds 2 --out results/tensorization-digits.json
    python bench/tensorization.py --data mnist --threads 1 --rounds 1 --out results/tensorization-mnist.json

Three 3x3 convolutions of 16, 32 and 32 channels with BatchNorm and a linear layer. For each seed and each of natural
and PGD-7 training a dense network is trained; every row goes on from it for the same epochs, on the same batches: as it
is, or with the kernels of all three convolutions factorised, or with Dropout of channels that stays on. `keep` is
theta. A batch shares its draw in training, as in the paper, but for the row named so (natural training only, for its
cost).

All shares are over `points` test records and the last 20 of 40 draws, each record with a kernel of its own. Columns, in
per cent: clean, of the mean network (its draws off) and over draws; the least of 20 draws that all records share; the
vote of 20. Then what is left by PGD-20 of the mean network under its own; over draws, by PGD-20 on single draws, by
PGD-20 on gradients averaged over 20 draws (EOT), by the mean network's own points, and by those made for the keep=1
network of the same seed and training. Worst: each record under the attack that hurt it most in the first 20 draws,
clean among them, judged in the last 20; and the records that a vote of 20 holds against each attack. Clean again after
BatchNorm's statistics are measured anew (PreciseBN) over draws and for the mean network. Numbers of parameters, packed
bytes, seconds of training on the CPU.

Attacks draw from other seeds than the defender. Nothing here is a certificate. A row that is in --out already, from the
same settings, is not made again.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.compression.cost import cost_of
from trivet.compression.tensorization import Tensorization, silence
from trivet.data.dataset import Batch, Splits
from trivet.methods import build
from trivet.models import initialize
from trivet.models.surrogate import surrogate
from trivet.models.votes import votes
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.randomness import derive_seed, generator
from trivet.threats.attack import Target
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages
from trivet.training.precise_bn import estimate

DEFAULTS = {
    "digits": {"train": 1442, "epochs": 10, "more": 8, "eps": 0.1, "points": 200, "strides": (1, 2, 1)},
    "mnist": {"train": 6000, "epochs": 2, "more": 1, "eps": 0.2, "points": 200, "strides": (2, 2, 1)},
}
KERNELS = ("conv*",)
DROPOUT = "dense, channels dropped, 0.05"
APART = "Tucker, keep 0.95, a draw for each record"
ROWS: dict[str, Tensorization | None] = {
    "dense": None,
    DROPOUT: None,
    "Tucker, keep 1": Tensorization(keep=1.0, include=KERNELS),
    "Tucker, keep 0.95": Tensorization(keep=0.95, include=KERNELS),
    "Tucker, keep 0.9": Tensorization(keep=0.9, include=KERNELS),
    APART: Tensorization(keep=0.95, per_sample=True, include=KERNELS),
    "CP, keep 0.95": Tensorization(form="cp", keep=0.95, include=KERNELS),
    "binary Tucker, keep 0.95": Tensorization(keep=0.95, binary=True, include=KERNELS),
}
TWIN = "Tucker, keep 1"
TRAININGS = ("natural", "PGD-7")
SETTINGS = ("data", "train", "epochs", "more", "eps", "points", "draws", "strides")
SHARES = ("clean", "one_sample", "eot", "own_mean", "keep_one")


class Dropout(nn.Module):
    """Whole channels dropped for each record, at test time too: what randomness does without factors."""

    randomised = True

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout2d(x, 0.05, training=True) if self.randomised else x


def network(splits: Splits, strides: Sequence[int], seed: int) -> nn.Sequential:
    channels, size, _ = splits.train.input_shape
    net = nn.Sequential()
    for number, (width, stride) in enumerate(zip((16, 32, 32), strides, strict=True), 1):
        net.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
        net.add_module(f"norm{number}", nn.BatchNorm2d(width))
        net.add_module(f"relu{number}", nn.ReLU())
        channels, size = width, (size + stride - 1) // stride
    net.add_module("flatten", nn.Flatten())
    net.add_module("logits", nn.Linear(channels * size * size, splits.train.num_classes))
    initialize.uniform_(net, generator(seed, "weights"))
    return net


def trained(
    model: nn.Module, form: Tensorization | None, training: str, epochs: int, rate: float, options: Any, data: Splits
) -> nn.Module:
    """`model`, in place, after more epochs, in this form."""
    start = 0.3 if rate > 1e-3 else 0.0
    objective: Objective = Plain() if training == "natural" else PgdAt(Linf(options.eps), 7, eps_ramp=start)
    stage = Fit(objective, epochs, 64, optimizer=Adam(rate), compression=form)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "benchmark")
        done = run_stages([("fit", stage)], model, data, run, seed=options.now, device=torch.device("cpu"))
    return done.model.eval()


def drawing(model: nn.Module, form: Tensorization | None, per_record: bool, plain: nn.Module) -> nn.Module:
    """The trained `model` with draws of one kind or the other; `plain` is any network of its shape before factors."""
    if form is None:
        return model
    made = copy.deepcopy(plain)
    again = Tensorization(
        form=form.form, keep=form.keep, binary=form.binary, per_sample=per_record, include=form.include
    )
    again.attach(made)
    made.load_state_dict(model.state_dict())
    return made.eval()


def silent(model: nn.Module) -> nn.Module:
    quiet = copy.deepcopy(model)
    silence(quiet)
    for module in quiet.modules():
        if isinstance(module, Dropout):
            module.randomised = False
    return quiet


def points(model: nn.Module, batch: Batch, options: Any, purpose: str, samples: int = 1) -> Tensor:
    """The last iterates of PGD-20 on `model`, whether they fool it or not: the verdict is on other draws."""
    torch.manual_seed(derive_seed(options.now, "attacker", purpose))
    attack = PGD(Linf(options.eps), steps=20, samples=samples)
    target = Target(surrogate(model, "fp32"), model)
    return attack.search(target, batch.inputs, batch.labels, generator(options.now, "start", purpose))


def judged(shared: nn.Module, own: nn.Module, twin: nn.Module, batch: Batch, options: Any) -> dict[str, float]:
    """Percentages. `shared` and `own` are one network with a draw for the batch, and with one for each record."""
    mean, y = silent(shared), batch.labels
    random = any(getattr(module, "randomised", False) for module in shared.modules())
    made = {
        "clean": batch.inputs,
        "one_sample": points(shared, batch, options, "one sample"),
        "own_mean": points(mean, batch, options, "mean"),
        "keep_one": points(twin, batch, options, "twin"),
    }
    made["eot"] = points(shared, batch, options, "EOT", options.draws) if random else made["one_sample"]
    draws = options.draws if random else 1
    torch.manual_seed(derive_seed(options.now, "defender"))
    rows = torch.arange(len(y))
    first = {name: votes(own, x, draws) for name, x in made.items()}
    last = {name: votes(own, x, draws)[rows, y].double() / draws for name, x in made.items()}
    chosen = torch.stack([first[name][rows, y] for name in SHARES]).argmin(0)
    held = {name: first[name].argmax(1) == y for name in SHARES}
    on_mean = {name: votes(mean, made[name], 1)[rows, y].double() for name in ("clean", "own_mean")}
    together = [float(votes(shared, batch.inputs, 1)[rows, y].double().mean()) for _ in range(draws)]
    found = {
        "clean_mean_net": on_mean["clean"],
        "clean": last["clean"],
        "vote": held["clean"],
        "pgd_mean_net": on_mean["own_mean"],
        **{name: last[name] for name in SHARES if name != "clean"},
        "worst": torch.stack([last[name] for name in SHARES])[chosen, rows],
        "vote_worst": torch.stack(list(held.values())).all(0),
    }
    percent = {name: 100 * float(each.double().mean()) for name, each in found.items()}
    return percent | {"clean_least": 100 * min(together), "clean_most": 100 * max(together)}


def again_normalised(own: nn.Module, batch: Batch, splits: Splits, options: Any) -> dict[str, float]:
    """Clean shares after BatchNorm is measured anew, with the draws and without."""
    found = {}
    for name, model in (("clean_precise", copy.deepcopy(own)), ("mean_net_precise", silent(own))):
        torch.manual_seed(derive_seed(options.now, name))
        estimate(model, splits.train, 256, 2, options.now)
        right = votes(model, batch.inputs, options.draws)[torch.arange(len(batch)), batch.labels]
        found[name] = 100 * float(right.double().mean()) / options.draws
    return found


def measured(options: Any, splits: Splits) -> dict[str, Any]:
    runs = harness.earlier(options, SETTINGS, "runs")
    batch = splits.test.batch(torch.arange(options.points))
    shape = splits.train.input_shape
    for seed in range(options.seed, options.seed + options.rounds):
        options.now = seed
        for training in TRAININGS:
            known = [run["row"] for run in runs if (run["training"], run["seed"]) == (training, seed)]
            # Training with a draw for each record takes several times as long: natural training shows what it changes.
            wanted = [row for row in ROWS if (row, training) != (APART, "PGD-7")]
            if len(known) == len(wanted):
                continue
            plain = network(splits, options.strides, seed)
            trained(plain, None, training, options.epochs, 2e-3, options, splits)
            made: dict[str, nn.Module] = {}
            for row in (TWIN, *(name for name in wanted if name != TWIN)):
                if row in known and row != TWIN:
                    continue
                start, form = time.process_time(), ROWS[row]
                begun = copy.deepcopy(plain)
                if row == DROPOUT:
                    for number in (1, 2, 3):
                        begun.set_submodule(f"relu{number}", nn.Sequential(nn.ReLU(), Dropout()))
                model = trained(begun, form, training, options.more, 1e-3, options, splits)
                made[row], spent = model, time.process_time() - start
                if row in known:
                    continue
                shared, own = (drawing(model, form, each, plain) for each in (False, True))
                found = judged(shared, own, made[TWIN], batch, options)
                found |= again_normalised(own, batch, splits, options)
                cost = cost_of(shared, shape)
                sizes = {"parameters": cost.parameters, "packed_bytes": cost.packed_bytes}
                runs.append({"row": row, "training": training, "seed": seed, **found, **sizes, "train_seconds": spent})
                print(f"{row}, {training}, seed {seed}: {found}, {time.process_time() - start:.0f} s", flush=True)
                harness.save(options, {"runs": runs, **summary(runs)})
    return {"runs": runs, **summary(runs)}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; and differences of pairs with Student's interval: what averaging takes, what draws give."""
    table, gaps = [], []
    for training in TRAININGS:
        by_row = {row: {r["seed"]: r for r in runs if (r["row"], r["training"]) == (row, training)} for row in ROWS}
        for row, own in by_row.items():
            if not own:
                continue
            numbers = [name for name in next(iter(own.values())) if name not in ("row", "training", "seed")]
            means = {name: statistics.fmean(run[name] for run in own.values()) for name in numbers}
            table.append({"row": row, "training": training, "seeds": len(own), **means})
            twin = by_row[TWIN]
            if row in ("dense", TWIN):
                continue
            paired = {
                "one sample over EOT": [run["one_sample"] - run["eot"] for run in own.values()],
                "EOT over keep=1's PGD": [run["eot"] - twin[s]["pgd_mean_net"] for s, run in own.items() if s in twin],
                "worst over keep=1's worst": [run["worst"] - twin[s]["worst"] for s, run in own.items() if s in twin],
                "worst over dense worst": [
                    run["worst"] - by_row["dense"][s]["worst"] for s, run in own.items() if s in by_row["dense"]
                ],
            }
            for name, values in paired.items():
                if values:
                    line = {"row": row, "training": training, "points": name, "mean": statistics.fmean(values)}
                    gaps.append({**line, "least": min(values), "interval": harness.interval(values)})
    return {"table": table, "gaps": gaps}


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=1)
    parser.add_argument("--data", choices=sorted(DEFAULTS), default="digits")
    for name in ("train", "epochs", "more", "points"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--strides", type=int, nargs=3)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--draws", type=int, default=20, help="of a gradient in EOT, of a vote, and of a verdict")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, list(value) if isinstance(value, tuple) else value)
    harness.prepare(options)
    splits: Splits = build("data", options.data, expects=Splits)
    splits = splits.limited(train=options.train)
    results = measured(options, splits)
    vars(options).pop("now", None)
    for training in TRAININGS:
        rows = [row for row in results["table"] if row["training"] == training]
        harness.show(f"{options.data}, {training}, l_inf {options.eps:.3g}: per cent", rows)
    shown = [{key: value for key, value in gap.items() if key != "interval"} for gap in results["gaps"]]
    harness.show("Differences of pairs, points", shown)
    harness.save(options, results)


if __name__ == "__main__":
    main()
