"""The WNLL stage: fixed stratified templates, read back from the run, stage 2 in the buffer alone, privacy told."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.claims import PrivacyClaim, Verdict
from trivet.compression.wnll import Wnll as Layer
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue
from trivet.methods import build
from trivet.models.mlp import mlp
from trivet.models.taps import last_linear
from trivet.models.wnll import require_head
from trivet.randomness import derive_seed, generator
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages
from trivet.training.stage import Checkpoint
from trivet.training.wnll import features, stratified

THREAT = build("threats", {"name": "linf", "eps": 0.05})
SMALL = {"neighbours": 5, "scale": 3}


def blobs(count: int, seed: int) -> Dataset:
    """Two classes of 2x2 pictures, the brighter one and the darker."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 40 + 90 * labels.view(-1, 1, 1, 1) + torch.randint(0, 80, (count, 1, 2, 2), generator=generator)
    return Dataset(images.to(torch.uint8), labels, ("dark", "bright"), "blobs")


SPLITS = Splits(blobs(80, 0), blobs(40, 1))


def net() -> nn.Module:
    return mlp((1, 2, 2), 2, (8, 6, 6), generator=torch.Generator().manual_seed(0))


def stage(name: str, **settings: Any) -> tuple[str, Any]:
    return name, build("training", {"name": name, **settings}, threat=THREAT)


FIT = stage("fit", objective="plain", epochs=2, batch_size=20, optimizer={"name": "adam", "lr": 0.01})
PRIVATE = stage(
    "fit",
    objective="plain",
    epochs=1,
    batch_size=20,
    optimizer={"name": "sgd", "lr": 0.1, "momentum": 0},
    rule={"name": "dp_sgd", "max_grad_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
)


def run(folder: Path, *stages: tuple[str, Any], splits: Splits = SPLITS) -> Checkpoint:
    return run_stages(stages, net(), splits, RunFolder.create(folder, "name: x\n"), seed=0, device=torch.device("cpu"))


def inputs(seed: int = 3) -> Tensor:
    return torch.rand(9, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_the_head_holds_the_features_of_stratified_records_and_is_read_back(tmp_path: Path) -> None:
    done = run(tmp_path / "run", FIT, stage("wnll", templates=20, **SMALL))
    head, record = require_head(done.model), done.history[-1]
    assert record["templates"] == 20
    assert record["by_class"] == [10, 10] == head.targets.sum(0).tolist()
    every = features(done.model, SPLITS.train)
    apart = torch.cdist(head.templates, every)
    assert float(apart.min(1).values.max()) < 1e-6
    assert torch.equal(SPLITS.train.labels[apart.argmin(1)], head.targets.argmax(1))
    batch = SPLITS.test.batch(torch.arange(40))
    assert float((done.model(batch.inputs).argmax(1) == batch.labels).float().mean()) > 0.9
    again = net()
    load_into(again, RunFolder.open(tmp_path / "run").weights)
    assert torch.equal(again.eval()(inputs()), done.model(inputs()))
    assert not torch.allclose(done.model(inputs()), head.linear(_hidden(done.model, inputs())))


def test_the_features_and_the_linear_layer_stay_as_they_were(tmp_path: Path) -> None:
    before = run(tmp_path / "fit", FIT).model
    after = run(tmp_path / "wnll", FIT, stage("wnll", **SMALL)).model
    require_head(after).through = "linear"
    assert torch.equal(before(inputs()), after(inputs()))


def test_stage_two_moves_the_buffer_alone(tmp_path: Path) -> None:
    second: dict[str, Any] = {**SMALL, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.01}}
    without = run(tmp_path / "off", FIT, stage("wnll", **SMALL)).model
    done = run(tmp_path / "on", FIT, stage("wnll", epochs=2, buffer=["fc3"], **second))
    moved = {
        name
        for (name, one), other in zip(done.model.named_parameters(), without.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert moved == {"fc3.weight", "fc3.bias"}
    assert all(each.requires_grad for each in done.model.parameters())
    assert len(done.history[-1]["second_stage"]) == 2
    again = run(tmp_path / "again", FIT, stage("wnll", epochs=2, buffer=["fc3"], **second))
    assert again.artefact == done.artefact


def test_the_first_step_of_stage_two_is_the_surrogate_gradient_of_the_buffer(tmp_path: Path) -> None:
    """One batch, plain SGD: fc3 moves by -lr times what autograd gives for CE(u) with A^T in place of du/dz."""
    sgd = {"name": "sgd", "lr": 0.5, "momentum": 0, "weight_decay": 0}
    one = stage("wnll", epochs=1, buffer=["fc3"], batch_size=80, optimizer=sgd, **SMALL)
    before = run(tmp_path / "off", FIT, stage("wnll", **SMALL)).model
    after = run(tmp_path / "on", FIT, one).model
    # The same 64 queries and 16 templates: the split is a function of the run's seed.
    order = stratified(SPLITS.train.labels, 80, generator(derive_seed(0, "wnll", 1), "split"))
    queries, chosen = SPLITS.train.select(order[16:]), SPLITS.train.select(order[:16])
    a = last_linear(before).weight.detach()
    small = type(require_head(before))(last_linear(before), 16, 5, 3).eval()
    small.fill(features(before, chosen), chosen.labels)
    z = features(before, queries).float()
    u = small.shares(z, small.linear(z)).detach().float()
    residual = (u.softmax(1) - nn.functional.one_hot(queries.labels, 2)) @ a / 64
    layers = dict(before.named_modules())
    hidden = queries.batch(torch.arange(64)).inputs
    for name in ("normalize", "flatten", "fc1", "relu1", "fc2", "relu2"):
        hidden = layers[name](hidden)
    passed = residual * (layers["fc3"](hidden) > 0)
    moved = dict(after.named_modules())["fc3"].weight - layers["fc3"].weight
    torch.testing.assert_close(moved.detach(), (-0.5 * passed.T @ hidden).detach(), rtol=1e-3, atol=1e-6)


def test_later_training_trains_the_linear_layer_and_the_templates_are_filled_anew(tmp_path: Path) -> None:
    fill = stage("wnll", **SMALL)
    done = run(tmp_path / "rounds", FIT, fill, FIT, fill)
    head = require_head(done.model)
    assert sum(spec["name"] == "wnll" for spec in done.structure) == 1
    every = features(done.model, SPLITS.train)
    torch.testing.assert_close(head.templates.sort(0).values, every.sort(0).values, rtol=0, atol=1e-5)
    between = run(tmp_path / "between", FIT, fill, FIT).model
    assert not bool(require_head(between).filled)
    assert torch.equal(between(inputs()), require_head(between).linear(_hidden(between, inputs())))
    with pytest.raises(BadValue, match="of other settings already"):
        run(tmp_path / "other", FIT, fill, stage("wnll", neighbours=6, scale=3))


def _hidden(model: nn.Module, x: Tensor) -> Tensor:
    for name, layer in model.named_children():
        x = x if name == "logits" else layer(x)
    return x


def test_templates_end_a_privacy_claim_and_rule_out_a_later_one(tmp_path: Path) -> None:
    done = run(tmp_path / "run", PRIVATE, stage("wnll", **SMALL))
    claims = [claim for claim in done.ledger.claims if isinstance(claim, PrivacyClaim)]
    assert len(claims) == 1
    assert claims[0].voided is not None
    assert "labels of training records" in claims[0].voided.reason
    later = run(tmp_path / "later", FIT, stage("wnll", **SMALL), PRIVATE)
    assert not [claim for claim in later.ledger.holding if isinstance(claim, PrivacyClaim)]


def test_public_templates_keep_it_unless_stage_two_reads_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere: Any = ModuleType("elsewhere")
    elsewhere.other, elsewhere.same = (lambda: Splits(blobs(60, 7), blobs(20, 8))), (lambda: SPLITS)
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere)
    public = stage("wnll", public={"import": "elsewhere:other", "train_limit": 50}, **SMALL)
    done = run(tmp_path / "run", PRIVATE, public)
    assert [claim.artefact for claim in done.ledger.holding] == [done.artefact]
    assert len(require_head(done.model).templates) == 50
    assert done.history[-1]["public"]["records"] == 50
    assert "data" not in done.history[-1]
    reads = replace(public[1], epochs=1, buffer=("fc3",), batch_size=16)
    assert reads.effect().privacy[0] is Verdict.VOID
    with pytest.raises(BadValue, match="holds 80 of the recipe's training records"):
        run(tmp_path / "same", FIT, stage("wnll", public={"import": "elsewhere:same"}, **SMALL))


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), data=st.data())
def test_templates_hold_every_class_and_are_in_proportion(counts: list[int], data: st.DataObject) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    number = data.draw(st.integers(len(counts), len(labels)))
    index = stratified(labels, number, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assert len(index.unique()) == number
    chosen = torch.bincount(labels[index], minlength=len(counts))
    assert int(chosen.min()) >= 1
    shares = chosen / torch.tensor(counts)
    # All classes stop at the same share, but for one record each.
    assert float((shares - 1 / torch.tensor(counts)).max()) <= float(shares.min()) + 1e-6


def test_more_classes_than_templates_are_refused() -> None:
    with pytest.raises(BadValue, match="templates=2 must be at least one for each of 3 classes"):
        stratified(torch.arange(3), 2, torch.Generator())


@pytest.mark.parametrize(
    ("given_settings", "words"),
    [
        ({"templates": 0}, "templates=0 must be at least 1"),
        ({"epochs": 1}, "must name the layers that epochs=1"),
        ({"buffer": ["fc3"]}, "must name the layers that epochs=0"),
        ({"scale": 1}, "scale=1 must be at least 2"),
        ({"neighbours": 4}, "neighbours=4 must be at least scale=8"),
        ({"batch_size": 4}, "batch_size=4 must be at least neighbours=15"),
    ],
)
def test_wrong_settings_are_refused(given_settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stage("wnll", **given_settings)


def test_what_does_not_fit_the_network_or_the_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="templates=81 are more than the 80 records"):
        run(tmp_path / "many", FIT, stage("wnll", templates=81, **SMALL))
    with pytest.raises(BadValue, match="'fc9' names no layer with weights"):
        run(tmp_path / "layer", FIT, stage("wnll", epochs=1, buffer=["fc9"], batch_size=16, **SMALL))
    with pytest.raises(BadValue, match="must be at most the 16 records that stage 2 has"):
        run(tmp_path / "few", FIT, stage("wnll", epochs=1, buffer=["fc3"], neighbours=17, scale=3, batch_size=20))
    with pytest.raises(BadValue, match="has no features to interpolate on"):
        Layer(templates=20).attach(nn.Linear(3, 2))
    sparse = stage("prune", pruner="magnitude", density=0.5)
    with pytest.raises(BadValue, match="the weight of logits is compressed"):
        run(tmp_path / "sparse", sparse, stage("wnll", **SMALL))
    with pytest.raises(BadValue, match="use the stage wnll"):
        run(tmp_path / "fit", stage("fit", objective="plain", compression={"name": "wnll", "templates": 20}))
