"""A folder of verification instances, each within its time, and whether the verdicts are the known ones.

    python bench/vnncomp.py ../shared/data/vnncomp/acasxu --out results/vnncomp_acasxu.json

`instances.csv` in the folder lists network, property and seconds. Every instance is decided on its own, reading
included, one after the other, so that all threads work on each. Known verdicts are compared where there are some:
--known names a CSV file with lines "network,property,sat|unsat" (the last parts of their paths are compared), such
as `bench/vnncomp_known.csv`, on which the tools of the 2022 competition agreed (all but one, which was unsound).
Without it, of ACAS Xu, property 1 is known to hold on all 45 networks, and properties 3 and 4 on all but 1_7, 1_8
and 1_9, where they are violated. A verdict against a known one ends the run with status 1. Seconds depend on the
machine; verdicts, but for timeouts, do not.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from trivet.certify.competition import decide, result_word

ACAS_XU = re.compile(r"ACASXU_run2a_(\d_\d)_batch_2000\.onnx")
SANITY = {"test_sat.onnx": "sat", "test_unsat.onnx": "unsat"}


def known_of(network: str, prop: str, listed: Mapping[tuple[str, str], str]) -> str | None:
    """The verdict an instance is known to have."""
    names = Path(network).name.removesuffix(".gz"), Path(prop).name.removesuffix(".gz")
    if names in listed:
        return listed[names]
    match = ACAS_XU.fullmatch(names[0])
    if match and names[1] == "prop_1.vnnlib":
        return "unsat"
    if match and names[1] in ("prop_3.vnnlib", "prop_4.vnnlib"):
        return "sat" if match[1] in ("1_7", "1_8", "1_9") else "unsat"
    return SANITY.get(names[0])


def listed_in(path: Path | None) -> dict[tuple[str, str], str]:
    if path is None:
        return {}
    with path.open(newline="") as handle:
        rows = [row for row in csv.reader(handle) if row]
    return {
        (Path(network).name.removesuffix(".gz"), Path(prop).name.removesuffix(".gz")): verdict
        for network, prop, verdict in rows
    }


def present(path: Path) -> Path:
    """The file, or its packed form."""
    return path if path.exists() else path.with_name(path.name + ".gz")


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("folder", type=Path, help="with instances.csv")
    parser.add_argument("--known", type=Path, help="CSV of network,property,sat|unsat")
    parser.add_argument("--only", default="", help="only instances whose line matches this regular expression")
    parser.add_argument("--most", type=float, default=1e6, help="seconds for an instance, if less than listed")
    parser.add_argument("--arithmetic", choices=["float32", "real"], default="float32")
    options = parser.parse_args()
    harness.prepare(options)
    listed = listed_in(options.known)
    with (options.folder / "instances.csv").open(newline="") as handle:
        instances = [row for row in csv.reader(handle) if row and re.search(options.only, ",".join(row))]
    rows: list[dict[str, Any]] = []
    for network, prop, allowed in instances:
        start = time.perf_counter()
        verdict = decide(
            present(options.folder / network),
            present(options.folder / prop),
            timeout=min(float(allowed), options.most),
            arithmetic=options.arithmetic,
        )
        known = known_of(network, prop, listed)
        word = result_word(verdict)
        wrong = known is not None and word in ("sat", "unsat") and word != known
        row = {
            "network": Path(network).stem,
            "property": Path(prop).stem,
            "verdict": word,
            "known": known,
            "wrong": wrong,
            "seconds": time.perf_counter() - start,
            "parts": verdict.boxes,
        }
        rows.append(row)
        print(*("" if value is None else value for value in row.values()), flush=True)
    summary = [
        {
            "property": name,
            "instances": len(group),
            **{word: sum(row["verdict"] == word for row in group) for word in ("unsat", "sat", "timeout", "unknown")},
            "known": sum(row["known"] is not None for row in group),
            "wrong": sum(row["wrong"] for row in group),
            "median_seconds": statistics.median(row["seconds"] for row in group),
            "most_seconds": max(row["seconds"] for row in group),
        }
        for name in Counter(row["property"] for row in rows)
        for group in [[row for row in rows if row["property"] == name]]
    ]
    if summary:
        harness.show(f"{options.folder.name}: {options.threads} threads, {options.arithmetic} arithmetic", summary)
    harness.save(options, {"summary": summary, "instances": rows})
    if any(row["wrong"] for row in rows):
        print("a verdict contradicts what is known: a bug in the verifier, or in the list.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
