"""Shared set-up: one thread per worker, global state restored, and where the optional real data lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The suite draws the same examples every time, so that a change is judged by what it changed; new ones are looked for
# on purpose, with HYPOTHESIS_PROFILE=explore.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _restored_global_state() -> Iterator[None]:
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)


@pytest.fixture(autouse=True, scope="session")
def _own_budget(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests spend is spent on nobody's records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVET_BUDGET", str(tmp_path_factory.mktemp("budget")))
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MNIST and CIFAR-10: TRIVET_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("TRIVET_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set TRIVET_DATA to a folder with mnist/ and cifar10_jpeg/")
    return folder
