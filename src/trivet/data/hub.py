"""Any image dataset of the Hugging Face hub, by name, through the `datasets` library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trivet.data.arrow import Shard, decode_splits, find_columns
from trivet.data.dataset import Splits
from trivet.data.extras import extra, in_one_line
from trivet.data.images import Mode, Size
from trivet.errors import TrivetError
from trivet.methods import method


@method(title="Hugging Face hub dataset", note="downloads on first use; pin `revision` to get the same records again")
def hub(
    dataset: str,
    config: str | None = None,
    revision: str | None = None,
    data_files: dict[str, str] | None = None,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str = "test",
    size: Size | None = None,
    mode: Mode | None = None,
    title: str | None = None,
) -> Splits:
    """What `datasets.load_dataset(dataset, config)` gives, decoded into memory. Code of the dataset is never run.

    Args:
        dataset: a name on the hub ("ylecun/mnist"), a local folder, or a file type with `data_files` ("parquet").
        config: which of the dataset's configurations.
        revision: the commit of the dataset.
        data_files: the file, or pattern of files, of each split.
        image: the column of encoded images; None: the one whose feature type is Image, else "image" or "img".
        label: the column of classes; None: the one whose feature type is ClassLabel, else "label" or "labels".
        train: the split to train on; slices as in "train[:1000]" are understood.
        test: the split to test on, e.g. "validation".
        size: resize images to (height, width); None refuses images of several sizes.
        mode: convert images to grey ("L") or colour ("RGB"); None refuses a mixture.
        title: what figures are labelled with; None: the name.

    Raises:
        TrivetError: no such dataset, configuration or split, no network, or a dataset that is a program.
        BadValue: a column that is missing or holds something else, an image that cannot be read, a bad label.
    """
    parts = _loaded(dataset, config, [train, test], revision=revision, data_files=data_files)
    columns = find_columns(parts[0].column_names, parts[0].features.to_dict(), dataset, image, label)
    train_shard, test_shard = (
        Shard(f"{dataset}, {split}", _table(part.select_columns([columns.image, columns.label])))
        for part, split in zip(parts, (train, test), strict=True)
    )
    return decode_splits([train_shard], [test_shard], columns, title or dataset, size, mode)


def _loaded(dataset: str, config: str | None, splits: list[str], **where: Any) -> Any:
    with extra("hub", "loading from the hub needs datasets and pillow"):
        import datasets

    # From version 4 on, programs are refused by the library itself and the switch is gone.
    refusal = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
    with _quiet_off_terminal():
        try:
            return datasets.load_dataset(dataset, config, split=splits, **where, **refusal)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise TrivetError(
                f"{dataset} cannot be loaded through the datasets library: {in_one_line(error)}"
            ) from None


@contextmanager
def _quiet_off_terminal() -> Iterator[None]:
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _table(part: Any) -> Any:
    """The records as an Arrow table with undecoded images; those kept as files in the cache are read in."""
    from datasets.table import embed_table_storage

    return embed_table_storage(part.with_format("arrow")[:])
