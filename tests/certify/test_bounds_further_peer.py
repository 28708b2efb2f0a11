"""Further layers beside auto_LiRPA (0.7.1), where it can be imported and knows them; it is no dependency of ours."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import torch
from bound_oracles import ball, images
from test_bounds_further import settled, shape_of
from test_bounds_peer import theirs

from trivet.certify.bounds.network import Network, margin_rows


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("auto_LiRPA", reason="auto_LiRPA cannot be imported: put its source on PYTHONPATH.")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("silu", "ibp"),
        ("silu", "crown-ibp"),
        ("silu", "crown"),
        ("softplus", "ibp"),
        ("softmax", "ibp"),
        ("layer norm", "ibp"),
        ("layer norm", "crown-ibp"),
    ],
)
def test_bounds_are_as_tight_or_tighter(peer: ModuleType, name: str, method: str) -> None:
    """Other pairs it does not know, or (softmax and LayerNorm by `crown`) bounds a little tighter than we do."""
    model, x, rows = settled(name), images(3, *shape_of(name)), margin_rows(torch.arange(3), 3)
    other = theirs(peer, model, x, 0.02, rows, method, "adaptive")
    found = Network.of(model, x.shape[1:]).margins(ball(x, 0.02), rows, method=method).detach()  # type: ignore[arg-type]
    assert bool((found >= other - 1e-5 * float(other.abs().max())).all())
    if name in ("softmax", "softplus"):  # the same rule
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
