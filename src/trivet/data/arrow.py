"""Tables of encoded images and labels, in the layout in which the Hugging Face hub keeps image datasets.

An image column holds structs {bytes, path} (or the bytes alone), a label column holds class numbers or names. The
types of the columns, with the names of the classes, are described by "features", JSON in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trivet.data.dataset import Splits
from trivet.data.extras import extra
from trivet.data.images import Mode, Size, decode
from trivet.data.labels import Part, labelled
from trivet.errors import BadValue, require

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, DataType, Schema, Table

Features = Mapping[str, Any]

NEEDS_PARQUET = "reading Parquet needs pyarrow and pillow"
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels")


class Columns(NamedTuple):
    """Which columns hold the image and the label, and the names of the classes if the features tell them."""

    image: str
    label: str
    classes: tuple[str, ...] | None


class Shard(NamedTuple):
    """Some records, with the place they come from for error messages."""

    source: str
    table: Table


def find_columns(
    names: Sequence[str], features: Features, where: str, image: str | None = None, label: str | None = None
) -> Columns:
    """The two columns among `names`: as given, else the only one of the right feature type, else the usual name.

    Raises:
        BadValue: no such column, or several; the message lists the columns.
    """
    features = {name: feature for name, feature in features.items() if isinstance(feature, Mapping)}  # not sequences
    image = _pick(names, features, where, "image", image, "Image", _IMAGE_NAMES)
    label = _pick(names, features, where, "label", label, "ClassLabel", _LABEL_NAMES)
    classes = features.get(label, {}).get("names")
    return Columns(image, label, tuple(map(str, classes)) if classes else None)


def _pick(
    names: Sequence[str],
    features: Features,
    where: str,
    what: str,
    given: str | None,
    feature: str,
    usual: Sequence[str],
) -> str:
    listed = ", ".join(names)
    if given is not None:
        require(given in names, f"{where} has no column {given!r}; set {what} to one of: {listed}.")
        return given
    typed = [name for name in names if features.get(name, {}).get("_type") == feature]
    found = typed or [name for name in names if name in usual]
    require(len(found) < 2, f"{where} has several {what} columns ({', '.join(found)}); set {what} to one of them.")
    require(len(found) == 1, f"{where} has no column that is known to hold {what}s; set {what} to one of: {listed}.")
    return found[0]


def features_of(schema: Schema) -> Features:
    """The features in the metadata of `schema`, empty where there are none."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def decode_splits(
    train: Sequence[Shard],
    test: Sequence[Shard],
    columns: Columns,
    title: str,
    size: Size | None = None,
    mode: Mode | None = None,
) -> Splits:
    """The records of all shards, in order, as the dataset `title`."""
    parts = [
        Part(
            decode((pair for shard in shards for pair in encoded_images(shard, columns.image)), size, mode),
            np.concatenate([_labels(shard, columns.label) for shard in shards]),
        )
        for shards in (train, test)
    ]
    return labelled(*parts, title=title, classes=columns.classes)


def encoded_images(shard: Shard, column: str) -> Iterator[tuple[str, bytes]]:
    """The encoded images of `column`, each with a name that tells where it stands."""
    values = _bytes_of(shard, column)
    for position, content in enumerate(values.to_pylist()):
        name = f"{shard.source}, record {position}"
        require(
            content is not None,
            f"{name} holds no image in {column!r}; images must be stored in the file, not as paths beside it.",
        )
        yield name, content


def _bytes_of(shard: Shard, column: str) -> ChunkedArray:
    with extra("parquet", NEEDS_PARQUET):
        import pyarrow as pa
        import pyarrow.compute as pc

    def binary(kind: DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    values = shard.table[column]
    kind = values.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and binary(kind.field("bytes").type):
        return pc.struct_field(values, "bytes")
    if not binary(kind):
        raise BadValue(f"{shard.source}: column {column!r} holds {kind}, not encoded images; set image to another one.")
    return values


def _labels(shard: Shard, column: str) -> np.ndarray[Any, Any]:
    values = shard.table[column]
    if values.null_count:
        raise BadValue(f"{shard.source}: {values.null_count} records have no {column!r}; drop them or label them.")
    labels = np.asarray(values.to_pylist())
    return labels if len(labels) else labels.astype(np.int64)
