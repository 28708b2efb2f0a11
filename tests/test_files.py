"""Files are whole or absent, and a folder has one writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trivet import files
from trivet.errors import TrivetError


def test_tensors_and_metadata_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last), "n": torch.tensor(7)}
    files.save_tensors(tmp_path / "t", tensors, {"step": 3, "nested": {"x": [1, None]}})
    loaded, metadata = files.load_tensors(tmp_path / "t")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert metadata == {"step": 3, "nested": {"x": [1, None]}}


def test_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    files.save_tensors(tmp_path / "t", {"whole": base, "part": base[:5]})
    assert torch.equal(files.load_tensors(tmp_path / "t")[0]["part"], base[:5])


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = tmp_path / "file"
    files.write_text(target, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "file"
    files.write_text(target, "old" * 1000)
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom trivet import files\n"
        f"os.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"files.write_text(Path({str(target)!r}), 'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert target.read_text() == "old" * 1000


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_tensor_file_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "t").write_bytes(damage)
    with pytest.raises(TrivetError, match="not a whole safetensors file"):
        files.load_tensors(tmp_path / "t")


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    files.save_tensors(tmp_path / "t", {"a": torch.randn(100)})
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-8])
    with pytest.raises(TrivetError, match="not a whole safetensors file"):
        files.load_tensors(tmp_path / "t")


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "j", {"x": float("nan")})
    assert not (tmp_path / "j").exists()


def test_damaged_or_missing_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(TrivetError, match=r"absent\.json does not exist"):
        files.read_json(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(TrivetError, match=r"torn\.json is damaged"):
        files.read_json(tmp_path / "torn.json")


def test_a_second_writer_is_refused_and_a_dead_one_forgotten(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom trivet.files import sole_writer\n"
        f"with sole_writer(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(TrivetError, match="another process"), files.sole_writer(tmp_path):
        pass
    other.kill()
    other.communicate()
    with files.sole_writer(tmp_path):
        pass


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "f") == files.sha256(b"abc") == expected
