"""The peer's levels against the formula, their bits in a packed file, and what the stage leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from trivet.claims import Verdict
from trivet.compression.packing import pack
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, TrivetError
from trivet.methods import build
from trivet.models.foreign.quiet import quiet
from trivet.models.small_cnn import small_cnn
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages
from trivet.training.round_to_nearest import RoundToNearest
from trivet.training.stage import Checkpoint

with quiet():
    pytest.importorskip("torchao", reason="the peer that this stage calls")

RECORDS = Dataset(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"), "zeros")


def net(seed: int = 0) -> nn.Module:
    return small_cnn((1, 8, 8), 2, generator=torch.Generator().manual_seed(seed))


def done(folder: Path, *stages: tuple[str, object]) -> Checkpoint:
    where = RunFolder.create(folder / "run", "name: x\n")
    return run_stages(list(stages), net(), Splits(RECORDS, RECORDS), where, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_the_nearest_levels_by_hand(bits: int, tmp_path: Path) -> None:
    rounded = done(tmp_path, ("r", RoundToNearest(bits)))
    for name, weight in net().state_dict().items():
        found = rounded.model.state_dict()[name]
        if not name.endswith("weight"):
            assert torch.equal(found, weight)
            continue
        step = weight.double().abs().max() / (2 ** (bits - 1) - 0.5)
        levels = step * torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).double()
        nearest = levels[(weight.double().unsqueeze(-1) - levels).abs().argmin(-1)]
        # An entry half way between two levels may go either way; none is closer than 1e-6 of a step but the largest.
        off = ((found.double() - nearest).abs() > 1e-5 * step) & (weight.abs() < weight.abs().max())
        assert not bool(off.any())
        assert float((found - weight).abs().max()) <= 0.50001 * float(step)
        assert len(found.unique()) <= 2**bits
    record = rounded.history[0]
    weight, found = net().state_dict()["conv2.weight"], rounded.model.state_dict()["conv2.weight"]
    assert record["relative_error"]["conv2"] == pytest.approx(float((found - weight).norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_file_stores_so_many_bits_of_each(bits: int, tmp_path: Path) -> None:
    weight = done(tmp_path, ("r", RoundToNearest(bits))).model.state_dict()["conv2.weight"]
    parts, _ = pack({"w": weight})
    assert parts["w:codes"].nbytes == weight.numel() * bits // 8
    assert sum(each.nbytes for each in parts.values()) <= weight.numel() * bits // 8 + 4 * 2**bits


def test_zeros_stay_zeros_and_the_run_is_read_back(tmp_path: Path) -> None:
    prune = build("training", {"name": "prune", "pruner": "magnitude", "density": 0.3, "exclude": ["logits"]})
    rounded = done(tmp_path, ("prune", prune), ("r", RoundToNearest(4, exclude=("logits",))))
    state = rounded.model.state_dict()
    assert float((state["conv2.weight"] == 0).double().mean()) >= 0.5
    assert torch.equal(state["logits.weight"], net().state_dict()["logits.weight"])
    again = net(1)
    load_into(again, tmp_path / "run" / "weights.safetensors")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.eval()(x), rounded.model(x))


def test_factors_are_refused_by_name(tmp_path: Path) -> None:
    factors = {"name": "tensorization", "keep": 1.0, "include": ["conv2"]}
    fit = build(
        "training",
        {"name": "fit", "objective": "plain", "epochs": 1, "batch_size": 8, "compression": factors},
    )
    with pytest.raises(TrivetError, match="cannot round conv2, which is stored as factors; exclude it"):
        done(tmp_path, ("fit", fit), ("r", RoundToNearest()))


def test_it_reads_weights_alone_and_refuses_other_bits() -> None:
    assert RoundToNearest().effect().privacy[0] is Verdict.KEEP
    assert RoundToNearest().effect().accuracy[0] is Verdict.VOID
    for bits in (1, 9):
        with pytest.raises(BadValue, match=f"bits={bits} must be from 2 to 8"):
            RoundToNearest(bits)
