"""VNN-LIB 1.0: the file format in which verifiers are asked about a network (Demarchi et al., FoMLAS 2023).

A file declares inputs X_0, X_1, … and outputs Y_0, Y_1, … and asserts what a counterexample is: bounds on every input,
and linear constraints on the outputs, combined with `and` and `or`. The property holds if there is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from trivet.errors import TrivetError
from trivet.files import read_packed

MAX_BYTES = 1 << 28
MAX_DEPTH = 100
MAX_CASES = 10_000

_TOKEN = re.compile(r"[ \t\r\f]+|;[^\n]*|(?P<newline>\n)|(?P<paren>[()])|(?P<atom>[^\s();\"|]+)")
_NUMBER = re.compile(r"[+-]?\d{1,400}(\.\d{0,400})?([eE][+-]?\d{1,3})?", re.ASCII)
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})", re.ASCII)


@dataclass(frozen=True)
class Halfspace:
    """{ y : <coefficients, y> + constant <= 0 }, over the outputs of a network, in exact numbers."""

    coefficients: tuple[Fraction, ...]
    constant: Fraction

    def value(self, y: Sequence[Fraction]) -> Fraction:
        """<coefficients, y> + constant."""
        return sum((c * v for c, v in zip(self.coefficients, y, strict=True) if c), self.constant)


Conjunction = tuple[Halfspace, ...]


@dataclass(frozen=True)
class Case:
    """A box of inputs, and what outputs are a counterexample there: those in all halfspaces of some conjunction."""

    lower: tuple[Fraction, ...]
    upper: tuple[Fraction, ...]
    conjunctions: tuple[Conjunction, ...]

    def box(self) -> tuple[Tensor, Tensor]:
        """The box in float64 [n] each, rounded outward: it contains every point of the exact one."""
        ends = ([rounded(v, -1) for v in self.lower], [rounded(v, 1) for v in self.upper])
        lower, upper = (torch.tensor(end, dtype=torch.float64) for end in ends)
        return lower, upper

    def met_by(self, x: Sequence[Fraction], y: Sequence[Fraction]) -> bool:
        """Whether input x with output y is a counterexample, decided in exact arithmetic."""
        inside = all(low <= v <= high for low, v, high in zip(self.lower, x, self.upper, strict=True))
        return inside and any(all(half.value(y) <= 0 for half in each) for each in self.conjunctions)


@dataclass(frozen=True)
class Property:
    """What a file says: a network of so many inputs and outputs has no counterexample in any of the cases."""

    inputs: int
    outputs: int
    cases: tuple[Case, ...]


def read_vnnlib(path: str | Path) -> Property:
    """The property in a .vnnlib or .vnnlib.gz file.

    Raises:
        TrivetError: no such file, or one that is not understood, with the line. Nothing unknown is passed over: strict
            or equal signs, products of variables, constraints on several inputs at once, or on inputs and outputs
            together, inputs without bounds on both sides.
    """
    path = Path(path)
    content = read_packed(path, MAX_BYTES)
    try:
        return parse_vnnlib(content.decode())
    except UnicodeDecodeError:
        raise TrivetError(f"{path} is no text, and so no VNN-LIB file.") from None
    except _Misread as error:
        raise TrivetError(f"{path}, {error}.") from None


def parse_vnnlib(text: str) -> Property:
    """The property in the text of a VNN-LIB file; errors name the line, as in `read_vnnlib`."""
    reader = _Reader()
    for each in _expressions(text):
        reader.read(each)
    return reader.property()


class _Misread(TrivetError):
    """Something in the text that is not understood."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"line {line}: {text}")


@dataclass(frozen=True)
class _Expression:
    """An atom, or a list of expressions, and the line it begins in."""

    line: int
    atom: str | None
    items: tuple[_Expression, ...] = ()

    @property
    def head(self) -> str:
        return (self.items[0].atom or "(") if self.items else "()"

    def __str__(self) -> str:
        return f"({self.head} …)" if self.atom is None else self.atom[:40]


def _expressions(text: str) -> Iterator[_Expression]:
    """The expressions of the text one after another; recursion is replaced by a stack, so that depth costs nothing."""
    line, place = 1, 0
    stack: list[tuple[int, list[_Expression]]] = []
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            raise _Misread(line, f"{text[place]!r} is no part of VNN-LIB")
        place = token.end()
        done: _Expression | None = None
        if token["newline"]:
            line += 1
        elif token["atom"]:
            done = _Expression(line, token["atom"])
        elif token["paren"] == "(":
            if len(stack) == MAX_DEPTH:
                raise _Misread(line, f"more than {MAX_DEPTH} parentheses are open")
            stack.append((line, []))
        elif token["paren"] == ")":
            if not stack:
                raise _Misread(line, "a parenthesis is closed that was not opened")
            start, items = stack.pop()
            done = _Expression(start, None, tuple(items))
        if done is not None and stack:
            stack[-1][1].append(done)
        elif done is not None:
            yield done
    if stack:
        raise _Misread(stack[0][0], "the parenthesis opened here is never closed")


@dataclass
class _Linear:
    """A sum of variables ("X", i) with exact coefficients, and a constant."""

    terms: dict[tuple[str, int], Fraction]
    constant: Fraction

    def plus(self, other: _Linear, factor: Fraction) -> _Linear:
        terms = dict(self.terms)
        for name, value in other.terms.items():
            terms[name] = terms.get(name, Fraction(0)) + factor * value
        return _Linear({name: v for name, v in terms.items() if v}, self.constant + factor * other.constant)

    def times(self, factor: Fraction) -> _Linear:
        return _Linear({}, Fraction(0)).plus(self, factor)


_Atom = tuple[_Linear, int]
"""linear <= 0, and the line where it stands."""


class _Reader:
    """Collects declarations, and the disjunctive normal form of all assertions together."""

    def __init__(self) -> None:
        self.declared: dict[str, set[int]] = {"X": set(), "Y": set()}
        self.always: list[_Atom] = []
        self.choices: list[list[list[_Atom]]] = []
        self.line = 1

    def read(self, command: _Expression) -> None:
        self.line = command.line
        if command.atom is not None or command.head not in ("declare-const", "assert"):
            raise _Misread(command.line, f"{command} is neither declare-const nor assert")
        if command.head == "declare-const":
            self._declare(command)
            return
        if len(command.items) != 2:
            raise _Misread(command.line, "assert takes one formula")
        disjuncts = self._formula(command.items[1])
        if len(disjuncts) == 1:
            self.always += disjuncts[0]
        else:
            self.choices.append(disjuncts)

    def _declare(self, command: _Expression) -> None:
        words = [each.atom or "(" for each in command.items[1:]]
        variable = _VARIABLE.fullmatch(words[0]) if len(words) == 2 else None
        if variable is None or words[1] != "Real":
            raise _Misread(
                command.line, "a declaration reads (declare-const X_0 Real), with X for inputs, Y for outputs"
            )
        index = int(variable[2])
        if index in self.declared[variable[1]]:
            raise _Misread(command.line, f"{words[0]} is declared twice")
        self.declared[variable[1]].add(index)

    def _formula(self, formula: _Expression) -> list[list[_Atom]]:
        """The formula as a disjunction of conjunctions."""
        head, arguments = formula.head, formula.items[1:]
        if formula.atom is None and head in ("<=", ">="):
            if len(arguments) != 2:
                raise _Misread(formula.line, f"{head} compares two terms, and here are {len(arguments)}")
            left, right = (self._term(each) for each in arguments)
            small, large = (left, right) if head == "<=" else (right, left)
            return [[(small.plus(large, Fraction(-1)), formula.line)]]
        if formula.atom is None and head in ("and", "or") and arguments:
            parts = [self._formula(each) for each in arguments]
            if head == "and":
                return _conjoined(parts, formula.line)
            disjuncts = [conjunction for part in parts for conjunction in part]
            _refuse_too_many(len(disjuncts), formula.line)
            return disjuncts
        raise _Misread(formula.line, f"{formula} is none of (<= …), (>= …), (and …) and (or …)")

    def _term(self, term: _Expression) -> _Linear:
        if term.atom is not None:
            return self._single(term)
        head, arguments = term.head, [self._term(each) for each in term.items[1:]]
        if head not in ("+", "-", "*") or not arguments:
            raise _Misread(term.line, f"{term} is no number, variable, (+ …), (- …) or (* …)")
        total = arguments[0]
        if head == "-" and len(arguments) == 1:
            return total.times(Fraction(-1))
        for each in arguments[1:]:
            if head != "*":
                total = total.plus(each, Fraction(1 if head == "+" else -1))
            elif each.terms and total.terms:
                raise _Misread(term.line, "a product of variables is not linear")
            else:
                total = total.times(each.constant) if total.terms else each.times(total.constant)
        return total

    def _single(self, term: _Expression) -> _Linear:
        text = term.atom or ""
        if _NUMBER.fullmatch(text):
            return _Linear({}, Fraction(text))
        variable = _VARIABLE.fullmatch(text)
        if variable is None:
            raise _Misread(term.line, f"{term} is neither a decimal number nor a variable X_i or Y_i")
        if int(variable[2]) not in self.declared[variable[1]]:
            raise _Misread(term.line, f"{text} is used before it is declared")
        return _Linear({(variable[1], int(variable[2])): Fraction(1)}, Fraction(0))

    def property(self) -> Property:
        sizes = {}
        for letter, what in (("X", "input"), ("Y", "output")):
            indices = self.declared[letter]
            sizes[letter] = len(indices)
            if indices != set(range(len(indices))) or not indices:
                missing = min(set(range(len(indices) + 1)) - indices)
                raise _Misread(self.line, f"the {what} {letter}_{missing} is never declared")
        # Bounds common to all cases are kept apart: a box of many inputs is not copied for each of its cases.
        shared = _Bounds([None] * sizes["X"], [None] * sizes["X"])
        common = self._conjunction(self.always, shared, sizes["Y"])
        found: dict[tuple[tuple[Fraction, ...], tuple[Fraction, ...]], list[Conjunction]] = {}
        for disjunct in _conjoined(self.choices, self.line):
            bounds = _Bounds(list(shared.lower), list(shared.upper))
            halfspaces = self._conjunction(disjunct, bounds, sizes["Y"])
            box = bounds.box(self.line)
            if common is not None and halfspaces is not None and all(map(Fraction.__le__, *box)):
                found.setdefault(box, []).append(tuple(dict.fromkeys(common + halfspaces)))
        cases = [Case(*box, tuple(dict.fromkeys(conjunctions))) for box, conjunctions in found.items()]
        return Property(sizes["X"], sizes["Y"], tuple(cases))

    def _conjunction(self, atoms: list[_Atom], bounds: _Bounds, outputs: int) -> list[Halfspace] | None:
        """The halfspaces among `atoms`, after the others have gone into `bounds`; None if an atom is never true."""
        halfspaces = []
        for linear, line in atoms:
            letters = {letter for letter, _ in linear.terms}
            if not letters and linear.constant > 0:
                return None
            if letters == {"Y"}:
                row = tuple(linear.terms.get(("Y", i), Fraction(0)) for i in range(outputs))
                halfspaces.append(Halfspace(row, linear.constant))
            elif letters == {"X"} and len(linear.terms) == 1:
                (((_, index), factor),) = linear.terms.items()
                bounds.tighten(index, factor, linear.constant)
            elif letters:
                what = "inputs and outputs together" if len(letters) == 2 else "several inputs at once"
                raise _Misread(line, f"a constraint on {what} is not supported; inputs lie in boxes")
        return halfspaces


@dataclass
class _Bounds:
    """Bounds of the inputs read so far; None where there is none yet."""

    lower: list[Fraction | None]
    upper: list[Fraction | None]

    def tighten(self, index: int, factor: Fraction, constant: Fraction) -> None:
        """factor * X_index + constant <= 0."""
        end = -constant / factor
        low, high = self.lower[index], self.upper[index]
        if factor > 0:
            self.upper[index] = end if high is None else min(high, end)
        else:
            self.lower[index] = end if low is None else max(low, end)

    def box(self, line: int) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
        for ends, word in ((self.lower, "lower"), (self.upper, "upper")):
            if None in ends:
                raise _Misread(line, f"the input X_{ends.index(None)} has no {word} bound in some case")
        return tuple(v for v in self.lower if v is not None), tuple(v for v in self.upper if v is not None)


def _conjoined(parts: list[list[list[_Atom]]], line: int) -> list[list[_Atom]]:
    """The disjunctive normal form of all `parts` together, each of which is in that form."""
    _refuse_too_many(math.prod(map(len, parts)), line)
    whole: list[list[_Atom]] = [[]]
    for part in parts:
        if len(part) == 1:  # by far the most frequent: not one list for each atom
            for conjunction in whole:
                conjunction += part[0]
        else:
            whole = [[*conjunction, *each] for conjunction in whole for each in part]
    return whole


def _refuse_too_many(cases: int, line: int) -> None:
    if cases > MAX_CASES:
        raise _Misread(line, f"the property falls into more than {MAX_CASES} cases")


def rounded(value: Fraction, direction: int) -> float:
    """The float64 next to an exact number at or below it (direction -1), or at or above it (1)."""
    try:
        nearest = value.numerator / value.denominator  # correctly rounded
    except OverflowError:
        return math.copysign(math.inf, value)
    exact = Fraction(nearest)
    off = exact > value if direction < 0 else exact < value
    return math.nextafter(nearest, direction * math.inf) if off else nearest
