"""Training: a killed run is the same run, what is asked for happens, and what cannot work is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, TrivetError
from trivet.files import load_tensors, sole_writer
from trivet.methods import build
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.stage import Checkpoint

THREAT = build("threats", {"name": "linf", "eps": 0.1})


def blobs(count: int = 96, seed: int = 0) -> Dataset:
    """Images whose class is the brightest quarter: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for number, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[number, 0, row : row + 4, column : column + 4] += 120
    return Dataset(images, labels, ("a", "b", "c", "d"), "blobs")


SPLITS = Splits(blobs(), blobs(40, 1))


def net(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(512, 4),
    )


def fit(objective: Any = "plain", **settings: Any) -> Fit:
    spec = {
        "name": "fit",
        "objective": objective,
        "epochs": 3,
        "batch_size": 20,
        "optimizer": {"name": "sgd", "lr": 0.05},
    }
    made: Fit = build("training", spec | settings, threat=THREAT)
    return made


def trained(stage: Fit, folder: Path, model: nn.Module | None = None, seed: int = 5) -> Checkpoint:
    run = RunFolder.create(folder, "recipe")
    return run_stages([("fit", stage)], model or net(), SPLITS, run, seed=seed, device=torch.device("cpu"))


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}


def accuracy(model: nn.Module, data: Dataset) -> float:
    batch = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        return float((model.eval()(batch.inputs).argmax(1) == batch.labels).float().mean())


class Interrupted(Exception):
    """Stands for a kill inside a test's own process."""


def interrupted_at(
    step: int, stage: Fit, folder: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module
) -> Checkpoint:
    """Train, be stopped just before `step`, and resume with a freshly initialised model."""
    from trivet.training import fit as module

    honest = module._Loop._step

    def stop(loop: Any, batch: Any, now: int) -> Any:
        if now == step:
            raise Interrupted
        return honest(loop, batch, now)

    run = RunFolder.create(folder, "recipe")
    device = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_step", stop)
        with pytest.raises(Interrupted):
            run_stages([("fit", stage)], model, SPLITS, run, seed=5, device=device)
    return run_stages([("fit", stage)], net(99, 0.2), SPLITS, run, seed=5, device=device)


OBJECTIVES: list[Any] = [
    "plain",
    {"name": "pgd_at", "steps": 2},
    {"name": "trades", "steps": 2},
    {"name": "gaussian", "sigma": 0.1},
    {"name": "awp", "objective": {"name": "pgd_at", "steps": 2}},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_resumed_run_ends_with_the_same_bits(objective: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = fit(
        objective,
        save_every=2,
        average=0.9,
        holdout=16,
        keep="best",
        augment=["horizontal_flip"],
        optimizer={"name": "adam", "lr": 0.01},
    )
    whole = weights(trained(stage, tmp_path / "whole", net(0, 0.2)))
    resumed = weights(interrupted_at(7, stage, tmp_path / "resumed", monkeypatch, net(0, 0.2)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [(tmp_path / each / "log.jsonl").read_text() for each in ("whole", "resumed")]
    assert logs[0] == logs[1]


def test_a_kill_between_an_epoch_and_its_judgement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trivet.training import fit as module

    stage = fit(save_every=1, holdout=16, keep="best", optimizer={"name": "sgd", "lr": 2.0})
    whole = trained(stage, tmp_path / "whole")
    run = RunFolder.create(tmp_path / "resumed", "recipe")
    judged: list[int] = []

    def dies_at_second(*arguments: Any) -> dict[str, float]:
        judged.append(1)
        if len(judged) == 2:
            raise Interrupted
        return honest(*arguments)

    honest = module.held_out
    with monkeypatch.context() as patch:
        patch.setattr(module, "held_out", dies_at_second)
        with pytest.raises(Interrupted):
            run_stages([("fit", stage)], net(), SPLITS, run, seed=5, device=torch.device("cpu"))
    resumed = run_stages([("fit", stage)], net(1), SPLITS, run, seed=5, device=torch.device("cpu"))
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    assert (tmp_path / "whole" / "log.jsonl").read_text() == run.log.read_text()


def test_a_run_is_not_resumed_on_other_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trivet.training import fit as module

    stage, device = fit(save_every=1), torch.device("cpu")
    run = RunFolder.create(tmp_path / "run", "recipe")
    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_judge", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run_stages([("fit", stage)], net(), SPLITS, run, seed=5, device=device)
    other = Splits(blobs(seed=3), SPLITS.test)
    with pytest.raises(TrivetError, match="other records"):
        run_stages([("fit", stage)], net(), other, run, seed=5, device=device)


def test_one_stage_object_used_for_two_runs_starts_each_afresh(tmp_path: Path) -> None:
    stage = fit({"name": "free_at", "replays": 2})
    first, second = (weights(trained(stage, tmp_path / name)) for name in ("1", "2"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_somebody_else_is_writing_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "recipe")
    with sole_writer(run.path), pytest.raises(TrivetError, match="another process"):
        run_stages([("fit", fit())], net(), SPLITS, run, seed=1, device=torch.device("cpu"))
    assert not run.log.exists()


def test_an_objective_with_state_resumes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"name": "free_at", "replays": 2}
    whole = weights(trained(fit(spec, save_every=2), tmp_path / "whole", net(0, 0.2)))
    resumed = weights(interrupted_at(9, fit(spec, save_every=2), tmp_path / "resumed", monkeypatch, net(0, 0.2)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    one, other = trained(fit(), tmp_path / "1", seed=1), trained(fit(), tmp_path / "2", seed=2)
    assert not torch.equal(one.model.state_dict()["5.weight"], other.model.state_dict()["5.weight"])


RECIPE = """\
name: killed
data: {name: digits, train_limit: 400, test_limit: 50}
model: {name: small_cnn}
threat: {name: linf, eps: 0.1}
stages:
  - fit:
      objective: {name: pgd_at, steps: 3}
      epochs: 3
      batch_size: 16
      average: 0.9
      save_every: 3
"""


@pytest.mark.slow
def test_a_process_killed_by_sigkill_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(RECIPE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train = [sys.executable, "-c", "from trivet.cli import main; main()", "train", str(recipe), "--out"]

    def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*train, str(out), *more], capture_output=True, text=True, env=environment)

    assert run(tmp_path / "whole").returncode == 0
    kills = 0
    out = tmp_path / "killed"
    state = out / "stages" / "00-fit.state"
    for saves in (1, 3):
        process = subprocess.Popen([*train, str(out), "--resume"], env=environment, stderr=subprocess.DEVNULL)
        seen: set[int] = set()
        while process.poll() is None and len(seen) < saves:
            if state.exists():
                seen.add(state.stat().st_mtime_ns)
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 1, "the runs ended before they could be killed: the test proves nothing"
    assert not (out / "weights.safetensors").exists()
    assert run(out, "--resume").returncode == 0
    whole, killed = (load_tensors(tmp_path / each / "weights.safetensors")[0] for each in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == kills + 1


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "recipe")
    device = torch.device("cpu")
    first = weights(run_stages([("fit", fit())], net(), SPLITS, run, seed=1, device=device))
    log = run.log.read_text()
    again = run_stages([("fit", fit())], net(7), SPLITS, run, seed=1, device=device)
    assert all(torch.equal(first[name], tensor) for name, tensor in again.model.state_dict().items())
    assert run.log.read_text() == log
    assert len(again.history) == 1


def test_a_later_stage_starts_from_the_earlier_ones_checkpoint(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "recipe")
    stages = [("fit", fit()), ("fit", fit(epochs=1))]
    both = run_stages(stages, net(), SPLITS, run, seed=1, device=torch.device("cpu"))
    assert [record["steps"] for record in both.history] == [15, 5]
    assert {line["stage"] for line in run.read_log()} == {0, 1}


def test_training_learns_and_training_modes_work(tmp_path: Path) -> None:
    for number, settings in enumerate(
        (
            {},
            {"precision": "bf16"},
            {"average": 0.8, "max_grad_norm": 1.0},
            {"optimizer": {"name": "adamw", "lr": 0.01}, "schedule": {"name": "one_cycle"}, "channels_last": False},
        )
    ):
        done = trained(fit(epochs=8, **settings), tmp_path / str(number))
        assert accuracy(done.model, SPLITS.test) > 0.9, settings


def test_compiled_training_agrees_with_eager_training(tmp_path: Path) -> None:
    class Twice(nn.Module):
        """Small enough to compile in seconds."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.out = nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x.flatten(1)) * 2

    eager = trained(fit(), tmp_path / "eager", Twice())
    compiled = trained(fit(compile=True), tmp_path / "compiled", Twice())
    torch.testing.assert_close(eager.model.state_dict(), compiled.model.state_dict())


def test_held_out_records_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    honest = Dataset.batch

    def spy(data: Dataset, index: torch.Tensor) -> Any:
        batch = honest(data, index)
        if torch.is_grad_enabled() and len(data) == 80:
            seen.update(int(each) for each in (batch.inputs * 255).sum((1, 2, 3)).round())
        return batch

    monkeypatch.setattr(Dataset, "batch", spy)
    trained(fit(holdout=16), tmp_path / "run")
    everything = {int(each) for each in SPLITS.train.images.sum((1, 2, 3))}
    assert seen
    assert len(everything - seen) >= 8


def test_the_best_held_out_weights_are_kept(tmp_path: Path) -> None:
    stage = fit({"name": "pgd_at", "steps": 2}, epochs=6, holdout=16, keep="best", optimizer={"name": "sgd", "lr": 3.0})
    done = trained(stage, tmp_path / "run")
    log = RunFolder.open(tmp_path / "run").read_log()
    scores = [line["held_pgd"] for line in log if "held_pgd" in line]
    assert len(scores) == 6
    assert done.history[0]["best_held_out"] == max(scores)


def test_an_l1_penalty_pulls_weights_by_their_sign_and_leaves_biases_and_norms_alone(tmp_path: Path) -> None:
    """One plain step with and without: the weights differ by rate * l1 * sign(weight)."""
    one_step = {
        "epochs": 1,
        "batch_size": 96,
        "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0, "weight_decay": 0},
    }
    one_step["schedule"] = "constant"
    before = dict(net().named_parameters())
    plain, pulled = (
        dict(trained(fit(l1=l1, **one_step), tmp_path / str(l1)).model.named_parameters()) for l1 in (0.0, 0.01)
    )
    for name, weight in before.items():
        expected = 0.005 * weight.sign() if weight.ndim > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(plain[name] - pulled[name], expected, rtol=0, atol=1e-6)


class Judging(Plain):
    """Adapts to held-out records: its weight is how often it has judged, and it is part of a resumed run."""

    needs_holdout = True

    def __init__(self) -> None:
        self.judged: list[tuple[int, bool, float]] = []

    def judge(self, model: nn.Module, held: Dataset, progress: Progress) -> dict[str, float]:
        self.judged.append((len(held), model.training, progress.fraction))
        return {"held_twice": 2.0}


def test_an_objective_judges_the_held_out_records_after_every_epoch_and_its_numbers_are_logged(tmp_path: Path) -> None:
    objective = Judging()
    trained(Fit(objective, epochs=2, batch_size=20, holdout=16), tmp_path / "run")
    assert objective.judged == [(16, False, 0.5), (16, False, 1.0)]
    log = RunFolder.open(tmp_path / "run").read_log()
    assert [line["held_twice"] for line in log if "held_clean" in line] == [2.0, 2.0]


def test_an_objective_that_adapts_needs_records_to_adapt_to() -> None:
    with pytest.raises(BadValue, match="holdout=0 leaves Judging no records"):
        Fit(Judging())


def test_a_loss_that_is_not_finite_stops_the_run_with_a_mend(tmp_path: Path) -> None:
    with pytest.raises(TrivetError, match=r"not finite at step \d+.*lower the learning rate"):
        trained(fit(optimizer={"name": "sgd", "lr": 1e30}), tmp_path / "run")
    assert not (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"average": 1.0}, r"average=1\.0"),
        ({"keep": "best"}, "needs holdout"),
        ({"l1": -1e-6}, "l1=-1e-06 must not be negative"),
        ({"keep": "latest"}, "'last' or 'best'"),
        ({"optimizer": {"name": "sgd", "lr": 0}}, "lr=0"),
        ({"schedule": {"name": "piecewise", "at": [2]}}, "fractions of training"),
        ({"save_every": 0}, "save_every=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        fit(**settings)


def test_a_holdout_of_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="leaves no record"):
        trained(fit(holdout=96), tmp_path / "run")


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(TrivetError, match="already exists"):
        RunFolder.create(tmp_path, "recipe")


def test_training_leaves_the_global_random_stream_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = net(0, 0.5)
    torch.manual_seed(3)
    trained(fit(), tmp_path / "run", model)
    assert torch.equal(torch.rand(3), expected)


def test_the_log_of_a_torn_line_is_still_read(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "recipe")
    run.stage(0, "fit").log({"step": 0, "loss": 1.0})
    with run.log.open("a") as handle:
        handle.write('{"stage": 0, "st')
    assert run.read_log() == [{"stage": 0, "step": 0, "loss": 1.0}]


@pytest.mark.parametrize("name", ["constant", "cosine", "one_cycle", "piecewise"])
def test_schedules_stay_between_zero_and_one(name: str) -> None:
    schedule = build("training", name)
    values = [schedule(step / 1000) for step in range(1000)]
    assert all(0 <= value <= 1 for value in values)
    assert max(values) > 0.99


def test_schedules_are_what_their_formulas_say() -> None:
    assert build("training", {"name": "one_cycle", "peak": 0.5})(0.25) == 0.5
    assert build("training", {"name": "one_cycle", "peak": 0.5})(0.75) == 0.5
    assert build("training", {"name": "piecewise", "at": [0.5, 0.75]})(0.8) == pytest.approx(0.01)
    cosine = build("training", {"name": "cosine", "warmup": 0.2})
    assert cosine(0.1) == 0.5
    assert cosine(0.6) == pytest.approx(0.5)
