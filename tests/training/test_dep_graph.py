"""The peer's cut networks are kept and built again."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from trivet.claims import Verdict
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, TrivetError
from trivet.models.resnet import resnet
from trivet.models.small_cnn import small_cnn
from trivet.training.dep_graph import DepGraph
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch_pruning", reason="the peer that this stage calls")

RECORDS = Dataset(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"), "zeros")


@pytest.mark.parametrize("make", [lambda: small_cnn((3, 8, 8), 2), lambda: resnet((3, 8, 8), 2, depth=8)])
def test_half_the_channels_go_and_the_run_is_read_back(make: type[nn.Module], tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "name: x\n")
    stages = [("dep_graph", DepGraph(0.5))]
    done = run_stages(stages, make(), Splits(RECORDS, RECORDS), folder, seed=0, device=torch.device("cpu"))
    whole = make()
    widths = [sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (done.model, whole)]
    assert widths[0] == widths[1] / 2
    load_into(whole, folder.weights)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(whole.eval()(x), done.model(x))


def test_group_norm_is_left_to_our_own_stage(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "name: x\n")
    grouped = resnet((3, 8, 8), 2, depth=8, norm="group")
    with pytest.raises(TrivetError, match="use prune and shrink"):
        run_stages([("x", DepGraph())], grouped, Splits(RECORDS, RECORDS), folder, seed=0, device=torch.device("cpu"))


def test_it_reads_weights_alone_and_refuses_to_remove_all() -> None:
    assert DepGraph().effect().privacy[0] is Verdict.KEEP
    with pytest.raises(BadValue, match="ratio=1 must lie"):
        DepGraph(1)
