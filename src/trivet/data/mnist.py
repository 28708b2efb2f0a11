"""MNIST."""

from __future__ import annotations

from pathlib import Path

from trivet.data.dataset import Splits
from trivet.data.named import named_folder, require_whole
from trivet.data.parquet import parquet
from trivet.methods import method


@method(title="MNIST", paper="LeCun et al., Proceedings of the IEEE 1998", year=1998)
def mnist(path: Path | None = None) -> Splits:
    """60,000 training and 10,000 test digits, inputs [B, 1, 28, 28], 10 classes.

    Args:
        path: a folder of Parquet files, as `ylecun/mnist` on the hub has them; None: $TRIVET_DATA/mnist.
    """
    splits = parquet(named_folder("mnist", path, hub="ylecun/mnist"), title="MNIST")
    return require_whole(splits, (1, 28, 28), [str(digit) for digit in range(10)], train=60_000, test=10_000)
