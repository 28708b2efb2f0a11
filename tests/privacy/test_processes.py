"""Several processes make one private step: each draws its own share of the records, one of them adds the noise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trivet.files import load_tensors

STEPS, RECORDS, EXPECTED, PROCESSES = 40, 64, 16, 2

PROCESS = f"""
import sys, torch
from pathlib import Path
from torch import distributed, nn
from trivet.data.dataset import Batch
from trivet.files import save_tensors
from trivet.objectives.objective import Losses
from trivet.privacy.dp_sgd import DpSgd

folder, rank, z = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size={PROCESSES})

class Work:
    rate = 1.0
    def perturb(self, model, batch, part=0):
        return batch.inputs
    def losses(self, model, batch, perturbed, part=0):
        return Losses(model(perturbed)[:, 0])

inputs = 3 * torch.randn({RECORDS}, 1, 2, 2, generator=torch.Generator().manual_seed(1))
everyone = Batch(inputs, torch.zeros({RECORDS}, dtype=torch.int64), torch.arange({RECORDS}))
plan = DpSgd(1.0, 1e-3, noise_multiplier=z).plan({RECORDS}, {EXPECTED}, 1, seed=0)
model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
drawn, updates = torch.zeros({STEPS}, {RECORDS}), []
for step in range({STEPS}):
    index = plan.draw(step)
    drawn[step, index] = 1
    plan.gradients(model, everyone.select(index), Work())
    updates.append(model[1].weight.grad.flatten().clone())
save_tensors(folder / f"{{rank}}.safetensors", {{"drawn": drawn, "updates": torch.stack(updates)}})
distributed.destroy_process_group()
"""


def run(folder: Path, z: float) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    arguments = [[sys.executable, "-c", PROCESS, str(folder), str(rank), str(z)] for rank in range(PROCESSES)]
    started = [subprocess.Popen(each, stderr=subprocess.PIPE, text=True) for each in arguments]
    for each in started:
        _, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors
    return [load_tensors(folder / f"{rank}.safetensors")[0] for rank in range(PROCESSES)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    first, second = run(tmp_path / "exact", 0.0)
    assert torch.equal(first["updates"], second["updates"])
    assert not first["drawn"][:, 1::2].any()  # shares do not overlap
    assert not second["drawn"][:, ::2].any()
    inputs = (3 * torch.randn(RECORDS, 1, 2, 2, generator=torch.Generator().manual_seed(1))).flatten(1)
    clipped = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1.0)
    expected = (first["drawn"] + second["drawn"]) @ clipped / EXPECTED
    torch.testing.assert_close(first["updates"], expected)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
def test_two_processes_add_the_noise_of_one(tmp_path: Path) -> None:
    first, second = run(tmp_path / "noisy", 1000.0)  # beside which the signal is nothing
    assert torch.equal(first["updates"], second["updates"])
    squares = float((first["updates"] * EXPECTED / 1000.0).square().sum())
    count = first["updates"].numel()  # chi-square with 160 degrees of freedom: 6 standard deviations, 1e-7 or less
    assert abs(squares - count) < 6 * (2 * count) ** 0.5 + 6
