"""Files in, verdicts out: the competition's instances, its result format, the command line, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from trivet import cli
from trivet.certify.competition import decide, result_text
from trivet.certify.queries import Verdict
from trivet.errors import BadValue


@pytest.fixture
def instances(real_data: Path) -> Path:
    folder = real_data / "vnncomp"
    if not folder.is_dir():
        pytest.skip("no competition instances in the real data")
    return folder


@pytest.mark.parametrize(
    ("name", "prop", "answer"),
    [
        ("nano", "nano", "verified"),
        ("tiny", "tiny", "verified"),
        ("small", "small", "verified"),
        ("sat", "prop", "falsified"),
        ("unsat", "prop", "verified"),
    ],
)
def test_the_sanity_instances(instances: Path, name: str, prop: str, answer: str) -> None:
    verdict = decide(instances / f"test/test_{name}.onnx", instances / f"test/test_{prop}.vnnlib", timeout=60)
    assert verdict.answer == answer


@pytest.mark.parametrize(
    ("network_name", "prop", "answer"),
    [
        ("1_1", 1, "verified"),
        ("1_9", 2, "verified"),
        ("5_1", 3, "verified"),
        ("1_7", 3, "falsified"),
        ("1_9", 4, "falsified"),
    ],
)
def test_collision_avoidance(instances: Path, network_name: str, prop: int, answer: str) -> None:
    folder = instances / "acasxu"
    onnx = folder / f"onnx/ACASXU_run2a_{network_name}_batch_2000.onnx.gz"
    assert decide(onnx, folder / f"vnnlib/prop_{prop}.vnnlib.gz", timeout=60).answer == answer


VNNLIB = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 -1))(assert (<= X_0 1))(assert (>= Y_0 {}))"


@pytest.fixture
def double(tmp_path: Path) -> Path:
    """y = 2 x, as a file."""
    weight = numpy_helper.from_array(np.array([[2.0]], np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    path = tmp_path / "double.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )
    return path


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["trivet", "--no-keep-memory", "certify", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0), *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_the_command_line_answers_in_words_in_json_and_in_the_competition_format(
    double: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holds, fails, out = tmp_path / "a.vnnlib", tmp_path / "b.vnnlib", tmp_path / "result"
    holds.write_text(VNNLIB.format(2.5))
    fails.write_text(VNNLIB.format(2))
    packed = tmp_path / "double.onnx.gz"
    packed.write_bytes(gzip.compress(double.read_bytes()))
    status, text, _ = command(monkeypatch, capsys, "--onnx", packed, "--vnnlib", holds, "--out", out)
    assert (status, out.read_text()) == (0, "unsat\n")
    assert text.startswith("verified: ")
    status, text, _ = command(monkeypatch, capsys, "--onnx", double, "--vnnlib", fails, "--out", out, "--json")
    assert (status, out.read_text()) == (1, "sat\n((X_0 1.0)\n (Y_0 2.0))\n")
    answer = json.loads(text)
    assert (answer["answer"], answer["result"], answer["witness"]["inputs"]) == ("falsified", "sat", [1.0])


def test_what_cannot_be_asked_is_one_sentence_and_an_error_in_the_result(
    double: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, wide, bad, out = (tmp_path / name for name in ("a.vnnlib", "w.vnnlib", "b.vnnlib", "result"))
    good.write_text(VNNLIB.format(1))
    wide.write_text(VNNLIB.format(1) + "(declare-const X_1 Real)(assert (>= X_1 -1))(assert (<= X_1 1))")
    bad.write_text("(assert")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    for words, sentence in [
        (("--onnx", double, "--vnnlib", wide), "2 inputs and 1 outputs, and the network has 1 and 1"),
        (("--onnx", double, "--vnnlib", bad), "b.vnnlib, line 1: the parenthesis opened here"),
        (("--onnx", broken, "--vnnlib", good), "is not an ONNX model or is damaged"),
        (("--onnx", tmp_path / "absent.onnx", "--vnnlib", good), "absent.onnx is no file"),
        (("--onnx", double, "--vnnlib", tmp_path / "absent"), "absent is no file"),
        (("--onnx", double, "--vnnlib", good, "--timeout", "nan"), "timeout=nan must be"),
        (("--onnx", double, "--vnnlib", good, "--arithmetic", "exact"), "arithmetic='exact' must be"),
        (("--onnx", good, "--vnnlib", good), "is no .onnx or .onnx.gz file"),
    ]:
        out.unlink(missing_ok=True)
        status, _, error = command(monkeypatch, capsys, *words, "--out", out)
        assert (status, out.read_text()) == (2, "error\n")
        assert sentence in error
        assert error.count("\n") == 1
    for words, sentence in [
        (("--onnx", double), "go together"),
        (("--onnx", double, "--vnnlib", good, "--sigma", "1"), "leave out --sigma"),
        (("run", "--timeout", "3"), "--timeout goes with --onnx"),
        ((), "name a run folder"),
    ]:
        status, _, error = command(monkeypatch, capsys, *words)
        assert status == 2
        assert sentence in error


def test_results_name_each_verdict() -> None:
    def text(answer: str, **more: object) -> str:
        return result_text(Verdict(answer, "", "real", 0, 0.0, **more))

    assert [text("verified"), text("unknown"), text("unknown", timed_out=True), text("error")] == [
        "unsat\n",
        "unknown\n",
        "timeout\n",
        "error\n",
    ]
    with pytest.raises(BadValue, match="a witness goes with falsified"):
        text("falsified")
