"""Files that are either whole or absent: written beside, flushed, renamed; one writer to a folder."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trivet.errors import TrivetError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably: a crash leaves the old file or the new one, never a part."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        Path(beside).chmod(0o644)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The rename itself is only durable once the folder is flushed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN and infinity are refused, because other readers would choke on them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise TrivetError(f"{path} does not exist; is {path.parent} a run folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TrivetError(f"{path} is damaged ({error}); restore it or delete the folder and run again.") from None


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Tensors and JSON metadata as one safetensors file: one rename makes both visible at once."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"trivet": json.dumps(dict(metadata or {}), allow_nan=False)}
    write_bytes(path, save(contiguous, header))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a safetensors file and the metadata that `save_tensors` put there (empty if it has none)."""
    try:
        with safe_open(path, "pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, json.loads(header.get("trivet", "{}"))
    except FileNotFoundError:
        raise TrivetError(f"{path} does not exist.") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise TrivetError(
            f"{path} is not a whole safetensors file ({error}); take an earlier copy or train again."
        ) from None


def read_packed(path: Path, max_bytes: int) -> bytes:
    """The content of a file, unpacked if its name ends in .gz; never more than `max_bytes` of it."""
    if not path.is_file():
        raise TrivetError(f"{path} is no file.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            content = handle.read(max_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TrivetError(f"{path} is no gzip file or is damaged ({error}); pack it again.") from None
    if len(content) > max_bytes:
        raise TrivetError(f"{path} holds more than the ceiling of {max_bytes} bytes.")
    return content


def sha256(content: bytes | Path) -> str:
    """The SHA-256 of some bytes, or of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest()
    with content.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def sole_writer(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold `folder` for this process; a second one is refused, after `patience` seconds of waiting.

    The lock dies with the process, however it dies.
    """
    with (folder / ".lock").open("a") as handle:
        last = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= last:
                    raise TrivetError(
                        f"{folder} is being written by another process; wait for it or choose another --out."
                    ) from None
                time.sleep(0.02)
        yield
