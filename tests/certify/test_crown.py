"""What CROWN adds to IBP: slopes, tighter intervals, and the cascade that stops early."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from bound_oracles import attacked, ball, images, margins_of, mlp, rows_of
from torch import Tensor, nn

from trivet.certify.bounds.network import Network
from trivet.certify.crown import Crown, CrownIbp
from trivet.certify.ibp import Ibp
from trivet.errors import BadValue
from trivet.methods import build
from trivet.randomness import generator


@cache
def trained_by_ibp(steps: int = 150) -> tuple[nn.Sequential, Tensor]:
    """A small network and records of three classes, trained on the merged interval bounds alone."""
    draw = generator(1, "training")
    prototypes = torch.rand(3, 10, generator=draw)
    model = mlp(10, 20, 20, 3, seed=1).train()
    network = Network.of(model, (10,))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        labels = torch.randint(3, (32,), generator=draw)
        x = (prototypes[labels] + 0.1 * torch.randn(32, 10, generator=draw)).clamp(0, 1)
        margins = network.margins(ball(x, 0.1), labels, method="ibp")
        loss = nn.functional.softplus(-margins).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.arange(30) % 3
    return model.eval(), (prototypes[labels] + 0.1 * torch.randn(30, 10, generator=draw)).clamp(0, 1)


def test_each_slope_has_its_network() -> None:
    """As published: adaptive slopes are the looser ones on networks trained by IBP, and the tighter ones on others."""
    model, x = trained_by_ibp()
    adaptive, zero = (margins_of(model, x, 0.1, "crown-ibp", slope=slope).amin(1) for slope in ("adaptive", "zero"))
    assert float((zero - adaptive).mean()) > 0
    model, x = mlp(10, 30, 30, 3, seed=2), images(30, 10)
    adaptive, zero = (margins_of(model, x, 0.03, "crown-ibp", slope=slope).amin(1) for slope in ("adaptive", "zero"))
    assert float((adaptive - zero).mean()) > 0


def test_trying_both_slopes_takes_the_better_bound_of_each_margin() -> None:
    model, x = trained_by_ibp()
    margins = {slope: margins_of(model, x, 0.12, "crown-ibp", slope=slope) for slope in ("adaptive", "zero")}
    margins["ibp"] = margins_of(model, x, 0.12, "ibp")
    best = torch.stack(list(margins.values())).amax(0).amin(1)
    ibp = margins["ibp"].amin(1)
    found = CrownIbp(eps=0.12, arithmetic="real").certify(model, x).evidence["margin"]
    # Inputs that a cheaper bound proves go no further.
    torch.testing.assert_close(found[best <= 0], best[best <= 0])
    torch.testing.assert_close(found[ibp > 0], ibp[ibp > 0])
    assert torch.equal(found > 0, best > 0)
    assert 0 < int((ibp > 0).sum()) < int((best > 0).sum()) < len(x)


def test_inputs_that_are_proved_go_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained_by_ibp()
    asked: list[tuple[str, int]] = []
    right = Network.margins

    def counted(self: Network, domain: object, *args: object, **more: object) -> Tensor:
        asked.append((str(more["method"]), len(domain)))  # type: ignore[arg-type]
        return right(self, domain, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Network, "margins", counted)
    certificates = Crown(eps=0.1, batch_size=30).certify(model, x)
    open_after_ibp = int((Ibp(eps=0.1).certify(model, x).radii == 0).sum())
    assert asked[0] == ("ibp", 30)
    assert asked[1] == ("crown-ibp", open_after_ibp)
    assert all(size <= open_after_ibp for _, size in asked[1:5])
    assert 0 < open_after_ibp < 30
    assert int((certificates.radii > 0).sum()) >= 30 - open_after_ibp


def test_crown_certifies_most_of_what_withstands_attack_on_a_network_that_ibp_cannot_read() -> None:
    model, x, eps = mlp(8, 16, 16, 3, seed=12), images(60, 8, seed=2), 0.05
    standing = (attacked(model, x, eps, rows_of(model, x)) > 0).all(1)
    certified = {kind: kind(eps=eps).certify(model, x).radii > 0 for kind in (Ibp, CrownIbp, Crown)}
    assert bool((certified[Crown] <= standing).all())
    assert int(certified[Ibp].sum()) < 0.5 * int(certified[Crown].sum())
    assert int(certified[Crown].sum()) >= 0.8 * int(standing.sum())


@pytest.mark.parametrize("name", ["small_cnn", "max-pooling", "residual"])
def test_images_certified_by_crown_withstand_attack(name: str) -> None:
    if name == "small_cnn":
        model, shape = build("models", "small_cnn", input_shape=(1, 8, 8), num_classes=3), (1, 8, 8)
    elif name == "residual":
        spec = {"name": "resnet", "depth": 8}
        model, shape = build("models", spec, input_shape=(1, 4, 4), num_classes=3), (1, 4, 4)
    else:
        layers = nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
        model, shape = nn.Sequential(*layers), (1, 8, 8)
    draw = generator(3, "weights")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (1 / max(tensor[0].numel(), 4)) ** 0.5)
    model.eval()
    x, eps = images(6, *shape), 0.01
    certificates = Crown(eps=eps, batch_size=4).certify(model, x)
    rows = certificates.radii > 0
    assert bool(rows.any())
    assert bool((attacked(model, x[rows], eps, rows_of(model, x[rows])) > 0).all())
    assert bool((certificates.radii >= Ibp(eps=eps).certify(model, x).radii).all())


def test_slopes_without_a_name_are_refused() -> None:
    with pytest.raises(BadValue, match="slopes="):
        Crown(eps=0.1, slopes=())
