"""Free adversarial training: the authors' loop, the carried perturbation, and exact resumption."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from trivet.data.dataset import Batch
from trivet.objectives.awp import Awp
from trivet.objectives.free_at import FreeAt
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.threats.linf import Linf

EPS = 0.1


def batches(count: int, sizes: tuple[int, ...] = (8,)) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    drawn = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        inputs = torch.rand(size, 2, 4, 4, generator=generator)
        drawn.append(Batch(inputs, torch.arange(size) % 4, torch.arange(size)))
    return drawn


def train(model, objective, work, first=0):
    """The loop of the training stage: `replays` optimizer steps on each batch."""
    optimizer, step = torch.optim.SGD(model.parameters(), 0.1), first * objective.replays
    for batch in work:
        for _ in range(objective.replays):
            optimizer.zero_grad()
            progress = Progress(step, 1000, 0.0, seed=3)
            objective(model, batch, progress).per_example.mean().backward()
            optimizer.step()
            step += 1
    return model


def authors_loop(model, work, replays):
    """delta is one leaf, clipped to the ball and the box after every backward pass, sliced for small batches."""
    delta = torch.zeros(max(len(batch) for batch in work), 2, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in work:
        x, size = batch.inputs, len(batch)
        for _ in range(replays):
            part = torch.max(torch.min(delta[:size], 1 - x), -x).requires_grad_()
            optimizer.zero_grad()
            F.cross_entropy(model(x + part), batch.labels).backward()
            moved = (part.detach() + EPS * part.grad.sign()).clamp(-EPS, EPS)
            delta[:size] = torch.max(torch.min(moved, 1 - x), -x)
            optimizer.step()
    return model, delta


def test_it_is_the_authors_loop_also_over_batches_of_changing_size(mlp) -> None:
    work, objective = batches(6, (8, 5, 8)), FreeAt(Linf(EPS), replays=3)
    expected, delta = authors_loop(copy.deepcopy(mlp), work, 3)
    train(mlp, objective, work)
    assert torch.allclose(objective.state()["delta"], delta, atol=1e-6)
    for ours, theirs in zip(mlp.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_batch_larger_than_any_before_starts_its_new_rows_at_zero(mlp) -> None:
    small, large = batches(1, (3,))[0], batches(1, (8,))[0]
    objective = FreeAt(Linf(EPS), replays=2)
    train(mlp, objective, [small])
    perturbed = objective.perturb(mlp, large, Progress(0, 1, 0.0, 0))
    assert torch.equal(perturbed[3:], large.inputs[3:])
    assert not torch.equal(perturbed[:3], large.inputs[:3])


def test_with_one_replay_at_radius_zero_it_is_plain_training(mlp) -> None:
    plain = train(copy.deepcopy(mlp), Plain(), batches(3))
    free = train(mlp, FreeAt(Linf(0.0), replays=1), batches(3))
    for ours, theirs in zip(free.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_resumed_run_is_the_same_run_and_without_the_state_it_is_not(mlp) -> None:
    work = batches(4)
    whole = train(copy.deepcopy(mlp), FreeAt(Linf(EPS), replays=3), work)

    objective = FreeAt(Linf(EPS), replays=3)
    half = train(copy.deepcopy(mlp), objective, work[:2])
    saved = {name: tensor.clone() for name, tensor in objective.state().items()}
    resumed, forgetful = FreeAt(Linf(EPS), replays=3), FreeAt(Linf(EPS), replays=3)
    resumed.load_state(saved)
    with_state = train(copy.deepcopy(half), resumed, work[2:], first=2)
    without = train(copy.deepcopy(half), forgetful, work[2:], first=2)
    assert all(torch.equal(a, b) for a, b in zip(with_state.parameters(), whole.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(without.parameters(), whole.parameters(), strict=True))


def test_saved_state_does_not_change_under_further_training(mlp) -> None:
    objective = FreeAt(Linf(EPS), replays=2)
    train(mlp, objective, batches(1))
    state = objective.state()
    before = state["delta"].clone()
    train(mlp, objective, batches(3))
    assert torch.equal(state["delta"], before)
    assert not torch.equal(objective.state()["delta"], before)


def test_only_a_backward_pass_moves_the_perturbation(mlp, batch, progress) -> None:
    objective = FreeAt(Linf(EPS))
    per_example = objective(mlp, batch, progress).per_example
    torch.autograd.grad(per_example.mean(), list(mlp.parameters()))
    assert objective.state() == {}


def test_the_scale_of_the_loss_does_not_matter_to_the_ascent(mlp, batch, progress) -> None:
    moved = []
    for scale in (1.0, 1000.0):
        objective = FreeAt(Linf(EPS))
        (scale * objective(mlp, batch, progress).per_example.sum()).backward()
        moved.append(objective.state()["delta"])
    assert torch.equal(*moved)
    assert (moved[0].abs() > 0.9 * EPS).any()


def test_under_weight_perturbation_each_step_moves_it_once_and_its_state_is_carried(mlp, batch, progress) -> None:
    inner = FreeAt(Linf(EPS), replays=4)
    objective = Awp(inner)
    objective(mlp, batch, progress).per_example.mean().backward()
    assert objective.replays == 4
    assert set(objective.state()) == {"delta"}
    other = Awp(FreeAt(Linf(EPS), replays=4))
    other.load_state(objective.state())
    assert torch.equal(other.perturb(mlp, batch, progress), objective.perturb(mlp, batch, progress))
