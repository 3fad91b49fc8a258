"""What convergence.py makes of its runs: the verdicts, and JSON, Markdown and a picture of them.

python benchmarks/convergence_report.py RESULT.json     # the Markdown and the picture once more
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastres.lab.errors import MissingExtra
from fastres.lab.results import write_atomically, write_json
from result_schema import validate

Run = dict[str, Any]

SCHEMA_NAME = "fastres.convergence/1"
DTYPES = ("fp32", "bf16")
ALLOWED = 2.0  # times eager's error or distance
FLIPPED = 10.0  # times eager's median error of the gradient
APART = 1e-3  # relative distance of the parameters
LAST = 20  # steps that make the final loss
DIFFERENCES = 8  # of means that a result holds: two networks, two dtypes, loss and accuracy

_WAY = {"loss": [float], "test_loss": float, "test_accuracy": float}
_VERDICT = {
    "network": str,
    "dtype": str,
    "question": str,  # a, b or c, as in convergence.py
    "what": str,
    "eager": float,
    "swapped": float,
    "limit": str,
    "passed": bool,
}
SCHEMA = {
    "schema": str,
    "environment": dict,
    "settings": {str: dict},  # by network
    "runs": {str: [{"seed": int, "looks": [int], "ways": {str: _WAY}}]},  # by network; one run a seed
    "apart": {str: {str: [(int, None)]}},  # by network and way, for each seed: the step at which it is 1e-3 away
    "verdicts": [_VERDICT],
}

# ---- verdicts --------------------------------------------------------------------------------------------------------


def rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value * value for value in values))


def verdicts(network: str, runs: Sequence[Run], test_images: int, dtypes: Sequence[str] = DTYPES) -> list[Run]:
    """The verdicts on one network's runs, a run for each seed; on (c) from two seeds on."""
    found: list[Run] = []
    for dtype in dtypes:
        pair = [[run["ways"][f"{way} {dtype}"] for run in runs] for way in ("eager", "swapped")]

        def add(question: str, what: str, both: Sequence[float], limit: str, passed: bool, dtype: str = dtype) -> None:
            facts = {"network": network, "dtype": dtype, "question": question, "what": what}
            found.append(facts | {"eager": both[0], "swapped": both[1], "limit": limit, "passed": passed})

        def at_most_twice(question: str, what: str, both: Sequence[float]) -> None:
            add(question, what, both, f"{ALLOWED:g}x eager", both[1] <= ALLOWED * both[0])

        for kind in ("loss", "logits", "statistics"):
            errors = [[error for run in way for error in run["errors"][kind]] for way in pair]
            at_most_twice("a", f"{kind}: error, median", [statistics.median(way) for way in errors])
            at_most_twice("a", f"{kind}: error, RMS", [rms(way) for way in errors])
        gradients = [[error for run in way for error in run["errors"]["gradients"]] for way in pair]
        typical = [statistics.median(way) for way in gradients]
        at_most_twice("a", "gradients: error, median", typical)
        flips = [sum(error > FLIPPED * typical[0] for error in way) for way in gradients]
        shares, limit = [count / len(gradients[0]) for count in flips], f"{ALLOWED:g}x eager and one state"
        add("a", "gradients: share of states with a flip", shares, limit, flips[1] <= ALLOWED * flips[0] + 1)

        for kind in ("parameters", "statistics"):
            ends = [rms([run["distances"][kind][-1] for run in way]) for way in pair]
            at_most_twice("b", f"{kind}: distance at the end, RMS", ends)

        if len(runs) < 2:
            continue
        losses = [[statistics.fmean(run["loss"][-LAST:]) for run in way] for way in pair]
        accuracies = [[run["test_accuracy"] for run in way] for way in pair]
        for what, values, least in (("final loss", losses, 0.0), ("held-out accuracy", accuracies, 1 / test_images)):
            means = [statistics.fmean(way) for way in values]
            allowed = max(quantile(len(runs)) * standard_error(*values), least)
            add("c", what, means, f"eager +- {allowed:.2g}", abs(means[1] - means[0]) <= allowed + 1e-12)
    return found


def standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the difference of the means of two samples."""
    return math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))


def quantile(seeds: int) -> float:
    """The standard errors that in 19 of 20 cases none of DIFFERENCES differences exceeds, by Bonferroni."""
    from scipy.stats import t

    return float(t.ppf(1 - 0.05 / DIFFERENCES / 2, 2 * seeds - 2))


def apart(run: Run, way: str) -> int | None:
    """The first step looked at, from 1, after which the way's parameters are APART from float64's or more."""
    far = zip(run["looks"], run["ways"][way]["distances"]["parameters"], strict=True)
    return next((step + 1 for step, distance in far if distance >= APART), None)


def document(
    runs: Mapping[str, Sequence[Run]], settings: Mapping[str, Run], where: Run, test_images: int = 360
) -> dict[str, Any]:
    """The result file."""
    ways = [name for name in next(iter(runs.values()))[0]["ways"] if name != "float64"]
    return {
        "schema": SCHEMA_NAME,
        "environment": where,
        "settings": dict(settings),
        "apart": {name: {way: [apart(run, way) for run in seeds] for way in ways} for name, seeds in runs.items()},
        "verdicts": [verdict for name, seeds in runs.items() for verdict in verdicts(name, seeds, test_images)],
        "runs": {name: list(seeds) for name, seeds in runs.items()},
    }


def check(data: Any) -> dict[str, Any]:
    """The data, if they are a result of this program; raises ValueError saying what is wrong with them."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA_NAME:
        raise ValueError(f"not a result of convergence.py: expected the key 'schema' to say {SCHEMA_NAME!r}")
    validate(data, SCHEMA)
    return data


# ---- text ------------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "a": "One step from the same state: the error against float64",
    "b": "Whole runs: the distance to float64's run",
    "c": "The result, means over the seeds",
}


def text(data: dict[str, Any]) -> list[str]:
    """One line a verdict."""
    return [
        f"{'ok    ' if v['passed'] else 'FAILED'} {v['network']:<15} {v['dtype']}  ({v['question']}) {v['what']:<39}"
        f" eager {v['eager']:.3g}, swapped {v['swapped']:.3g}; limit {v['limit']}"
        for v in data["verdicts"]
    ]


def machine(data: dict[str, Any]) -> str:
    where, commit = data["environment"], data["environment"]["commit"] or "unknown"
    return (
        f"{where['cpu']['model']}, {where['cpu']['isa']}, {where['threads']} thread"
        f"{'' if where['threads'] == 1 else 's'}; torch {where['versions']['torch']}, fastres"
        f" {where['versions']['fastres']}, commit {commit[:10]}{'+' if commit.endswith('+') else ''}"
    )


def markdown(data: dict[str, Any]) -> str:
    where, lines = data["environment"], ["# Training: swapped beside eager", ""]
    lines += [f"{machine(data)}. {where['time']}. Command: `{where['command']}`.", ""]
    for name, one in data["settings"].items():
        lines.append(
            f"- {name}: scikit-learn's digits at {one['size']}x{one['size']}, {one['steps']} steps of SGD, batch "
            f"{one['batch']}, momentum {one['momentum']}, highest learning rate {one['lr']}, "
            f"{len(data['runs'][name])} seeds"
        )
    lines += ["", "Questions and limits are at the head of `benchmarks/convergence.py`. bf16 is autocast.", ""]
    for question, title in QUESTIONS.items():
        rows = [v for v in data["verdicts"] if v["question"] == question]
        lines += [f"## {title}", "", "| network | dtype | | eager | swapped | ratio | limit | |", "| --- " * 8 + "|"]
        for v in rows:
            ratio = f"{v['swapped'] / v['eager']:.2f}" if v["eager"] else ""
            verdict = "passed" if v["passed"] else "FAILED"
            cells = (f"{v['eager']:.4g}", f"{v['swapped']:.4g}", ratio, v["limit"], verdict)
            lines.append("| " + " | ".join((v["network"], v["dtype"], v["what"], *cells)) + " |")
        lines.append("")
    lines += [f"## The step at which a run's parameters are {APART:g} from float64's, seed by seed", ""]
    lines += ["| network | " + " | ".join(next(iter(data["apart"].values()))) + " |"]
    lines += ["| --- " * (1 + len(next(iter(data["apart"].values())))) + "|"]
    for name, ways in data["apart"].items():
        lines.append(
            "| " + " | ".join([name, *(", ".join(str(s or "never") for s in w) for w in ways.values())]) + " |"
        )
    lines += [
        "",
        "## Seed by seed",
        "",
        seed_noise(data),
        "",
        "| network | dtype | seed | final loss: eager, swapped, difference | ",
    ]
    lines[-1] += "held-out accuracy: eager, swapped, difference |"
    lines.append("| --- " * 5 + "|")
    for name, runs in data["runs"].items():
        for dtype in DTYPES:
            for run in runs:
                eager, swapped = (run["ways"][f"{way} {dtype}"] for way in ("eager", "swapped"))
                loss = [statistics.fmean(way["loss"][-LAST:]) for way in (eager, swapped)]
                right = [way["test_accuracy"] for way in (eager, swapped)]
                cells = [name, dtype, str(run["seed"])]
                cells += [f"{loss[0]:.4f}, {loss[1]:.4f}, {loss[1] - loss[0]:+.4f}"]
                cells += [f"{right[0]:.2%}, {right[1]:.2%}, {right[1] - right[0]:+.2%}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def seed_noise(data: dict[str, Any]) -> str:
    """How large the differences of (c) are, in standard errors."""
    sizes = []
    for runs in data["runs"].values():
        for dtype in DTYPES:
            pair = [[run["ways"][f"{way} {dtype}"] for run in runs] for way in ("eager", "swapped")]
            for value in (lambda way: statistics.fmean(way["loss"][-LAST:]), lambda way: way["test_accuracy"]):
                ours, theirs = [value(way) for way in pair[1]], [value(way) for way in pair[0]]
                error = standard_error(ours, theirs)
                sizes.append(abs(statistics.fmean(ours) - statistics.fmean(theirs)) / error if error else 0.0)
    return (
        f"The differences of the means, in standard errors of the difference: {', '.join(f'{x:.1f}' for x in sizes)}; "
        f"{quantile(len(runs)):.1f} are allowed."
    )


# ---- picture ---------------------------------------------------------------------------------------------------------

STYLES = {  # eager wide and pale, swapped thin and dark on top: they should lie on each other
    "float64": {"color": "#33383d", "linewidth": 1.0, "linestyle": ":"},
    "eager fp32": {"color": "#a9cdea", "linewidth": 4.5},
    "swapped fp32": {"color": "#14568c", "linewidth": 1.3},
    "eager bf16": {"color": "#f3d0a0", "linewidth": 4.5},
    "swapped bf16": {"color": "#b5651d", "linewidth": 1.3},
}
SMOOTH = 9  # steps


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean over SMOOTH steps around each, fewer at the ends."""
    half = SMOOTH // 2
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def draw(data: dict[str, Any], path: Path) -> None:
    """Writes the PNG: for each network the loss, the runs' distance to float64 and the error of one step.

    Raises MissingExtra where matplotlib is not installed, OutputError where `path` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtra('the plot needs matplotlib, which is not installed: pip install "fastres[viz]"') from missing
    figure = Figure(figsize=(15, 1.1 + 3.9 * len(data["runs"])), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(data["runs"]), 3, squeeze=False)
    handles: dict[str, Any] = {}
    for row, (name, runs) in zip(grid, data["runs"].items(), strict=True):
        steps, looks = range(1, data["settings"][name]["steps"] + 1), [step + 1 for step in runs[0]["looks"]]
        for way, style in STYLES.items():
            losses = [statistics.fmean(at) for at in zip(*(run["ways"][way]["loss"] for run in runs), strict=True)]
            (handles[way],) = row[0].plot(steps, smoothed(losses), **style)
            if way == "float64":
                continue
            for axes, kind, of in ((row[1], "distances", "parameters"), (row[2], "errors", "gradients")):
                series = zip(*(run["ways"][way][kind][of] for run in runs), strict=True)
                axes.plot(looks, [statistics.median(at) for at in series], **style)
        titles = (
            f"{name}: training loss, {len(runs)} seeds, {SMOOTH}-step mean",
            "Whole runs: the parameters' distance to float64",
            "One step from the same state: the gradient's error",
        )
        for axes, title, label in zip(
            row, titles, ("cross-entropy", *("relative L2 distance to float64",) * 2), strict=True
        ):
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axes.set_yscale("log")
            axes.set_xlabel("step", fontsize=9)
            axes.set_ylabel(label, fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(True, color="#e3e3e3", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        row[1].set_xscale("log")  # it is decided in the first steps
        row[1].xaxis.set_major_formatter("{x:g}")
    figure.legend(
        handles=list(handles.values()),
        labels=["float64 (loss alone)", *list(handles)[1:]],
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
    )
    passed = sum(verdict["passed"] for verdict in data["verdicts"])
    figure.suptitle(
        "Training with swapped blocks beside eager, same weights, same batches; distances are medians of the seeds\n"
        f"{passed} of {len(data['verdicts'])} bounds hold; {machine(data)}, {data['environment']['time'][:10]}",
        x=0.005,
        ha="left",
        fontsize=11,
    )
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": "fastres"}))


# ---- files -----------------------------------------------------------------------------------------------------------


def write(data: dict[str, Any], folder: Path) -> list[Path]:
    """JSON, Markdown and, where matplotlib is installed, the PNG."""
    stem = f"convergence-cpu-torch{torch.__version__.partition('+')[0]}"
    paths = [folder / f"{stem}{suffix}" for suffix in (".json", ".md", ".png")]
    write_json(paths[0], check(data))
    write_atomically(paths[1], lambda file: file.write(markdown(data).encode()))
    try:
        draw(data, paths[2])
    except MissingExtra:
        return paths[:2]
    return paths


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python benchmarks/convergence_report.py RESULT.json", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        data = check(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        print(f"convergence_report: {path}: {error}", file=sys.stderr)
        return 1
    write_atomically(path.with_suffix(".md"), lambda file: file.write(markdown(data).encode()))
    draw(data, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
