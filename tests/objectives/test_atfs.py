"""ATFS: its graph by a double loop and by the Laplacian, its limits, its invariances, and what it does to features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.data.dataset import Batch, Dataset
from trivet.errors import BadValue, TrivetError
from trivet.models.separability import separability
from trivet.objectives.atfs import Atfs, edge_losses
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.privacy.dp_sgd import DpSgd
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.training.fit import Fit

THREAT = Linf(0.1)
WARM = Progress(step=3, steps=10, epoch=5.0, seed=7)


def nodes(seed: int, labels: tuple[int, ...], width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, moved = torch.randn(2, len(labels), width, generator=generator, dtype=torch.float64) + 0.3
    return clean, moved, torch.tensor(labels)


def graph(clean: Tensor, moved: Tensor, labels: Tensor) -> tuple[Tensor, list[int]]:
    u = [each / each.norm() for each in (*clean.detach(), *moved.detach())]
    return torch.stack(u), [int(label) for label in (*labels, *labels)]


def by_hand(clean: Tensor, moved: Tensor, labels: Tensor, margin: float) -> tuple[float, float]:
    """The page's formula, edge by edge."""
    u, y = graph(clean, moved, labels)
    pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if i != j]
    alike = [1 - float(u[i] @ u[j]) for i, j in pairs if y[i] == y[j]]
    apart = [max(0.0, float(u[i] @ u[j]) - margin) for i, j in pairs if y[i] != y[j]]
    return sum(alike) / len(alike), sum(apart) / len(apart) if apart else 0.0


@given(
    seed=st.integers(0, 10_000),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=7).map(tuple),
    margin=st.sampled_from([-1.0, 0.0, 0.4]),
)
def test_the_matrix_form_is_the_sum_over_edges(seed: int, labels: tuple[int, ...], margin: float) -> None:
    """A class may have one record, whose only edge is to its own copy; a batch may be of one class."""
    found = edge_losses(*nodes(seed, labels), margin)
    assert [float(each.mean()) for each in found] == pytest.approx(by_hand(*nodes(seed, labels), margin), abs=1e-12)


def test_a_record_is_given_the_edges_of_its_own_two_nodes() -> None:
    clean, moved, labels = nodes(0, (0, 0, 1, 2))
    u, y = graph(clean, moved, labels)
    alike = torch.tensor([[i != j and a == b for j, b in enumerate(y)] for i, a in enumerate(y)])
    rows = (torch.where(alike, 1 - u @ u.T, 0.0)).sum(1) / alike.sum()
    torch.testing.assert_close(edge_losses(clean, moved, labels)[0], 4 * (rows[:4] + rows[4:]))


def test_intra_is_graph_smoothness() -> None:
    """sum_{E+} ||u_i - u_j||^2 = 2 tr(U^T Lap U) = 2 sum_{E+} (1 - S_ij) over ordered pairs."""
    clean, moved, labels = nodes(1, (0, 1, 0, 1, 1))
    u, y = graph(clean, moved, labels)
    adjacency = torch.tensor([[float(i != j and a == b) for j, b in enumerate(y)] for i, a in enumerate(y)]).double()
    laplacian = adjacency.sum(1).diag() - adjacency
    intra = edge_losses(clean, moved, labels)[0].mean()
    torch.testing.assert_close(intra, (u.T @ laplacian @ u).trace() / adjacency.sum())
    distances = (u[:, None] - u[None]).square().sum(2)
    torch.testing.assert_close((adjacency * distances).sum(), 2 * adjacency.sum() * intra)


def test_both_vanish_where_classes_are_single_orthogonal_directions() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    clean = torch.eye(4)[labels] * torch.tensor([1.0, 2.0, 3.0, 0.5, 7.0])[:, None]
    intra, inter = edge_losses(clean, 5 * clean, labels)
    torch.testing.assert_close(intra, torch.zeros(5))
    torch.testing.assert_close(inter, torch.zeros(5))
    assert float(edge_losses(clean, clean, labels, margin=-0.5)[1].mean()) == pytest.approx(0.5)


@given(seed=st.integers(0, 10_000))
def test_rotations_and_lengths_of_features_change_nothing(seed: int) -> None:
    clean, moved, labels = nodes(seed, (0, 1, 1, 2))
    draw = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64))
    lengths = 0.01 + 10 * torch.rand(2, 4, 1, generator=draw, dtype=torch.float64)
    turned = edge_losses(lengths[0] * clean @ rotation, lengths[1] * moved @ rotation, labels)
    for ours, expected in zip(turned, edge_losses(clean, moved, labels), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_gradient_is_that_of_differences() -> None:
    clean, moved, labels = (each.requires_grad_(each.is_floating_point()) for each in nodes(2, (0, 1, 1)))

    def loss(clean: Tensor, moved: Tensor) -> Tensor:
        intra, inter = edge_losses(clean, moved, labels)
        return intra + 2 * inter

    assert torch.autograd.gradcheck(loss, (clean, moved))


def test_without_weights_it_is_pgd_training_to_the_bit(convnet, batch, progress) -> None:
    start = {name: value.clone() for name, value in convnet.state_dict().items()}
    found = []
    for objective in (Atfs(THREAT, intra=0.0), PgdAt(THREAT)):
        convnet.load_state_dict(start)
        losses = objective(convnet, batch, progress).per_example
        gradient = torch.autograd.grad(losses.mean(), list(convnet.parameters()))
        found.append([losses, *gradient, *(value.clone() for value in convnet.buffers())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_the_losses_add_up(mlp, batch) -> None:
    """Against features taken from the layers by hand."""
    objective = Atfs(THREAT, intra=0.7, inter=0.3, margin=0.1)
    perturbed = objective.perturb(mlp, batch, WARM)
    losses = objective.losses(mlp, batch, perturbed, WARM)
    intra, inter = by_hand(mlp[:3](batch.inputs), mlp[:3](perturbed), batch.labels, 0.1)
    with torch.no_grad():
        expected = float(cross_entropy(mlp(perturbed), batch.labels).mean()) + 0.7 * intra + 0.3 * inter
    assert float(losses.per_example.detach().mean()) == pytest.approx(expected, abs=1e-6)
    assert float(losses.log["intra"].mean()) == pytest.approx(intra, abs=1e-6)


def test_at_radius_zero_a_record_and_its_copy_are_one_point(mlp, batch, progress) -> None:
    """Of records all of different classes, E+ holds only the edges to their own copies: cosine 1, loss 0."""
    lonely = Batch(batch.inputs[:4], torch.arange(4), batch.index[:4])
    losses = Atfs(Linf(0.0), inter=0.0)(mlp, lonely, progress)
    torch.testing.assert_close(losses.log["intra"], torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.per_example, cross_entropy(mlp(lonely.inputs), lonely.labels))


def test_gradients_flow_through_both_copies(mlp, batch) -> None:
    objective = Atfs(THREAT, intra=1.0, inter=0.0)
    perturbed = objective.perturb(mlp, batch, WARM)
    found = objective.losses(mlp, batch, perturbed, WARM).per_example - cross_entropy(mlp(perturbed), batch.labels)
    clean, moved = mlp[:3](batch.inputs), mlp[:3](perturbed)
    expected = edge_losses(clean, moved, batch.labels)[0]
    detached = edge_losses(clean.detach(), moved, batch.labels)[0]
    ours, both, one = (
        torch.autograd.grad(each.mean(), mlp[1].weight, retain_graph=True)[0] for each in (found, expected, detached)
    )
    torch.testing.assert_close(ours, both)
    assert not torch.allclose(ours, one)


def test_cosines_keep_single_precision_where_the_network_runs_in_bfloat16(mlp, batch) -> None:
    objective = Atfs(THREAT)
    perturbed = objective.perturb(mlp, batch, WARM)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.losses(mlp, batch, perturbed, WARM).log
        clean, moved = mlp[:3](batch.inputs), mlp[:3](perturbed)
    assert clean.dtype == torch.bfloat16
    intra, inter = edge_losses(clean.detach().float(), moved.detach().float(), batch.labels)
    assert torch.equal(found["intra"], intra)
    assert torch.equal(found["inter"], inter)


def test_the_weights_are_tied_unless_set_and_the_inter_term_warms_up() -> None:
    assert Atfs(THREAT, intra=0.8).weights(7.0) == (0.8, 0.8)
    assert Atfs(THREAT, intra=0.8, inter=0.2).weights(1.0) == pytest.approx((0.8, 0.04))
    assert Atfs(THREAT, intra=0.8).weights(0.0) == (0.8, 0.0)
    assert Atfs(THREAT, intra=0.8, warmup_epochs=0.0).weights(0.0) == (0.8, 0.8)


def test_the_features_of_another_layer_can_be_named(mlp, batch) -> None:
    at, plain = Atfs(THREAT, at="1"), Atfs(THREAT)
    perturbed = plain.perturb(mlp, batch, WARM)
    intra, _ = by_hand(mlp[:2](batch.inputs), mlp[:2](perturbed), batch.labels, 0.0)
    assert float(at.losses(mlp, batch, perturbed, WARM).log["intra"].mean()) == pytest.approx(intra, abs=1e-6)
    assert float(plain.losses(mlp, batch, perturbed, WARM).log["intra"].mean()) != pytest.approx(intra, abs=1e-3)


def test_features_that_have_vanished_stop_the_training(mlp, batch) -> None:
    mlp[1].weight.data.zero_()
    mlp[1].bias.data.zero_()
    with pytest.raises(TrivetError, match="features have vanished at step 3"):
        Atfs(THREAT)(mlp, batch, WARM)


def test_records_are_coupled_and_private_rules_refuse_it(mlp, batch) -> None:
    objective = Atfs(THREAT)
    perturbed = objective.perturb(mlp, batch, WARM)
    before = objective.losses(mlp, batch, perturbed, WARM).per_example
    other = replace(batch, labels=torch.cat([batch.labels[:-1], (batch.labels[-1:] + 1) % 4]))
    after = objective.losses(mlp, other, perturbed, WARM).per_example
    assert not torch.allclose(before[:-1], after[:-1])
    with pytest.raises(BadValue, match="Atfs couples the records of a batch"):
        Fit(objective, rule=DpSgd(delta=1e-5, epsilon=8.0, max_grad_norm=1.0))


def test_training_sets_the_classes_apart(mlp, batch) -> None:
    """From the same weights, by the same steps: cosines between classes end lower than PGD training leaves them."""
    start, found = {name: value.clone() for name, value in mlp.state_dict().items()}, {}
    for objective in (PgdAt(THREAT, steps=3), Atfs(THREAT, steps=3, intra=1.0, warmup_epochs=0.0)):
        mlp.load_state_dict(start)
        optimizer = torch.optim.Adam(mlp.parameters(), 0.01)
        for step in range(30):
            optimizer.zero_grad()
            objective(mlp, batch, replace(WARM, step=step, steps=30)).per_example.mean().backward()
            optimizer.step()
        found[type(objective)] = separability(mlp[:3](batch.inputs), batch.labels)
    assert found[Atfs].inter < found[PgdAt].inter - 0.05
    assert found[Atfs].intra > found[PgdAt].intra + 0.05
    assert found[Atfs].fisher > found[PgdAt].fisher


def test_held_out_records_are_judged_by_their_separability(mlp, batch) -> None:
    held = Dataset(batch.inputs, batch.labels, tuple("abcd"), "held", scale=1.0)
    found = Atfs(THREAT).judge(mlp.eval(), held, WARM)
    clean = separability(mlp[:3](batch.inputs), batch.labels)
    assert found["held_clean_intra"] == pytest.approx(clean.intra)
    assert found["held_clean_fisher"] == pytest.approx(clean.fisher)
    assert found["held_attacked_intra"] != pytest.approx(clean.intra, abs=1e-4)
    still = Atfs(Linf(0.0)).judge(mlp, held, WARM)
    assert still["held_attacked_inter"] == pytest.approx(clean.inter)
    # Two records in each class: half of the cross pairs are those of a record with itself.
    assert still["held_cross_intra"] == pytest.approx((1 + clean.intra) / 2)


@pytest.mark.parametrize(
    "wrong", [{"intra": -1.0}, {"inter": -0.1}, {"margin": 1.0}, {"warmup_epochs": -1.0}, {"steps": 0}]
)
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=f"{next(iter(wrong))}="):
        Atfs(THREAT, **wrong)


def test_a_network_without_a_linear_layer_needs_the_name_of_one(batch, progress) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 4), nn.Flatten())
    with pytest.raises(BadValue, match="no linear layer"):
        Atfs(THREAT)(net, batch, progress)
