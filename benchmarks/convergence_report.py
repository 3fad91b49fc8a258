"""The report of convergence.py: verdicts on its runs, as JSON, Markdown and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pages
from fastres.lab.results import new_figure, save_png, style
from pages import markdown_table, validate

Run = dict[str, Any]

SCHEMA_NAME = "fastres.convergence/1"
DTYPES = ("fp32", "bf16")
WAYS = ("eager", "swapped")
ALLOWED = 2.0  # times eager's error or distance
FLIPPED = 10.0  # times eager's median error of the gradient
APART = 1e-3  # relative distance of the parameters
LAST = 20  # steps that make the final loss
DIFFERENCES = 8  # of means in a result: two networks, two dtypes, loss and accuracy

_WAY = {"loss": [float], "test_loss": float, "test_accuracy": float}
_VERDICT = {
    "network": str,
    "dtype": str,
    "question": str,  # a, b or c of convergence.py
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
    "apart": {str: {str: [(int, None)]}},  # by network and way, per seed: the step at which it is 1e-3 away
    "verdicts": [_VERDICT],
}

# ---- verdicts --------------------------------------------------------------------------------------------------------

RESULTS: dict[str, Callable[[Run], float]] = {  # of one way of one run
    "final loss": lambda way: statistics.fmean(way["loss"][-LAST:]),
    "held-out accuracy": lambda way: float(way["test_accuracy"]),
}


def outcomes(runs: Sequence[Run], dtype: str, what: str) -> list[list[float]]:
    """A result of every run, seed by seed: the eager runs', then the swapped runs'."""
    return [[RESULTS[what](run["ways"][f"{way} {dtype}"]) for run in runs] for way in WAYS]


def rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value * value for value in values))


def verdicts(network: str, runs: Sequence[Run], test_images: int, dtypes: Sequence[str] = DTYPES) -> list[Run]:
    """The verdicts on one network's runs, one per seed. (c) takes at least two seeds."""
    found: list[Run] = []
    for dtype in dtypes:
        pair = [[run["ways"][f"{way} {dtype}"] for run in runs] for way in WAYS]

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
        for what in RESULTS if len(runs) > 1 else ():
            values = outcomes(runs, dtype, what)
            means = [statistics.fmean(way) for way in values]
            least = 0.0 if what == "final loss" else 1 / test_images
            allowed = max(quantile(len(runs)) * standard_error(*values), least)
            add("c", what, means, f"eager +- {allowed:.2g}", abs(means[1] - means[0]) <= allowed + 1e-12)
    return found


def standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    return math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))


def quantile(seeds: int) -> float:
    """The limit, in standard errors, that none of DIFFERENCES exceeds in 19 of 20 cases, by Bonferroni."""
    from scipy.stats import t

    return float(t.ppf(1 - 0.05 / DIFFERENCES / 2, 2 * seeds - 2))


def apart(run: Run, way: str) -> int | None:
    """The first measured step, from 1, after which the way's parameters are at least APART from float64's."""
    far = zip(run["looks"], run["ways"][way]["distances"]["parameters"], strict=True)
    return next((step + 1 for step, distance in far if distance >= APART), None)


def document(
    runs: Mapping[str, Sequence[Run]], settings: Mapping[str, Run], where: Run, test_images: int = 360
) -> dict[str, Any]:
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
    """Return the data of a result. Raises ValueError saying what is wrong with them."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA_NAME:
        raise ValueError(f"not a result of convergence.py: expected the key 'schema' to be {SCHEMA_NAME!r}")
    validate(data, SCHEMA)
    return data


# ---- text ------------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "a": "One step from the same state: the error against float64",
    "b": "Whole runs: the distance to float64's run",
    "c": "The result, means over the seeds",
}


def text(data: dict[str, Any]) -> list[str]:
    return [
        f"{'ok    ' if v['passed'] else 'FAILED'} {v['network']:<15} {v['dtype']}  ({v['question']}) {v['what']:<39}"
        f" eager {v['eager']:.3g}, swapped {v['swapped']:.3g}; limit {v['limit']}"
        for v in data["verdicts"]
    ]


def markdown(data: dict[str, Any]) -> str:
    lines = pages.heading("Training: swapped against eager", data["environment"])
    for name, one in data["settings"].items():
        lines.append(
            f"- {name}: scikit-learn's digits at {one['size']}x{one['size']}, {one['steps']} steps of SGD, batch "
            f"{one['batch']}, momentum {one['momentum']}, highest learning rate {one['lr']}, "
            f"{len(data['runs'][name])} seeds"
        )
    lines += ["", "Questions and limits are at the top of `benchmarks/convergence.py`. bf16 is autocast.", ""]
    for question, title in QUESTIONS.items():
        rows = []
        for v in data["verdicts"]:
            if v["question"] == question:
                ratio = f"{v['swapped'] / v['eager']:.2f}" if v["eager"] else ""
                cells = (f"{v['eager']:.4g}", f"{v['swapped']:.4g}", ratio, v["limit"])
                rows.append((v["network"], v["dtype"], v["what"], *cells, "passed" if v["passed"] else "FAILED"))
        header = ("network", "dtype", "", "eager", "swapped", "ratio", "limit", "")
        lines += [f"## {title}", "", *markdown_table(header, rows), ""]
    rows = [
        (name, *(", ".join(str(step or "never") for step in steps) for steps in ways.values()))
        for name, ways in data["apart"].items()
    ]
    lines += [f"## The step at which a run's parameters are {APART:g} from float64's, seed by seed", ""]
    lines += [*markdown_table(("network", *next(iter(data["apart"].values()))), rows), "", "## Seed by seed", ""]
    rows, sizes, formats = [], [], {"final loss": (".4f", "+.4f"), "held-out accuracy": (".2%", "+.2%")}
    for name, runs in data["runs"].items():
        for dtype in DTYPES:
            columns = []
            for what, (value, difference) in formats.items():
                eager, swapped = outcomes(runs, dtype, what)
                columns.append(
                    [f"{e:{value}}, {s:{value}}, {s - e:{difference}}" for e, s in zip(eager, swapped, strict=True)]
                )
                error = standard_error(swapped, eager)
                sizes.append(abs(statistics.fmean(swapped) - statistics.fmean(eager)) / error if error else 0.0)
            rows += [(name, dtype, str(run["seed"]), *cells) for run, *cells in zip(runs, *columns, strict=True)]
    lines += [
        f"The differences of the means, in standard errors of the difference: {', '.join(f'{x:.1f}' for x in sizes)}; "
        f"{quantile(len(runs)):.1f} are allowed.",
        "",
    ]
    header = ("network", "dtype", "seed", *(f"{what}: eager, swapped, difference" for what in formats))
    return "\n".join([*lines, *markdown_table(header, rows), ""])


# ---- picture ---------------------------------------------------------------------------------------------------------

STYLES = {  # eager wide and pale, swapped thin and dark on top of it: they should coincide
    "float64": {"color": "#33383d", "linewidth": 1.0, "linestyle": ":"},
    "eager fp32": {"color": "#a9cdea", "linewidth": 4.5},
    "swapped fp32": {"color": "#14568c", "linewidth": 1.3},
    "eager bf16": {"color": "#f3d0a0", "linewidth": 4.5},
    "swapped bf16": {"color": "#b5651d", "linewidth": 1.3},
}
SMOOTH = 9  # steps


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of the SMOOTH steps around each, of fewer at the ends."""
    half = SMOOTH // 2
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the PNG: for each network the loss, the runs' distance from float64 and the error of one step.

    Raises MissingExtra where matplotlib is not installed, OutputError where `path` cannot be written.
    """
    figure = new_figure(15, 1.1 + 3.9 * len(data["runs"]), dpi=110)
    grid = figure.subplots(len(data["runs"]), 3, squeeze=False)
    apart = "relative L2 distance to float64"
    panels = (  # title, y axis, and where a way's values are
        ("training loss, {seeds} seeds, {smooth}-step mean", "cross-entropy", ("loss",)),
        ("Whole runs: the parameters' distance to float64", apart, ("distances", "parameters")),
        ("One step from the same state: the gradient's error", apart, ("errors", "gradients")),
    )
    for row, (name, runs) in zip(grid, data["runs"].items(), strict=True):
        looks = [step + 1 for step in runs[0]["looks"]]
        for axes, (title, label, keys) in zip(row, panels, strict=True):
            title = title.format(seeds=len(runs), smooth=SMOOTH)
            style(axes, f"{name}: {title}" if keys == ("loss",) else title)
            axes.set_yscale("log")
            axes.set_xlabel("step", fontsize=9)
            axes.set_ylabel(label, fontsize=9)
            axes.tick_params(labelsize=8)
            for way, look in STYLES.items():
                if keys == ("loss",):
                    losses = zip(*(run["ways"][way]["loss"] for run in runs), strict=True)
                    values = smoothed([statistics.fmean(at) for at in losses])
                    axes.plot(range(1, len(values) + 1), values, **look, label=way)
                elif way != "float64":
                    series = zip(*(run["ways"][way][keys[0]][keys[1]] for run in runs), strict=True)
                    axes.plot(looks, [statistics.median(at) for at in series], **look)
        row[1].set_xscale("log")  # the first steps matter
        row[1].xaxis.set_major_formatter("{x:g}")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    labels[0] = "float64 (loss only)"
    figure.legend(handles, labels, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9.5)
    passed = sum(verdict["passed"] for verdict in data["verdicts"])
    title = (
        "Training with swapped blocks against eager, same weights, same batches; distances are medians over the seeds\n"
        f"{passed} of {len(data['verdicts'])} bounds hold; {pages.machine(data['environment'])}, "
        f"{data['environment']['time'][:10]}"
    )
    figure.suptitle(title, x=0.005, ha="left", fontsize=11)
    save_png(figure, path)


def write(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write JSON, Markdown and, where matplotlib is installed, the PNG; their paths."""
    check(data)
    return pages.write_result(folder / f"convergence-cpu-torch{pages.torch_version()}", data, markdown(data), draw)[0]
