"""A folder of image files, one sub-folder for each class."""

from __future__ import annotations

from pathlib import Path

from trivet.data.dataset import Splits
from trivet.data.images import Mode, Size, decode
from trivet.data.labels import Part, labelled
from trivet.errors import TrivetError, require
from trivet.methods import method


@method(title="Folder of images")
def image_folder(
    path: Path,
    train: str = "train",
    test: str = "test",
    size: Size | None = None,
    mode: Mode | None = None,
    title: str | None = None,
) -> Splits:
    """`path`/train/<class>/<file> and `path`/test/<class>/<file>, decoded into memory.

    The classes are the sub-folders of the training part, in alphabetical order; the records of a class are in the
    order of their names. Hidden files (.DS_Store) are left out; every other file must be an image.

    Args:
        path: the folder.
        train: the name of the training part's folder.
        test: the name of the test part's folder.
        size: resize images to (height, width); None refuses images of several sizes.
        mode: convert images to grey ("L") or colour ("RGB"); None refuses a mixture.
        title: what figures are labelled with; None: the folder's name.

    Raises:
        TrivetError: a missing folder.
        BadValue: a file that cannot be read as an image or differs from the others, an empty part, or a class that
            only the test part has.
    """
    root = path.expanduser()
    classes = _classes(root / train, "train")
    train_part = _part(root / train, classes, size, mode)
    test_part = _part(root / test, _classes(root / test, "test"), size, mode)
    return labelled(train_part, test_part, title=title or root.resolve().name, classes=classes)


def _classes(part: Path, field: str) -> list[str]:
    if not part.is_dir():
        raise TrivetError(f"there is no folder {part}; set path and {field} to where the images are.")
    found = sorted(folder.name for folder in part.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    require(len(found) > 0, f"{part} has no sub-folders; put the images of each class into a folder of its own.")
    return found


def _part(part: Path, classes: list[str], size: Size | None, mode: Mode | None) -> Part:
    files = [
        (name, file) for name in classes for file in sorted((part / name).iterdir()) if not file.name.startswith(".")
    ]
    images = decode(((str(file), _content(file)) for _, file in files), size, mode)
    return Part(images, [name for name, _ in files])


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TrivetError(f"{file} cannot be read ({error.strerror}); a class folder holds image files only.") from None
