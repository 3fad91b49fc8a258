"""Compare two result files: what became faster or slower from A to B, beyond the scatter of the samples.

    python benchmarks/compare.py A.json B.json [--fail-if-slower 5%]

    ratio      median time in A over median time in B, of the same peer in the same case; above 1, B is faster
    interval   [low(A) / high(B), high(A) / low(B)], low and high the 95 % interval of each median (order statistics)
    verdict    "faster" or "slower" where the interval excludes 1, else "same"

When a peer of eager PyTorch moved, the machine did and not the code; its rows are printed like ours.

Exit status: 0; 1 if a row of ours is "slower" and its time grew by more than the limit; 2 for files or options that
cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.lab.timing import Ratio, paired_ratio
from pages import aligned, load
from report import machine


@dataclass(frozen=True)
class Row:
    """One peer of one case in both files: seconds per call, median and its 95 % interval."""

    case: str
    peer: str
    ours: bool
    before: Ratio
    after: Ratio

    @property
    def low(self) -> float:
        return self.before.low / self.after.high

    @property
    def high(self) -> float:
        return self.before.high / self.after.low

    @property
    def verdict(self) -> str:
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "same"

    def fails(self, limit: float) -> bool:
        return self.ours and self.verdict == "slower" and self.after.median > self.before.median * (1 + limit)


def timings(data: dict[str, Any]) -> dict[tuple[str, str], tuple[bool, Ratio]]:
    """Whether the peer is ours, and its seconds per call, by case and peer."""
    found: dict[tuple[str, str], tuple[bool, Ratio]] = {}
    for case in data["cases"]:
        for name, peer in case["peers"].items():
            key, samples = (f"{case['what']} {case['id']}", name), peer["samples"]
            if key in found:
                raise ValueError(f"the case {key[0]!r} is there twice")
            if not samples or min(samples) <= 0 or case["iterations"] < 1:
                raise ValueError(f"{key[0]}, {name}: got no samples, or samples of no time")
            found[key] = name in case["ours"], paired_ratio(samples, [float(case["iterations"])] * len(samples))
    return found


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """The rows that both files have, and lines naming what only one has. Raises ValueError if they share no row."""
    first, second = timings(a), timings(b)
    rows = [Row(*key, second[key][0], old, second[key][1]) for key, (_, old) in first.items() if key in second]
    if not rows:
        raise ValueError(f"no case and peer in common: A has {len(first)}, B {len(second)}")
    alone = [f"only in A: {case}, {peer}" for case, peer in first if (case, peer) not in second]
    return rows, alone + [f"only in B: {case}, {peer}" for case, peer in second if (case, peer) not in first]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Notes about a different machine, thread count or version of torch."""

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
            f"{1e3 * row.before.median:.4g} ms",
            f"{1e3 * row.after.median:.4g} ms",
            f"{row.before.median / row.after.median:.2f}x",
            f"{row.low:.2f}-{row.high:.2f}",
            row.verdict + (", over the limit" if limit is not None and row.fails(limit) else ""),
        )
        for row in rows
    ]
    return aligned([header, *body])


def percentage(text: str) -> float:
    """Parse "5%", "5" or "5.0 %" as 0.05."""
    value = float(text.strip().removesuffix("%")) / 100
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("a", type=Path, metavar="A.json", help="the earlier result")
    parser.add_argument("b", type=Path, metavar="B.json", help="the later one")
    parser.add_argument(
        "--fail-if-slower", type=percentage, metavar="5%", help="exit with 1 if one of ours takes that much longer in B"
    )
    options = parser.parse_args(arguments)
    subject = str(options.a)
    try:
        a = load(options.a)
        subject = str(options.b)
        b = load(options.b)
        subject = f"{options.a}, {options.b}"
        rows, alone = compare(a, b)
    except (OSError, ValueError) as error:
        print(f"compare: {subject}: {error}", file=sys.stderr)
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
