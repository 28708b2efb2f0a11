"""CIFAR-10, or a JPEG copy of it, which is another dataset and is called so."""

from __future__ import annotations

from pathlib import Path

from trivet.data.arrow import Shard, decode_splits, encoded_images
from trivet.data.dataset import Splits
from trivet.data.named import named_folder, require_whole
from trivet.data.parquet import read_shards
from trivet.methods import method

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@method(title="CIFAR-10", paper="Krizhevsky, technical report 2009", year=2009)
def cifar10(path: Path | None = None) -> Splits:
    """50,000 training and 10,000 test images, inputs [B, 3, 32, 32], 10 classes.

    Pixels that went through JPEG are not those of published results: such a copy is named "CIFAR-10 (JPEG copy)",
    and so are all figures from it.

    Args:
        path: a folder of Parquet files, as `uoft-cs/cifar10` on the hub has them; None: $TRIVET_DATA/cifar10_jpeg.
    """
    columns, train, test = read_shards(named_folder("cifar10_jpeg", path, hub="uoft-cs/cifar10"))
    lossy = any(_has_jpeg(shard, columns.image) for shard in (*train, *test))
    title = "CIFAR-10 (JPEG copy)" if lossy else "CIFAR-10"
    return require_whole(decode_splits(train, test, columns, title), (3, 32, 32), CLASSES, train=50_000, test=10_000)


def _has_jpeg(shard: Shard, column: str) -> bool:
    return any(content.startswith(b"\xff\xd8") for _, content in encoded_images(shard, column))
