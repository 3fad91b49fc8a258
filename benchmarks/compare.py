"""Two result files side by side: what became faster or slower from A to B, beyond what their samples scatter.

    python benchmarks/compare.py A.json B.json [--fail-if-slower 5%]

    ratio      median time in A over median time in B, of the same peer in the same case: above 1, B is the faster
    interval   [low(A) / high(B), high(A) / low(B)], low and high the 95 % interval of each median (order statistics)
    verdict    "faster" or "slower" where the interval leaves 1 out, else "same"

A peer of eager PyTorch that moved says that the machine did, not the code: its rows are printed like ours.

Exit status: 0; 1 where a row of ours is "slower" and its time grew by more than the limit; 2 for files or options that
are not as they should be.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.lab.timing import paired_ratio
from report import aligned, machine
from result_schema import load


@dataclass(frozen=True)
class Row:
    """One peer of one case in both files."""

    case: str
    peer: str
    ours: bool
    before: float  # seconds of one call
    after: float
    low: float  # of the ratio
    high: float

    @property
    def ratio(self) -> float:
        return self.before / self.after

    @property
    def verdict(self) -> str:
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "same"

    def fails(self, limit: float) -> bool:
        return self.ours and self.verdict == "slower" and self.after > self.before * (1 + limit)


def spread(peer: dict[str, Any], iterations: int) -> tuple[float, float]:
    """The 95 % interval of a peer's median time of one call; the range where there are fewer than six samples."""
    interval = paired_ratio(peer["samples"], [float(iterations)] * len(peer["samples"]))
    return interval.low, interval.high


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """(the rows that both hold, what only one of them holds). Raises ValueError where they share nothing."""
    first, second = _peers(a), _peers(b)
    rows = []
    for key in first:
        if key not in second:
            continue
        (before, n), (after, m) = first[key][:2], second[key][:2]
        (low_a, high_a), (low_b, high_b) = spread(before, n), spread(after, m)
        times = statistics.median(before["samples"]) / n, statistics.median(after["samples"]) / m
        rows.append(Row(*key, second[key][2], *times, low_a / high_b, high_a / low_b))
    if not rows:
        raise ValueError(f"no case and peer in common: A has {len(first)}, B {len(second)}")
    alone = [f"only in A: {case}, {peer}" for case, peer in first if (case, peer) not in second]
    return rows, alone + [f"only in B: {case}, {peer}" for case, peer in second if (case, peer) not in first]


def _peers(data: dict[str, Any]) -> dict[tuple[str, str], tuple[dict[str, Any], int, bool]]:
    """(case, peer) -> (the peer, calls in a sample, whether it is ours)."""
    found = {}
    for case in data["cases"]:
        for name, peer in case["peers"].items():
            key = (f"{case['what']} {case['id']}", name)
            if key in found:
                raise ValueError(f"the case {key[0]!r} is there twice")
            if not peer["samples"] or min(peer["samples"]) <= 0 or case["iterations"] < 1:
                raise ValueError(f"{key[0]}, {name}: got no samples, or none that took time")
            found[key] = peer, case["iterations"], name in case["ours"]
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What makes the two hard to compare: another machine, thread count or version."""

    def facts(data: dict[str, Any]) -> dict[str, Any]:
        where = data["environment"]
        device = where["gpu"]["name"] if where["gpu"] else where["cpu"]["model"]
        return {"device": device, "threads": where["threads"], "torch": where["versions"]["torch"]}

    first, second = facts(a), facts(b)
    return [f"note: {name} is {first[name]} in A, {second[name]} in B" for name in first if first[name] != second[name]]


def table(rows: Sequence[Row], limit: float | None) -> list[str]:
    header = ("case", "peer", "A", "B", "ratio", "95 % interval", "verdict")
    body = [
        (
            row.case,
            row.peer,
            f"{1e3 * row.before:.4g} ms",
            f"{1e3 * row.after:.4g} ms",
            f"{row.ratio:.2f}x",
            f"{row.low:.2f}-{row.high:.2f}",
            row.verdict + (", over the limit" if limit is not None and row.fails(limit) else ""),
        )
        for row in rows
    ]
    return aligned([header, *body])


def percentage(text: str) -> float:
    """ "5%", "5" and "5.0 %" are 0.05."""
    value = float(text.strip().removesuffix("%")) / 100
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("a", type=Path, metavar="A.json", help="the earlier result")
    parser.add_argument("b", type=Path, metavar="B.json", help="the later one")
    parser.add_argument(
        "--fail-if-slower", type=percentage, metavar="5%", help="exit with 1 where ours takes that much longer in B"
    )
    options = parser.parse_args(arguments)
    found = []
    for path in (options.a, options.b):
        try:
            found.append(load(path))
        except (OSError, ValueError) as error:
            print(f"compare: {path}: {error}", file=sys.stderr)
            return 2
    a, b = found
    try:
        rows, alone = compare(a, b)
    except ValueError as error:
        print(f"compare: {options.a}, {options.b}: {error}", file=sys.stderr)
        return 2
    limit = options.fail_if_slower
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("faster", "same", "slower")}
    failed = [row for row in rows if limit is not None and row.fails(limit)]
    lines = [f"A: {machine(a)}", f"B: {machine(b)}", *differences(a, b), "", *table(rows, limit), "", *alone]
    lines.append(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    if limit is not None:
        lines.append(f"{len(failed)} of ours slower by more than {100 * limit:g} %")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
