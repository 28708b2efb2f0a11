"""The pruning stage: what it drops, what it leaves in the checkpoint, and what it does to a privacy claim."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivet.claims import PrivacyClaim, Verdict
from trivet.compression.hydra import Hydra
from trivet.compression.scope import erk
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, TrivetError
from trivet.methods import build
from trivet.randomness import generator
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages
from trivet.training.prune import balanced
from trivet.training.stage import Checkpoint

THREAT = build("threats", {"name": "linf", "eps": 0.05})
RULE = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}


def blobs(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :2] += 120
    images[labels == 1, :, 2:] += 120
    return Dataset(images, labels, ("top", "bottom"), "blobs")


SPLITS = Splits(blobs(96, 0), blobs(40, 1))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)
    )


LAYERS = ("0", "4", "5")
WEIGHTS = 36 + 512 + 16


def fit(**settings: Any) -> tuple[str, Any]:
    spec = {"name": "fit", "objective": "plain", "epochs": 1, "batch_size": 24, "optimizer": {"name": "sgd"}}
    return "fit", build("training", spec | settings, threat=THREAT)


def prune(pruner: Any, **settings: Any) -> tuple[str, Any]:
    return "prune", build("training", {"name": "prune", "pruner": pruner, **settings}, threat=THREAT)


def run(folder: Path, *stages: Any, model: nn.Module | None = None) -> Checkpoint:
    made = RunFolder.create(folder, "recipe")
    return run_stages(stages, model or net(), SPLITS, made, seed=3, device=torch.device("cpu"))


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((model.get_submodule(name).weight == 0).sum()) for name in LAYERS}  # type: ignore[arg-type]


def test_magnitude_pruning_is_hydra_without_learning(tmp_path: Path) -> None:
    still = {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}
    lwm = run(tmp_path / "lwm", fit(), prune("magnitude", density=0.25), fit()).model
    hydra = {"name": "hydra", "density": 0.25}
    same = run(tmp_path / "hydra", fit(), fit(compression=hydra, optimizer=still), fit()).model
    norms = [name for name, _ in same.named_parameters() if name.startswith("1.")]
    for name, tensor in lwm.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    assert norms == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("pruner", "settings"),
    [
        ("magnitude", {}),
        ("magnitude", {"scope": "global"}),
        ("random", {}),
        ("snip", {"objective": "pgd_at"}),
        ("grasp", {"objective": "plain"}),
        ({"name": "synflow", "rounds": 10}, {}),
    ],
    ids=str,
)
def test_the_share_is_kept_exactly_stays_dropped_and_is_recorded(
    pruner: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = run(tmp_path / "run", prune(pruner, density=0.2, **settings), fit())
    dropped = zeros(checkpoint.model)
    record = checkpoint.history[0]
    assert record["stage"] == "prune"
    assert record["kept"] == {name: size - dropped[name] for name, size in zip(LAYERS, (36, 512, 16), strict=True)}
    if settings.get("scope", "") == "global" or pruner not in ("magnitude", "random"):
        assert sum(dropped.values()) == int(0.8 * WEIGHTS)
    else:
        assert dropped == {"0": 28, "4": 409, "5": 12}
    assert record["density"] == pytest.approx(1 - sum(dropped.values()) / WEIGHTS)
    assert checkpoint.structure == []


def test_erk_gives_small_layers_a_larger_share(tmp_path: Path) -> None:
    checkpoint = run(tmp_path / "run", prune("magnitude", density=0.2, scope="erk"))
    shares = erk({name: net().get_submodule(name).weight.shape for name in LAYERS}, 0.2)  # type: ignore[misc]
    kept = checkpoint.history[0]["kept"]
    sizes = {"0": 36, "4": 512, "5": 16}
    assert all(abs(kept[name] - shares[name] * sizes[name]) <= 1 for name in LAYERS)
    assert kept["5"] / 16 > kept["0"] / 36 > kept["4"] / 512


def test_patterns_and_names_are_heeded_and_the_checkpoint_reads_back(tmp_path: Path) -> None:
    stage = prune("magnitude", density=0.5, pattern={"name": "n_m", "m": 4}, include=["4"])
    checkpoint = run(tmp_path / "run", stage, fit())
    assert zeros(checkpoint.model) == {"0": 0, "4": 256, "5": 0}
    again = net(9)
    metadata = load_into(again, tmp_path / "run" / "stages" / "00-prune.safetensors")
    assert metadata["structure"] == [{"name": "masks", "include": ["4"], "exclude": []}]
    assert zeros(again) == {"0": 0, "4": 256, "5": 0}


def test_pruning_again_drops_further_weights_and_brings_none_back(tmp_path: Path) -> None:
    """GraSP's scores have both signs: those of dropped weights are zero, and many live ones are below."""
    first = run(tmp_path / "first", prune("random", density=0.5)).model
    both = run(tmp_path / "both", prune("random", density=0.5), prune("grasp", density=0.25, objective="plain")).model
    for name in LAYERS:
        gone = first.get_submodule(name).weight == 0
        assert bool((both.get_submodule(name).weight[gone] == 0).all())  # type: ignore[index]
    assert sum(zeros(both).values()) == int(0.75 * WEIGHTS)


def test_a_layer_left_empty_is_an_error_and_synflow_empties_none(tmp_path: Path) -> None:
    def weak() -> nn.Sequential:
        model = net()
        with torch.no_grad():
            model[5].weight.mul_(1e-9)  # type: ignore[operator]
        return model

    with pytest.raises(TrivetError, match=r"leaves no weight of 5 at density 0\.05, and nothing gets through it"):
        run(tmp_path / "run", prune("magnitude", density=0.05, scope="global"), model=weak())
    kept = run(tmp_path / "flow", prune({"name": "synflow", "rounds": 20}, density=0.05), model=weak()).history
    assert min(kept[0]["kept"].values()) > 0


def test_it_is_the_same_for_the_same_seed_and_does_not_train(tmp_path: Path) -> None:
    a, b = (
        run(tmp_path / name, prune("snip", density=0.3, objective="pgd_at", records=40)).model for name in ("a", "b")
    )
    fresh = net()
    for name in LAYERS:
        weight, same = (each.get_submodule(name).weight for each in (a, b))
        assert torch.equal(weight, same)  # type: ignore[arg-type]
        assert bool(((weight == 0) | (weight == fresh.get_submodule(name).weight)).all())  # type: ignore[arg-type]


def test_records_are_drawn_from_each_class_as_evenly_as_can_be() -> None:
    labels = torch.tensor([0] * 30 + [1] * 4 + [2] * 16)
    records = Dataset(torch.zeros(50, 1, 2, 2, dtype=torch.uint8), labels, ("a", "b", "c"), "few")
    drawn = balanced(records, 20, generator(0, "test"))
    assert len(set(drawn.tolist())) == 20
    assert Counter(labels[drawn].tolist()) == {0: 8, 1: 4, 2: 8}
    assert not torch.equal(drawn, balanced(records, 20, generator(1, "test")))
    assert len(balanced(records, 100, generator(0, "test"))) == 50


def privacy(checkpoint: Checkpoint) -> list[PrivacyClaim]:
    return [claim for claim in checkpoint.ledger.holding if isinstance(claim, PrivacyClaim)]


def test_a_pruner_of_weights_keeps_privacy_and_one_of_records_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    kept = run(tmp_path / "kept", fit(rule=RULE), prune("magnitude", density=0.3))
    (claim,) = privacy(kept)
    assert claim.artefact == kept.artefact
    assert privacy(run(tmp_path / "read", fit(rule=RULE), prune("snip", density=0.3, objective="plain"))) == []
    # Nor can what is trained privately on a mask that was read off the records claim anything.
    assert privacy(run(tmp_path / "first", prune("snip", density=0.3, objective="plain"), fit(rule=RULE))) == []


def test_the_effect_says_what_was_read() -> None:
    assert prune("magnitude")[1].effect().privacy[0] is Verdict.KEEP
    assert prune("grasp", objective="plain")[1].effect().privacy[0] is Verdict.VOID
    assert prune("magnitude")[1].effect().certificate[0] is Verdict.VOID


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadValue, match="objective=None leaves snip without a loss to read"):
        prune("snip")
    with pytest.raises(BadValue, match="objective=Plain is read by no part of magnitude"):
        prune("magnitude", objective="plain")
    with pytest.raises(BadValue, match="records=0 must be at least 1"):
        prune("snip", objective="plain", records=0)
    with pytest.raises(BadValue, match=r"density=0.0 must lie in \(0, 1\]"):
        prune("magnitude", density=0)


def test_hydra_says_how_many_weights_each_layer_keeps(tmp_path: Path) -> None:
    stage = fit(compression={"name": "hydra", "density": 0.25})
    assert isinstance(stage[1].compression, Hydra)
    assert run(tmp_path / "run", stage).history[0]["kept"] == {"0": 9, "4": 128, "5": 4}
