"""VNN-LIB files: what they say against evaluating their formulas directly, and what is refused, with its line."""

from __future__ import annotations

import gzip
import itertools
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivet.certify import vnnlib
from trivet.certify.vnnlib import Property, parse_vnnlib, read_vnnlib
from trivet.errors import TrivetError

DECLARED = """; a comment with (parentheses
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = "(assert (>= X_0 -1))(assert (<= X_0 0.1))(assert (<= X_1 2e-1)) (assert (>= X_1 -0.1))\n"


def found(prop: Property, x: tuple[Fraction, ...], y: tuple[Fraction, ...]) -> bool:
    return any(case.met_by(x, y) for case in prop.cases)


def test_a_small_file_in_full() -> None:
    prop = parse_vnnlib(DECLARED + BOX + "(assert (or (and (<= Y_0 Y_1)) (and (>= (+ Y_0 (* 2 Y_1)) 3) (<= Y_1 0))))")
    (case,) = prop.cases
    assert (prop.inputs, prop.outputs) == (2, 2)
    assert case.lower == (Fraction(-1), Fraction(-1, 10))
    assert case.upper == (Fraction(1, 10), Fraction(1, 5))
    first, second = case.conjunctions
    assert [(half.coefficients, half.constant) for half in first] == [((1, -1), 0)]
    assert [(half.coefficients, half.constant) for half in second] == [((-1, -2), 3), ((0, 1), 0)]


def test_boxes_in_float_contain_the_decimal_ones() -> None:
    """0.1 lies below its nearest float, 0.3 above: rounded to nearest, one of the ends would be cut off."""
    for number in ("0.1", "0.3", "-0.1", "-0.3", "1e-400", "0.29999999932944775", "0.5"):
        text = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= Y_0 0))"
        prop = parse_vnnlib(f"{text}(assert (>= X_0 {number}))(assert (<= X_0 {number}))")
        lower, upper = (float(end) for end in prop.cases[0].box())
        assert Fraction(lower) <= Fraction(number) <= Fraction(upper)
        assert (lower == upper) == (number == "0.5" or Fraction(lower) == Fraction(number))


def test_alternatives_over_boxes_are_kept_apart_and_empty_ones_left_out() -> None:
    either = "(assert (or (and (<= X_0 -0.5) (<= Y_0 0)) (and (>= X_0 0) (<= Y_0 0)) (and (>= X_0 5) (<= Y_0 0))))"
    prop = parse_vnnlib(DECLARED + BOX + either + "(assert (or (<= Y_1 1) (<= Y_1 Y_0)))")
    assert [(case.lower[0], case.upper[0]) for case in prop.cases] == [(-1, Fraction(-1, 2)), (0, Fraction(1, 10))]
    assert [len(case.conjunctions) for case in prop.cases] == [2, 2]


def test_assertions_that_contradict_each_other_leave_no_case() -> None:
    assert parse_vnnlib(DECLARED + BOX + "(assert (<= 1 0))").cases == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(assert (< Y_0 1))", "line 7: (< …) is none of"),
        ("(assert (= Y_0 1))", "line 7: (= …) is none of"),
        ("(assert (not (<= Y_0 1)))", "line 7: (not …) is none of"),
        ("\n\n(assert (<= (* Y_0 Y_1) 1))", "line 9: a product of variables is not linear"),
        ("(assert (<= (/ Y_0 2) 1))", "line 7: (/ …) is no number"),
        ("(assert (<= Y_2 1))", "line 7: Y_2 is used before it is declared"),
        ("(assert (<= Z_0 1))", "line 7: Z_0 is neither a decimal number nor a variable"),
        ("(assert (<= Y_0 nan))", "nan is neither"),
        ("(assert (<= Y_0 inf))", "inf is neither"),
        ("(assert (<= Y_0 1/3))", "1/3 is neither"),
        ("(assert (<= Y_0 1_0))", "1_0 is neither"),
        ("(assert (<= Y_0 1e9999))", "1e9999 is neither"),
        ("(assert (<= Y_0))", "<= compares two terms, and here are 1"),
        ("(assert (<= Y_0 1 2))", "here are 3"),
        ("(assert (and))", "(and …) is none of"),
        ("(assert)", "assert takes one formula"),
        ("(assert Y_0)", "Y_0 is none of"),
        ("(assert ())", "(() …) is none of"),
        ("(assert ((<= Y_0 1)))", "is none of"),
        ("(assert (<= (+) 1))", "(+ …) is no number"),
        ("(assert (<= (+ X_0 X_1) 1))", "line 7: a constraint on several inputs at once is not supported"),
        ("(assert (<= X_0 Y_0))", "a constraint on inputs and outputs together is not supported"),
        ("(declare-const X_0 Real)", "X_0 is declared twice"),
        ("(declare-const X_3 Real)", "the input X_2 is never declared"),
        ("(declare-const Y_02 Real)", "a declaration reads"),
        ("(declare-const X_2 Int)", "a declaration reads"),
        ("(declare-fun X_2 () Real)", "(declare-fun …) is neither declare-const nor assert"),
        ("(check-sat)", "(check-sat …) is neither"),
        ("word", "word is neither declare-const nor assert"),
        ('(assert (<= "Y_0" 1))', "'\"' is no part of VNN-LIB"),
        ("(assert (<= Y_0 1)", "line 7: the parenthesis opened here is never closed"),
        ("(assert (<= Y_0 1)))", "a parenthesis is closed that was not opened"),
        ("(assert " + "(and " * 100_000, "more than 100 parentheses are open"),
        ("(assert (or (<= Y_0 0) (<= Y_1 0)))" * 40, "more than 10000 cases"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(TrivetError) as caught:
        parse_vnnlib(DECLARED + BOX + text)
    assert words in str(caught.value)


@pytest.mark.parametrize(("dropped", "word"), [("(>= X_0 -1)", "lower"), ("(<= X_0 0.1)", "upper")])
def test_inputs_without_bounds_are_refused(dropped: str, word: str) -> None:
    with pytest.raises(TrivetError, match=f"X_0 has no {word} bound in some case"):
        parse_vnnlib(DECLARED + BOX.replace(f"(assert {dropped})", ""))


def test_files_may_be_packed_and_damage_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DECLARED + BOX + "(assert (<= Y_0 0))"
    plain, packed = tmp_path / "a.vnnlib", tmp_path / "a.vnnlib.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_vnnlib(plain) == read_vnnlib(packed) == parse_vnnlib(text)
    packed.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(TrivetError, match="is no gzip file or is damaged"):
        read_vnnlib(packed)
    packed.write_bytes(text.encode())
    with pytest.raises(TrivetError, match="is no gzip file or is damaged"):
        read_vnnlib(packed)
    plain.write_bytes(b"\xff\xfe")
    with pytest.raises(TrivetError, match=r"a\.vnnlib is no text"):
        read_vnnlib(plain)
    plain.write_text("(assert (<= Y_0 0))")
    with pytest.raises(TrivetError, match=r"a\.vnnlib, line 1: Y_0 is used before"):
        read_vnnlib(plain)
    with pytest.raises(TrivetError, match="absent is no file"):
        read_vnnlib(tmp_path / "absent")
    monkeypatch.setattr(vnnlib, "MAX_BYTES", 100)
    packed.write_bytes(gzip.compress(b" " * 1000))
    with pytest.raises(TrivetError, match="more than the ceiling of 100 bytes"):
        read_vnnlib(packed)


def test_the_competition_properties_are_read(real_data: Path) -> None:
    folder = real_data / "vnncomp"
    if not folder.is_dir():
        pytest.skip("no competition instances in the real data")
    conjunctions = {
        name: [[len(each) for each in case.conjunctions] for case in read_vnnlib(folder / name).cases]
        for name in ("acasxu/vnnlib/prop_2.vnnlib.gz", "acasxu/vnnlib/prop_6.vnnlib.gz", "test/test_nano.vnnlib")
    }
    assert list(conjunctions.values()) == [[[4]], [[1, 1, 1, 1]] * 2, [[1]]]
    assert read_vnnlib(folder / "mnist_fc/vnnlib/prop_0_0.03.vnnlib.gz").inputs == 784


# ------------------------------------------------------------------ formulas against their direct evaluation

NUMBERS = st.integers(-4, 4).map(lambda n: f"{n / 2}")
Term = str | tuple[object, ...]


def terms(letter: str) -> st.SearchStrategy[str]:
    leaf = st.one_of(NUMBERS, st.sampled_from([f"{letter}_0", f"{letter}_1"]))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from("+-"), inner, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
            st.tuples(NUMBERS, inner).map(lambda t: f"(* {t[0]} {t[1]})"),
            inner.map(lambda t: f"(- {t})"),
        ),
        max_leaves=4,
    )


COMPARISONS = st.one_of(
    st.tuples(st.sampled_from(["<=", ">="]), terms("Y"), terms("Y")),
    st.tuples(st.sampled_from(["<=", ">="]), st.sampled_from(["X_0", "X_1", "(* -2 X_1)"]), NUMBERS),
).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
FORMULAS = st.recursive(
    COMPARISONS,
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=1, max_size=3)).map(
        lambda t: f"({t[0]} {' '.join(t[1])})"
    ),
    max_leaves=6,
)


def truth(text: str, values: dict[str, Fraction]) -> bool | Fraction:
    """The value of a formula or term, by recursion over its words."""
    words = text.replace("(", " ( ").replace(")", " ) ").split()

    def step() -> bool | Fraction:
        word = words.pop(0)
        if word != "(":
            return values[word] if word in values else Fraction(word)
        head, arguments = words.pop(0), []
        while words[0] != ")":
            arguments.append(step())
        words.pop(0)
        if head == "-" and len(arguments) == 1:
            return -arguments[0]
        return {
            "<=": lambda a: a[0] <= a[1],
            ">=": lambda a: a[0] >= a[1],
            "and": all,
            "or": any,
            "+": lambda a: a[0] + a[1],
            "-": lambda a: a[0] - a[1],
            "*": lambda a: a[0] * a[1],
        }[head](arguments)

    return step()


GRID = [Fraction(n, 2) for n in (-3, -1, 0, 1, 2)]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FORMULAS, min_size=1, max_size=3))
def test_the_cases_are_what_the_formulas_say(formulas: list[str]) -> None:
    box = "".join(f"(assert (>= X_{i} -1))(assert (<= X_{i} 1))" for i in range(2))
    prop = parse_vnnlib(DECLARED + box + "".join(f"(assert {each})" for each in formulas))
    for x0, x1, y0, y1 in itertools.product(GRID[:4], GRID[1:], GRID[::2], GRID[1::2]):
        values = {"X_0": x0, "X_1": x1, "Y_0": y0, "Y_1": y1}
        expected = all(truth(each, values) for each in formulas) and abs(x0) <= 1 and abs(x1) <= 1
        assert found(prop, (x0, x1), (y0, y1)) == expected


PIECES = [
    "(",
    ")",
    "assert",
    "and",
    "or",
    "<=",
    ">=",
    "X_0",
    "Y_0",
    "Y_1",
    "-1.5",
    "1e3",
    "+",
    "*",
    "\n",
    ";x\n",
    "é",
    "|",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map(" ".join))
def test_any_text_is_read_or_refused_in_one_sentence(text: str) -> None:
    refused, prop = "", None
    try:
        prop = parse_vnnlib(DECLARED + BOX + text)
    except TrivetError as error:
        refused = str(error)
    assert refused.startswith("line ") if prop is None else prop.inputs == prop.outputs == 2
