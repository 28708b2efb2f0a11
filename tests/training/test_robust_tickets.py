"""Transfer of sparse bodies: the tickets against PyTorch's own pruning, what stays bit by bit, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from trivet.claims import PrivacyClaim, Verdict
from trivet.compression.structured import Structured
from trivet.data.dataset import Splits
from trivet.errors import BadValue, TrivetError
from trivet.methods import build
from trivet.training import fit as fit_module
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages
from trivet.training.stage import Checkpoint

THREAT = build("threats", {"name": "linf", "eps": 0.05})
RULE = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}
HEAD = "7"
BODY = ("0", "3", "6")
SIZES = {"0": 54, "3": 432, "6": 256}


FROM = {"name": "adapted", "of": "digits", "classes": [0, 1, 2, 3], "size": 4, "train_limit": 64, "test_limit": 80}
TO: dict[str, Any] = {"name": "adapted", "of": "digits", "classes": [8, 9], "size": 4}
SOURCE = build("data", {key: value for key, value in FROM.items() if "limit" not in key}).limited(train=64, test=80)
TARGET = build("data", TO).limited(train=48, test=40)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(32, 8),
        nn.Linear(8, 2),
    )


def small_net(seed: int = 0) -> nn.Sequential:
    """Without BatchNorm, for private training."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def spec(**settings: Any) -> dict[str, Any]:
    usual = {"name": "fit", "objective": "plain", "epochs": 2, "batch_size": 16, "optimizer": {"name": "sgd"}}
    return usual | {"save_every": 2} | settings


def stage(name: str, **settings: Any) -> tuple[str, Any]:
    return name, build("training", {"name": name, **settings}, threat=THREAT)


def fit(**settings: Any) -> tuple[str, Any]:
    return stage(**spec(**settings))


def pretrain(*stages: dict[str, Any], data: Any = None) -> tuple[str, Any]:
    return stage("pretrain", data=data or FROM, stages=list(stages or [spec()]))


def run(folder: Path, *stages: Any, model: nn.Module | None = None, splits: Splits = TARGET) -> Checkpoint:
    made = RunFolder(folder) if folder.exists() else RunFolder.create(folder, "recipe")
    return run_stages(stages, model or net(), splits, made, seed=3, device=torch.device("cpu"))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], but: str = " ") -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a if not name.startswith(but))


def of_stage(folder: Path, name: str, model: nn.Module) -> nn.Module:
    """A stage's checkpoint, read into a fresh network."""
    load_into(model, folder / "stages" / f"{name}.safetensors")
    return model


def weight(model: nn.Module, name: str, tensor: str = "weight") -> Tensor:
    found: Tensor = getattr(model.get_submodule(name), tensor)
    return found.detach()


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight(model, name) != 0 for name in BODY}


# Pre-training


def test_pretraining_is_training_on_the_source_and_gives_the_head_back_untrained(tmp_path: Path) -> None:
    made = tensors(run(tmp_path / "run", pretrain(spec(epochs=10))).model)
    fresh = net()
    assert torch.equal(made["7.weight"], fresh.state_dict()["7.weight"])
    assert torch.equal(made["7.bias"], fresh.state_dict()["7.bias"])

    inside = tmp_path / "run" / "stages" / "00-pretrain" / "stages" / "00-fit.safetensors"
    with_four = net()
    with_four[7] = nn.Linear(8, 4)
    load_into(with_four, inside)
    assert same(made, {**with_four.state_dict(), "7.weight": made["7.weight"], "7.bias": made["7.bias"]})
    with torch.no_grad():
        batch = SOURCE.test.batch(torch.arange(80))
        assert float((with_four.eval()(batch.inputs).argmax(1) == batch.labels).float().mean()) > 0.6  # chance is 0.25


def test_a_source_of_radius_zero_is_the_natural_one_bit_by_bit(tmp_path: Path) -> None:
    at_zero = {"name": "pgd_at", "steps": 2, "threat": {"name": "linf", "eps": 0.0}}
    natural, at_radius_zero = (
        tensors(
            run(
                tmp_path / str(number),
                pretrain(spec(objective=objective)),
                stage("prune", pruner="magnitude", density=0.3, scope="global", exclude=[HEAD]),
                fit(),
            ).model
        )
        for number, objective in enumerate(("plain", at_zero))
    )
    assert same(natural, at_radius_zero)
    robust = run(tmp_path / "robust", pretrain(spec(objective={"name": "pgd_at", "steps": 2}))).model
    assert not torch.equal(natural["0.weight"], weight(robust, "0"))


def test_dropping_nothing_is_plain_transfer(tmp_path: Path) -> None:
    """Beside a stage that does nothing, so that the last ones draw alike."""
    nothing = stage("prune", pruner="magnitude", density=1.0, scope="global", exclude=[HEAD])
    ticket = run(tmp_path / "ticket", pretrain(), nothing, fit()).model
    dense = run(tmp_path / "dense", pretrain(), stage("shrink"), fit()).model
    assert same(tensors(ticket), tensors(dense))
    assert not same(tensors(ticket), tensors(of_stage(tmp_path / "dense", "00-pretrain", net())))


def test_masks_of_the_source_are_handed_on_and_hold(tmp_path: Path) -> None:
    learnt = {"name": "hydra", "scores": "random", "density": 0.25, "exclude": [HEAD]}
    run(tmp_path / "run", pretrain(spec(), spec(compression=learnt)), fit())
    dense = net()
    dense[7] = nn.Linear(8, 4)
    load_into(dense, tmp_path / "run" / "stages" / "00-pretrain" / "stages" / "00-fit.safetensors")
    ticket = of_stage(tmp_path / "run", "00-pretrain", net())
    last = of_stage(tmp_path / "run", "01-fit", net())
    for name, mask in masks(ticket).items():
        assert int(mask.sum()) == SIZES[name] - int(0.75 * SIZES[name])
        assert torch.equal(weight(ticket, name)[mask], weight(dense, name)[mask])
        assert bool((weight(last, name)[~mask] == 0).all())


def test_a_killed_pretraining_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imp = {"name": "imp", "rounds": 2, "fit": spec()}
    stages = [pretrain(spec(), imp), stage(**spec(name="linear_evaluation"))]
    whole = run(tmp_path / "whole", *stages)
    honest = fit_module._Loop._step
    for kill_at in (7, 13, 17, 28):  # in the first fit, in a round, between rounds, and in the last stage
        taken = 0

        def step(*given: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == kill_at:  # noqa: B023
                raise KeyboardInterrupt
            return honest(*given)

        folder = tmp_path / str(kill_at)
        with monkeypatch.context() as patch:
            patch.setattr(fit_module._Loop, "_step", step)
            with pytest.raises(KeyboardInterrupt):
                run(folder, *stages)
        resumed = run(folder, *stages)
        assert same(tensors(resumed.model), tensors(whole.model)), kill_at
        assert resumed.history == whole.history


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"data=digits, 9 3, 4x4 holds \d+ of the recipe's own images, so that nothing"):
        run(tmp_path / "shared", pretrain(data={**TO, "classes": [9, 3]}))
    with pytest.raises(BadValue, match=r"data=digits has inputs \(1, 8, 8\), the recipe's data \(1, 4, 4\)"):
        run(tmp_path / "shape", pretrain(data="digits"))
    with pytest.raises(BadValue, match=r"pretrain\.data\.of\.name: there is no 'nowhere' in data"):
        run(tmp_path / "none", pretrain(data={"name": "adapted", "of": "nowhere"}))
    with pytest.raises(BadValue, match=r"stages=\[\] trains nothing"):
        stage("pretrain", data="digits", stages=[])


def test_what_cannot_be_transferred_is_refused(tmp_path: Path) -> None:
    learnt = {"name": "hydra", "density": 0.25}
    with pytest.raises(TrivetError, match="the head '7' was compressed on the source"):
        run(tmp_path / "head", pretrain(spec(compression=learnt)))
    with pytest.raises(TrivetError, match="pretrain trains a dense network"):
        run(tmp_path / "sparse", stage("prune", pruner="magnitude", density=0.5), pretrain())
    with pytest.raises(BadValue, match="the last linear layer, '7', gives 2 numbers and not one for each of 3 classes"):
        run(tmp_path / "no-head", pretrain(), splits=build("data", {**TO, "classes": [7, 8, 9]}))


# Tickets


def test_omp_drops_what_pytorchs_global_pruning_drops(tmp_path: Path) -> None:
    omp = stage("prune", pruner="magnitude", density=0.1, scope="global", exclude=[HEAD])
    run(tmp_path / "run", pretrain(), omp)
    theta = of_stage(tmp_path / "run", "00-pretrain", net())
    ticket = of_stage(tmp_path / "run", "01-prune", net())
    pairs = [(theta.get_submodule(name), "weight") for name in BODY]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=sum(SIZES.values()) - 75)
    kept = masks(ticket)
    assert sum(int(each.sum()) for each in kept.values()) == 75  # 742 - floor(0.9 * 742)
    for name in BODY:
        assert torch.equal(kept[name], weight(theta, name, "weight_mask").bool())


def test_imp_leaves_a_power_of_the_share_and_rewinds_bit_by_bit(tmp_path: Path) -> None:
    imp = stage("imp", fit=spec(), rounds=3)
    made = run(tmp_path / "run", pretrain(), imp, fit())
    theta = tensors(of_stage(tmp_path / "run", "00-pretrain", net()))
    ticket = of_stage(tmp_path / "run", "01-imp", net())
    kept = masks(ticket)
    for name, tensor in tensors(ticket).items():
        layer = name.partition(".")[0]
        if "parametrizations" in name and name.endswith("original"):
            assert torch.equal(tensor, theta[f"{layer}.weight"]), name
        elif name in theta:
            assert torch.equal(tensor, theta[name]), name
    for name in BODY:
        assert torch.equal(weight(ticket, name), torch.where(kept[name], theta[f"{name}.weight"], 0.0))
    record = next(each for each in made.history if each["stage"] == "imp")
    assert abs(record["density"] - 0.8**3) <= 1 / sum(SIZES.values())
    assert record["kept"] == {name: int(mask.sum()) for name, mask in kept.items()}
    final = masks(made.model)
    assert all(bool((final[name] <= kept[name]).all()) for name in BODY)


def test_imp_prunes_by_trained_weights_not_by_those_it_rewinds_to(tmp_path: Path) -> None:
    """One round by hand: training, and PyTorch's pruning of a fifth."""
    strong = spec(optimizer={"name": "sgd", "lr": 0.5}, epochs=4)
    ticket = run(tmp_path / "run", stage("imp", fit=strong, rounds=1)).model
    trained = run(tmp_path / "trained", fit(**strong)).model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    pairs = [(trained.get_submodule(name), "weight") for name in BODY]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.2)
    kept = masks(ticket)
    untrained = run(tmp_path / "omp", stage("prune", pruner="magnitude", density=0.8, scope="global", exclude=[HEAD]))
    for name in BODY:
        assert torch.equal(kept[name], weight(trained, name, "weight_mask").bool())
    assert any(not torch.equal(kept[name], masks(untrained.model)[name]) for name in BODY)


def test_rounds_of_imp_only_drop_more_and_go_on_from_masks_that_are_there(tmp_path: Path) -> None:
    first = stage("imp", fit=spec(), rounds=2, share=0.3, exclude=["0"])
    made = run(tmp_path / "run", first, stage("imp", fit=spec(), rounds=1, share=0.5, exclude=["0"]))
    early, late = masks(of_stage(tmp_path / "run", "00-imp", net())), masks(made.model)
    weights = SIZES["3"] + SIZES["6"]
    assert bool(late["0"].all())
    assert all(bool((late[name] <= early[name]).all()) for name in BODY)
    for kept, density in ((early, 0.49), (late, 0.245)):
        assert abs(sum(int(kept[name].sum()) for name in ("3", "6")) / weights - density) <= 2 / weights
    with pytest.raises(BadValue, match=r"include=\['7'\] leaves the head alone"):
        run(tmp_path / "head", stage("imp", fit=spec(), include=["7"]))


def test_settings_of_imp_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadValue, match=r"share=1\.0 must lie strictly between 0 and 1"):
        stage("imp", fit=spec(), share=1.0)
    with pytest.raises(BadValue, match=r"fit\.compression=Hydra would be left on what is rewound"):
        stage("imp", fit=spec(compression={"name": "hydra", "density": 0.5}))


@given(strategies.integers(0, 10**6), strategies.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_structured_masks_keep_whole_units_and_a_coarser_one_is_one_of_every_finer(seed: int, density: float) -> None:
    scores = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    made = {granularity: Structured(granularity).keep(scores, density) for granularity in ("filter", "kernel", "row")}
    first = {"filter": (slice(None), 0, 0, 0), "kernel": (..., 0, 0), "row": (..., 0)}
    for coarse, finer in (("filter", ("filter", "kernel", "row")), ("kernel", ("kernel", "row")), ("row", ("row",))):
        for fine in finer:
            units = made[coarse][first[fine]]
            axes = 4 - units.ndim
            assert torch.equal(made[coarse], units.reshape(*units.shape, *[1] * axes).expand(8, 4, 3, 3)), (
                coarse,
                fine,
            )


def test_filters_go_by_their_l2_norms(tmp_path: Path) -> None:
    model = net()
    filters = weight(model, "0")
    filters.zero_()
    filters[1::2] = 0.3  # the odd filters are the larger ones by their l1 norms, the even ones by l2
    filters[::2, 0, 0, 0] = 2.0
    norms = torch.linalg.vector_norm(filters.flatten(1), dim=1)
    by = {}
    for power in (1, 2):
        pruner = {"name": "magnitude", "power": power}
        cut = stage("prune", pruner=pruner, density=0.5, pattern={"name": "structured"}, include=["0"])
        fresh = net()
        fresh.load_state_dict(model.state_dict())
        left = weight(run(tmp_path / str(power), cut, model=fresh).model, "0")
        by[power] = (left != 0).flatten(1).any(1).tolist()
    assert by[2] == (norms >= norms.sort().values[3]).tolist() == [True, False] * 3
    assert by[1] == [False, True] * 3


# Transfer


def test_linear_evaluation_trains_the_head_and_nothing_else(tmp_path: Path) -> None:
    ticket = stage("prune", pruner="magnitude", density=0.3, scope="global", exclude=[HEAD])
    linear = stage(**spec(name="linear_evaluation", epochs=4, holdout=8, keep="best"))
    made = run(tmp_path / "run", pretrain(), ticket, linear)
    before = tensors(of_stage(tmp_path / "run", "01-prune", net()))
    after = tensors(of_stage(tmp_path / "run", "02-linear_evaluation", net()))
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= before.keys()
    assert same(before, after, but=f"{HEAD}.")
    assert not torch.equal(before["7.weight"], after["7.weight"])
    assert not torch.equal(before["7.bias"], after["7.bias"])
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert made.history[-1]["stage"] == "linear_evaluation"


def test_linear_evaluation_is_logistic_regression_on_the_features(tmp_path: Path) -> None:
    """Gradient descent on all records at once, by hand."""
    linear = stage(
        **spec(
            name="linear_evaluation",
            batch_size=48,
            epochs=5,
            optimizer={"name": "sgd", "lr": 0.3, "momentum": 0.0, "weight_decay": 0.01},
            schedule={"name": "constant"},
        )
    )
    made = run(tmp_path / "run", linear).model
    body = net()[:7].eval()
    batch = TARGET.train.batch(torch.arange(48))
    with torch.no_grad():
        features = torch.cat([body(batch.inputs), torch.ones(48, 1)], 1)
    both = torch.cat([weight(net(), HEAD), weight(net(), HEAD, "bias")[:, None]], 1)
    for _ in range(5):
        wrong = (features @ both.T).softmax(1) - torch.eye(2)[batch.labels]
        both = both - 0.3 * (wrong.T @ features / 48 + 0.01 * both)
    torch.testing.assert_close(weight(made, HEAD), both[:, :8], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight(made, HEAD, "bias"), both[:, 8], rtol=1e-4, atol=1e-6)


def test_linear_evaluation_refuses_what_acts_on_the_body() -> None:
    with pytest.raises(BadValue, match=r"average=0\.9 acts on the whole network"):
        stage(**spec(name="linear_evaluation", average=0.9))
    with pytest.raises(BadValue, match=r"compression=Hydra.* acts on the whole network"):
        stage(**spec(name="linear_evaluation", compression={"name": "hydra", "density": 0.5}))


# Privacy


def privacy(checkpoint: Checkpoint) -> list[PrivacyClaim]:
    return [claim for claim in checkpoint.ledger.holding if isinstance(claim, PrivacyClaim)]


@pytest.fixture
def budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))


@pytest.mark.usefixtures("budget")
def test_a_claim_about_the_recipes_records_says_what_it_leaves_out(tmp_path: Path) -> None:
    made = run(tmp_path / "open", pretrain(), fit(rule=RULE), model=small_net())
    (claim,) = privacy(made)
    assert "each of the 48 training records" in claim.statement
    assert (
        "says nothing of the 64 records of digits, 0 1 2 3, 4x4 it was pre-trained on: which were not protected"
        in claim.conditions
    )
    assert made.history[0]["source"]["sha256"] == SOURCE.train.digest()
    alone = run(tmp_path / "alone", fit(rule=RULE), model=small_net())
    assert privacy(alone)[0].value == claim.value
    closed = run(tmp_path / "closed", pretrain(spec(rule=RULE)), fit(rule=RULE), model=small_net())
    (claim,) = privacy(closed)
    assert any("differentially private for each of the 64 training records" in each for each in claim.conditions)
    assert privacy(run(tmp_path / "end", pretrain(spec(rule=RULE)), fit(), model=small_net())) == []


@pytest.mark.usefixtures("budget")
def test_rounds_of_private_imp_are_paid_for_together(tmp_path: Path) -> None:
    imp = stage("imp", fit=spec(rule=RULE), rounds=2)
    (claim,) = privacy(run(tmp_path / "imp", imp, model=small_net()))
    twice = run(tmp_path / "twice", fit(rule=RULE), fit(rule=RULE), model=small_net())
    assert claim.value == pytest.approx(privacy(twice)[0].value)
    assert privacy(run(tmp_path / "plain", imp, fit(), model=small_net())) == []
    assert imp[1].effect().privacy[0] is Verdict.COMPOSE
    assert stage("imp", fit=spec())[1].effect().privacy[0] is Verdict.VOID
