"""Packed files: weights stored in as few bytes as they need, and read back to the last bit.

Nothing has to be known about how a network was made small. Each tensor is written in the shortest of four codings, all
exact: as it is; its non-zeros and a bit map of where they are; the few values it has and, for each entry, the number
of its value; or both. Binary weights take one bit each, ternary two at most, pruned ones their share and one bit.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from trivet.errors import TrivetError
from trivet.files import load_tensors, save_tensors

_MOST_VALUES = 4096  # beyond 12 bits for an entry, the list of values eats the gain in tensors of usual size
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """From tensors to what is stored for them: parts by name, and how to put them together (JSON values)."""
    parts: dict[str, Tensor] = {}
    plan: dict[str, Any] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        candidates = _codings(plain)
        coding = min(candidates, key=lambda each: sum(part.nbytes for part in candidates[each].values()))
        parts |= {f"{name}:{part}": value for part, value in candidates[coding].items()}
        plan[name] = {"coding": coding, "shape": list(plain.shape), "dtype": str(plain.dtype).removeprefix("torch.")}
    return parts, plan


def unpack(parts: Mapping[str, Tensor], plan: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors that `pack` was given, bit for bit; `where` is named in errors."""
    try:
        return {name: _decoded(name, parts, how) for name, how in plan.items()}
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError, TypeError) as error:
        raise TrivetError(f"{where} is damaged: its parts do not fit together ({error}); export it again.") from None


def save_packed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors to a safetensors file of packed parts."""
    parts, plan = pack(tensors)
    save_tensors(path, parts, {**metadata, "packed": plan})


def load_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_packed` was given.

    Raises:
        TrivetError: not such a file, or a damaged one.
    """
    parts, metadata = load_tensors(path)
    if "packed" not in metadata:
        raise TrivetError(f"{path} is not packed; read it as weights.")
    plan = metadata.pop("packed")
    return unpack(parts, plan, str(path)), metadata


def packed_bytes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The length of a packed file of `tensors`, without other metadata: as it is, and once more compressed by zlib."""
    parts, plan = pack(tensors)
    parts = {name: part.clone() for name, part in parts.items()}  # the format refuses tensors that share memory
    content = safetensors.torch.save(parts, {"trivet": json.dumps({"packed": plan})})
    return len(content), len(zlib.compress(content, 9))


def _codings(tensor: Tensor) -> dict[str, dict[str, Tensor]]:
    """Every coding that applies, by name, with its parts."""
    found = {"dense": {"values": tensor}}
    if not tensor.numel() or tensor.element_size() not in _WORDS or tensor.is_complex():
        return found
    words = tensor.reshape(-1).view(_WORDS[tensor.element_size()])  # by bit patterns: -0.0 is not 0, NaN is NaN
    present = words != 0
    bitmap = torch.from_numpy(np.packbits(present.numpy()))
    kept = words[present]
    found["sparse"] = {"bitmap": bitmap, "values": kept}
    for coding, coded, beside in (("codes", words, {}), ("sparse codes", kept, {"bitmap": bitmap})):
        values, numbers = coded.unique(return_inverse=True)
        if 0 < len(values) <= _MOST_VALUES:
            found[coding] = {**beside, "values": values, "codes": _bits_of(numbers, _width(len(values)))}
    return found


def _width(values: int) -> int:
    """Bits for the number of one of so many values; none for one."""
    return ceil(log2(values))


def _bits_of(numbers: Tensor, width: int) -> Tensor:
    """Numbers [n] below 2^width, as bits packed into bytes."""
    bits = (numbers[:, None] >> torch.arange(width)) & 1
    return torch.from_numpy(np.packbits(bits.numpy().astype(np.uint8)))


def _numbers_of(codes: Tensor, width: int, count: int) -> Tensor:
    bits = _unpacked(codes, count * width).reshape(count, width)
    return (torch.from_numpy(bits.astype(np.int64)) << torch.arange(width)).sum(1)


def _unpacked(packed: Tensor, bits: int) -> Any:
    if len(packed) != ceil(bits / 8):  # numpy would fill up what is missing with zeros
        raise ValueError(f"{len(packed)} bytes for {bits} bits")
    return np.unpackbits(packed.numpy(), count=bits)


def _decoded(name: str, parts: Mapping[str, Tensor], how: Mapping[str, Any]) -> Tensor:
    coding, shape, dtype = how["coding"], tuple(how["shape"]), getattr(torch, how["dtype"])
    values = parts[f"{name}:values"]
    if coding == "dense":
        return values
    count = int(np.prod(shape, dtype=np.int64))
    present = None
    if coding.startswith("sparse"):
        present = torch.from_numpy(_unpacked(parts[f"{name}:bitmap"], count).astype(bool))
    if coding.endswith("codes"):
        coded = count if present is None else int(present.sum())
        values = values[_numbers_of(parts[f"{name}:codes"], _width(len(values)), coded)]
    if present is not None:
        words = torch.zeros(count, dtype=values.dtype)
        words[present] = values
        values = words
    return values.view(dtype).reshape(shape)
