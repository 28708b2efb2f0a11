"""SmartDeal: powers, slices, the alternation, bucket switching, and what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.compression.compression import Moment, originals, steps_on
from trivet.compression.masks import Masks
from trivet.compression.smart_deal import (
    Slicing,
    SmartDeal,
    SmartDealFactors,
    decompose,
    nearest_power,
    powers,
    storage_bits,
)
from trivet.compression.smart_deal_training import SmartDealTraining, switched
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue
from trivet.methods import build
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_power_is_nearest_in_linear_distance_and_ties_go_down() -> None:
    given = torch.tensor([0.75, 1.5, 1.51, 3.0, 0.3, 1.0, 0.0, 0.7500001])
    assert nearest_power(given).tolist() == [0.5, 1.0, 2.0, 2.0, 0.25, 1.0, 0.0, 1.0]


@settings(deadline=None, max_examples=60)
@given(st.floats(-50, 50, width=32), st.sampled_from([2, 3, 4]), st.integers(-3, 4))
def test_a_coefficient_is_the_nearest_of_its_window(value: float, bits: int, top: int) -> None:
    window = [2.0 ** (top - k) for k in range(2 ** (bits - 1) - 1)]
    grid = torch.tensor([0.0, *window, *(-w for w in window)])
    found = powers(torch.tensor([value]), 2.0**top, bits)
    assert float(found) in grid.tolist()
    assert abs(float(found) - value) == pytest.approx(float((grid - value).abs().min()), abs=1e-6)
    assert torch.equal(powers(torch.tensor([-value]), 2.0**top, bits), -found)


@pytest.mark.parametrize(
    ("shape", "rows", "parts"),
    [((8, 5, 3, 3), 15, 1), ((4, 200, 3, 3), 150, 4), ((6, 16), 6, 1), ((2, 4096), 171, 8), ((2, 1280), 143, 3)],
)
def test_slices_are_those_of_the_authors_table_and_join_to_the_weight(
    shape: tuple[int, ...], rows: int, parts: int
) -> None:
    slicing = Slicing.of(torch.Size(shape))
    assert (slicing.rows, slicing.parts) == (rows, parts)
    weight = normal(0, *shape)
    blocks = slicing.cut(weight)
    assert blocks.shape == (shape[0] * parts, rows, 3)
    assert torch.equal(slicing.join(blocks), weight)


def test_what_is_made_of_powers_already_is_found_at_once() -> None:
    a = torch.tensor([[0.5, 0.0, -2.0], [4.0, 0.25, 0.0], [0.0, -1.0, 2.0], [1.0, 1.0, 0.5]])[None]
    found = decompose(a, 0.0, 4)
    assert torch.equal(found.coefficients, a)
    torch.testing.assert_close(found.basis[0], torch.eye(3))
    torch.testing.assert_close(found.rebuilt, a)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5]))
def test_each_basis_is_the_least_squares_optimum_and_beats_the_identity(seed: int, threshold: float) -> None:
    a = normal(seed, 4, 20, 3)
    found = decompose(a, threshold, 4)
    gram = found.coefficients.mT @ (a - found.rebuilt)
    torch.testing.assert_close(gram, torch.zeros_like(gram), atol=1e-3, rtol=0)
    theirs = (a - found.coefficients).norm()
    assert float((a - found.rebuilt).norm()) <= float(theirs) + 1e-4


def test_alternating_fits_better_than_rounding_alone() -> None:
    a = normal(1, 16, 60, 3) @ normal(2, 16, 3, 3)
    rounds = [float((a - decompose(a, 0.05, 4, rounds=n).rebuilt).norm() / a.norm()) for n in (2, 30)]
    assert rounds[1] < rounds[0]


def test_blocks_of_zeros_and_of_rank_one_are_no_trouble() -> None:
    a = torch.zeros(2, 8, 3)
    a[1] = torch.arange(8.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    found = decompose(a, 0.0, 4)
    assert bool(found.rebuilt.isfinite().all())
    assert float(found.rebuilt[0].abs().max()) == 0
    assert float((found.rebuilt[1] - a[1]).norm() / a[1].norm()) < 0.3


def test_the_bits_of_a_small_example_are_counted_by_hand() -> None:
    """Five non-zeros of two magnitudes: 5 (1 + 1) + 18 + 9 * 32."""
    q = torch.zeros(1, 6, 3)
    q[0, :5, 0] = torch.tensor([1.0, -1.0, 0.5, 1.0, -0.5])
    assert storage_bits(q, torch.eye(3)[None]) == 10 + 18 + 288
    assert storage_bits(torch.zeros(1, 6, 3), torch.eye(3)[None], 8) == 18 + 72


def test_buckets_switch_as_the_authors_do() -> None:
    q = torch.tensor([0.25, -0.25, 4.0, 0.0, 0.125, 0.0, -0.125])
    direction = torch.tensor([1, 1, 1, -1, -1, 0, 1])
    found = switched(q, direction, torch.tensor(0.125), torch.tensor(4.0))
    assert found.tolist() == [0.5, -0.125, 4.0, -0.125, 0.0, 0.0, 0.0]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))


def blobs(count: int, seed: int) -> Dataset:
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[labels == 0, :, :4] += 120
    images[labels == 1, :, 4:] += 120
    return Dataset(images, labels, ("top", "bottom"), "blobs")


SPLITS = Splits(blobs(96, 0), blobs(40, 1))


def stage(compression: Any = None, **settings: Any) -> Any:
    spec = {"name": "fit", "objective": "plain", "epochs": 4, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1}}
    return build("training", spec | settings | ({"compression": compression} if compression else {}))


@pytest.mark.parametrize("name", ["smart_deal", "smart_deal_training"])
def test_a_network_ends_as_factors_reads_back_and_sees(name: str, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "recipe")
    stages = [("fit", stage()), ("fit", stage(name)), ("fit", stage(epochs=1))]
    checkpoint = run_stages(stages, net(), SPLITS, folder, seed=1, device=torch.device("cpu"))
    model: Any = checkpoint.model
    assert [spec["include"] for spec in checkpoint.structure] == [["2", "5"]]  # "0" has blocks of three rows
    for layer in (model[2], model[5]):
        coefficients, basis = originals(layer)
        magnitudes = coefficients.abs().unique()
        assert len(magnitudes) <= 8
        assert torch.equal(magnitudes, nearest_power(magnitudes))
        torch.testing.assert_close(steps_on(layer)[0].slicing.join(coefficients @ basis), layer.weight)
    again = net(3)
    load_into(again, folder.weights)
    batch = SPLITS.test.batch(torch.arange(40))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
    torch.testing.assert_close(again(batch.inputs), model(batch.inputs))  # memory may be laid out another way
    assert float((model(batch.inputs).argmax(1) == batch.labels).float().mean()) > 0.9


def test_between_decompositions_weights_train_freely_and_held_out_records_see_the_factors() -> None:
    model, method = net(), SmartDeal()
    method.attach(model)
    before = model[5].weight.clone()
    method.before(model, Moment(0, 10, 5))
    method.before(model, Moment(4, 10, 5))
    assert torch.equal(model[5].weight, before)
    with method.as_shipped(model):
        shipped = model[5].weight.clone()
        assert not torch.equal(shipped, before)
    assert torch.equal(model[5].weight, before)
    method.before(model, Moment(5, 10, 5))
    assert torch.equal(model[5].weight, shipped)


@pytest.mark.parametrize("basis_bits", [8, 32])
def test_what_a_stage_ends_on_is_one_decomposition_of_what_was_trained(basis_bits: Any) -> None:
    """Decomposing twice would find other factors: the second time, weights like these move by a tenth of their norm."""
    model, method = net(), SmartDeal(threshold=0.5, basis_bits=basis_bits)
    method.attach(model)
    trained = model[5].weight.detach().clone()
    for step in range(4):
        method.before(model, Moment(step, 4, 4))
        method.after(model, Moment(step, 4, 4))
    error = method.report(model)["decomposition_error"]["5"]
    method.end(model)
    slicing = Slicing.of(trained.shape)
    once = slicing.join(method.coding.of(trained, slicing).rebuilt)
    torch.testing.assert_close(model[5].weight.detach(), once, rtol=1e-6, atol=1e-7)
    assert error == pytest.approx(float((trained - once).norm() / trained.norm()), rel=1e-5)
    twice = slicing.join(method.coding.of(once, slicing).rebuilt)
    assert float((twice - once).norm() / once.norm()) > 0.05


@pytest.mark.parametrize("name", ["smart_deal", "smart_deal_training"])
def test_bases_of_eight_bits_stay_on_their_grid_through_later_training(name: str, tmp_path: Path) -> None:
    """One even grid for all bases of a layer, and a quarter of their bytes but for the list of its values."""
    folder = RunFolder.create(tmp_path / "run", "recipe")
    compression = {"name": name, "basis_bits": 8}
    stages = [("fit", stage()), ("fit", stage(compression, epochs=1)), ("fit", stage(epochs=1))]
    model: Any = run_stages(stages, net(), SPLITS, folder, seed=1, device=torch.device("cpu")).model
    for layer in (model[2], model[5]):
        coefficients, basis = originals(layer)
        step = basis.detach().abs().max() / 127
        numbers = basis.detach().double() / step.double()
        assert float((numbers - numbers.round()).abs().max()) < 1e-3
        torch.testing.assert_close(steps_on(layer)[0].slicing.join(coefficients @ basis), layer.weight)


def test_coefficients_that_began_at_zero_stay_there_and_others_move_by_powers() -> None:
    model, method = net(), SmartDealTraining(threshold=0.5, bar=1, dead=0.0)
    method.attach(model)
    method.begin(model)
    method.initialise(model)
    start = originals(model[5])[0].detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(30):
        method.before(model, Moment(step, 30, 10))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8) % 2).backward()
        optimizer.step()
        method.after(model, Moment(step, 30, 10))
    after = originals(model[5])[0].detach()
    assert bool((after[start == 0] == 0).all())
    assert not torch.equal(after, start)
    magnitudes = after.abs().unique()
    assert torch.equal(magnitudes, nearest_power(magnitudes))


def test_a_step_is_a_wish_if_it_is_large_beside_the_coefficient_and_bar_of_them_move_it() -> None:
    """Steps of 0.03 are 12 % of 0.25, and 3 % of 1; of a zero they are beside the least power."""
    model, method = net(), SmartDealTraining(bar=2, dead=0.1)
    method.attach(model)
    method.initialise(model)
    (q, _), (switching,) = originals(model[5]), steps_on(model[5])
    with torch.no_grad():
        switching.top.fill_(1.0)
        switching.support.fill_(True)
        switching.support[0, 5, 0] = False
        q[0, :6, 0] = torch.tensor([0.25, -0.25, 1.0, 0.0, 0.25, 0.0])
    seen = []
    for step in range(2):
        method.before(model, Moment(step, 4, 4))
        with torch.no_grad():
            q[0, :6, 0] += torch.tensor([0.03, 0.03, 0.03, -0.03, -0.03 if step else 0.03, 0.03])
        method.after(model, Moment(step, 4, 4))
        seen.append(q[0, :6, 0].tolist())
    assert seen[0] == [0.25, -0.25, 1.0, 0.0, 0.25, 0.0]
    assert seen[1] == [0.5, -0.125, 1.0, -(2.0**-6), 0.25, 0.0]


def test_what_would_not_fit_is_refused() -> None:
    model = net()
    Masks(include=("5",)).attach(model)
    with pytest.raises(BadValue, match="the weight of 5 is compressed already"):
        SmartDeal().attach(model)
    with pytest.raises(BadValue, match="basis_bits=16 must be 8 or 32"):
        SmartDeal(basis_bits=16)  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="no layer has blocks of more than three rows"):
        SmartDealFactors().layers(nn.Linear(9, 2))
