"""Packed files: every bit comes back, and the bytes are those that were promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivet.compression.binary import Binary
from trivet.compression.m_bit import MBit
from trivet.compression.packing import load_packed, pack, packed_bytes, save_packed, unpack
from trivet.compression.ternary import Ternary
from trivet.errors import TrivetError
from trivet.files import save_tensors


def same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))) if a.numel() else True


def bytes_of(tensor: Tensor) -> int:
    return sum(part.nbytes for part in pack({"w": tensor})[0].values())


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool]),
    st.sampled_from([(), (0,), (1,), (7,), (3, 5), (4, 3, 2, 2)]),
    st.integers(1, 40),
    st.floats(0, 1),
)
def test_every_bit_comes_back(seed: int, dtype: torch.dtype, shape: tuple[int, ...], kinds: int, zeros: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randint(-kinds, kinds, shape, generator=generator) * 0.37).to(dtype)
    tensor = tensor * (torch.rand(shape, generator=generator) >= zeros).to(dtype)
    parts, plan = pack({"w": tensor})
    assert same(unpack(parts, plan, "here")["w"], tensor)
    assert bytes_of(tensor) <= tensor.nbytes


def test_negative_zeros_infinities_and_nans_come_back() -> None:
    tensor = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 0.0, 0.0, 0.0, 0.0] * 9)
    parts, plan = pack({"w": tensor})
    assert same(unpack(parts, plan, "here")["w"], tensor)


def test_quantised_and_pruned_weights_take_the_bits_they_should() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    count = weight.numel()
    assert bytes_of(weight) == 4 * count
    assert bytes_of(Binary().project(weight)) == count / 8 + 2 * 4
    assert bytes_of(Ternary().project(weight)) <= 2 * count / 8 + 3 * 4
    assert bytes_of(MBit(4).project(weight)) <= 4 * count / 8 + 15 * 4
    kept = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.1
    assert bytes_of(weight.where(kept, 0.0)) == 4 * int(kept.sum()) + count / 8
    assert bytes_of(Binary().project(weight.where(kept, 0.0))) <= int(kept.sum()) / 8 + count / 8 + 9
    assert bytes_of(torch.full((64, 64), 2.0)) == 4


def test_a_file_has_the_length_that_was_counted(tmp_path: Path) -> None:
    tensors = {"a": Binary().project(torch.randn(30, 40)), "b": torch.randn(7), "c": torch.tensor(3)}
    save_packed(tmp_path / "bare.safetensors", tensors, {})
    save_packed(tmp_path / "w.safetensors", tensors, {"history": [1]})
    loaded, metadata = load_packed(tmp_path / "w.safetensors")
    assert metadata == {"history": [1]}
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    plain, squeezed = packed_bytes(tensors)
    assert plain == (tmp_path / "bare.safetensors").stat().st_size
    assert squeezed < plain


def test_damage_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    parts, plan = pack({"w": Binary().project(torch.randn(30, 40))})
    with pytest.raises(TrivetError, match="here is damaged: its parts do not fit together"):
        unpack({**parts, "w:codes": parts["w:codes"][:10]}, plan, "here")
    with pytest.raises(TrivetError, match="here is damaged"):
        unpack({}, plan, "here")
    save_tensors(tmp_path / "plain.safetensors", {"w": torch.ones(3)}, {})
    with pytest.raises(TrivetError, match="is not packed; read it as weights"):
        load_packed(tmp_path / "plain.safetensors")
