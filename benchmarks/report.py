"""The results of a benchmark session: one JSON with every sample, a Markdown table, a plot, and what is printed.

pages.py defines the JSON. A loss is a row like any other.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import pages
from fastres.lab.results import environment
from measure import Effort, Result
from pages import SCHEMA_NAME, SCHEMA_VERSION, aligned, markdown_table, validate
from plot import draw
from roofline import Rates, bound
from shapes import BLOCK_END

EVERYTHING = ("add_relu", "blocks", "bn_act", "conv_act", "import", "networks", "overhead", "train")
ENVIRONMENT = tuple("FASTRES_ OMP_ MKL_ KMP_ GOMP_ TORCH PYTORCH_ TRITON_ CUDA_ MALLOC_ LD_PRELOAD".split())

# ---- data ------------------------------------------------------------------------------------------------------------


def document(
    results: Sequence[Result], device: torch.device, effort: Effort, peers: str, rates: Rates
) -> dict[str, Any]:
    """The data of a session's result file."""
    where = environment(device, " ".join(["pytest", *sys.argv[1:]]))
    where["environment"] = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)}
    where["cpu"]["flags"] = _cpu_flags()
    where["load"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    cases = [case_data(result, rates) for result in results]
    settings = {"budget_s": effort.budget_s, "rounds": effort.rounds, "peers": peers}
    settings |= {"bandwidth_bytes_per_s": rates.bandwidth, "flops_per_s": rates.flops}
    head = {"schema": SCHEMA_NAME, "schema_version": SCHEMA_VERSION, "environment": where, "settings": settings}
    return head | {"cases": cases, "bars": bars(cases)}


def case_data(result: Result, rates: Rates) -> dict[str, Any]:
    case, works = result.case, result.case.work()
    facts = case.facts()
    moved, flops = sum(work.bytes for work in works), sum(work.flops for work in works)
    rate = rates.flops.get(facts["dtype"] or "")
    known = bool(works) and (rate is not None or not flops)
    least = bound(works, rates.bandwidth, rate or 1.0) if known else None
    totals = {"bytes_moved": moved or None, "flops": flops or None, "bound_s": least}

    def peer(name: str) -> dict[str, Any]:
        seconds, images, verdict = result.seconds(name), case.images(), result.verdicts.get(name)
        calls = [sample / result.iterations for sample in result.samples[name]]
        q1, _, q3 = statistics.quantiles(calls, n=4, method="inclusive") if len(calls) > 1 else calls * 3
        others = [n for n in result.samples if n != name and n not in case.ours + case.alone and name not in case.alone]
        return {
            "samples": result.samples[name],
            "median": seconds,
            "q1": q1,
            "q3": q3,
            "bytes_per_s": moved / seconds if moved else None,
            "of_bandwidth": moved / seconds / rates.bandwidth if moved else None,
            "flops_per_s": flops / seconds if flops else None,
            "of_bound": least / seconds if least else None,
            "images_per_s": images / seconds if images else None,
            "peak_bytes": result.memory.get(name),
            "verdict": verdict.to_dict() if verdict else None,
            "speedup": {other: result.speedup(name, other).to_dict() for other in others},
        }

    return {
        "id": case.id,
        "what": case.what,
        "mode": case.mode,
        **facts,
        "backend": result.backend,
        "threads": case.threads or torch.get_num_threads(),
        "iterations": result.iterations,
        "rounds": len(next(iter(result.samples.values()))),
        **totals,
        "baseline": result.baseline,
        "ours": list(case.ours),
        "peers": {name: peer(name) for name in result.samples},
        "left_out": result.left_out,
    }


def bars(cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The project's own goals with what was measured; they are reported, and never fail a run."""
    cases, found = list(cases), []

    def bar(name: str, aim: str, measured: str, value: float, n: int) -> None:
        found.append({"name": name, "aim": aim, "measured": measured, "value": value, "n": n})

    def share(name: str, aim: str, ratios: list[float], least: float) -> None:
        if ratios:
            good, n = sum(ratio >= least for ratio in ratios), len(ratios)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"
            bar(name, aim, f"{good} of {n} at {least}x or more ({spread})", good / n, n)

    residual = [c for c in cases if c["what"] == "bn_act" and c["mode"].startswith("training") and c["dtype"] == "fp32"]
    residual = [c for c in residual if c["form"] == "residual-relu" and c["backend"] != "reference"]
    aim = "1.3x eager at 80 % of the shapes"
    for layout in ("channels_last", "nchw"):
        here = [c for c in residual if c["layout"] == layout]
        ends = [_headline(c) for c in here if c["role"] == BLOCK_END]
        share(f"bn_act + residual, forward+backward, {layout}: every shape", aim, [_headline(c) for c in here], 1.3)
        share(f"bn_act + residual, forward+backward, {layout}: block ends", aim, ends, 1.3)
    chosen = [_headline(c) for c in cases if c["what"] in ("bn_act", "add_relu", "conv_act")]
    share("operators, every case", "0.97x eager or more everywhere", chosen, 0.97)
    for case in (c for c in cases if c["what"] == "train"):
        best, over, ratio = ours_over(case, case["baseline"])
        measured = f"{best} {_interval(ratio)} over {over}"
        aim = "1.05x the faster eager, never below 0.97x"
        bar(f"training step, {case['network']}, {case['dtype']}", aim, measured, ratio["median"], ratio["n"])
    for case in (c for c in cases if c["what"] == "networks"):
        name, other, ratio = ours_over(case)
        what = f"inference, {case['network']}, {case['dtype']}, batch {case['shape'][0]}"
        measured = f"{name} {_interval(ratio)} over {other}, the fastest other"
        bar(what, "faster than every other engine", measured, ratio["median"], ratio["n"])
    for case in (c for c in cases if c["what"] == "import"):
        beyond = case["peers"]["fastres_beyond_torch"]
        measured = f"{1e3 * beyond['median']:.0f} ms ({1e3 * beyond['q1']:.0f} to {1e3 * beyond['q3']:.0f})"
        bar("import fastres beyond import torch", "under 100 ms", measured, beyond["median"], case["rounds"])
    return found


def best_of_ours(case: dict[str, Any]) -> str:
    return min(case["ours"], key=lambda name: case["peers"][name]["median"])


def _headline(case: dict[str, Any]) -> float:
    return max(float(case["peers"][name]["speedup"][case["baseline"]]["median"]) for name in case["ours"])


def ours_over(case: dict[str, Any], other: str | None = None) -> tuple[str, str, dict[str, Any]]:
    """The fastest of ours, the other peer (by default the fastest of the others), and the speed-up of ours over it."""
    best, peers = best_of_ours(case), case["peers"]
    other = other or min(peers[best]["speedup"], key=lambda name: peers[name]["median"])
    return best, other, peers[best]["speedup"][other]


def _cpu_flags() -> list[str]:
    """This CPU's vector instructions, by Linux's names."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    except OSError:  # not Linux: the environment's "isa" says what torch uses
        return []
    return sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c", "sse4", "vnni")))


# ---- text ------------------------------------------------------------------------------------------------------------

COLUMNS = ("case", "peer", "time", "IQR", "speed-up over", "95 % interval", "fastres over it", "rate", "answers")


def rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per peer of every case, in the order of COLUMNS; a baseline's row has no speed-up."""
    table: list[tuple[str, ...]] = []
    for case in data["cases"]:
        title, ours = f"{case['what']} {case['id']}", case["peers"][best_of_ours(case)]["speedup"]
        for name, peer in case["peers"].items():
            ratio, speedup, interval = peer["speedup"].get(case["baseline"]), "", ""
            if ratio is not None:
                speedup = f"{ratio['median']:.2f}x {case['baseline']}"
                interval = f"{ratio['low']:.2f}-{ratio['high']:.2f}" + ("" if ratio["coverage"] >= 0.95 else " (range)")
            over = _interval(ours[name]) if name in ours else ""
            median, low, high = (_seconds(peer[q]) for q in ("median", "q1", "q3"))
            table.append((title, name, median, f"{low}-{high}", speedup, interval, over, _rate(peer), _answers(peer)))
        table += [(title, name, "absent", *[""] * 5, reason) for name, reason in case["left_out"].items()]
    return table


def _answers(peer: dict[str, Any]) -> str:
    verdict = peer["verdict"]
    if verdict is None:
        return ""
    ratio = "" if verdict["error_ratio"] is None else f" {verdict['error_ratio']:.2f}"
    return (f"ok{ratio}" if verdict["passed"] else f"WRONG {verdict['message']}").strip()


def _rate(peer: dict[str, Any]) -> str:
    """images/s, TFLOP/s and GB/s, the share of the roofline's bound, and peak memory, each where it is known."""
    formats = {
        "images_per_s": lambda value: f"{value:.4g} images/s",
        "flops_per_s": lambda value: f"{value / 1e12:.3g} TFLOP/s",
        "bytes_per_s": lambda value: f"{value / 1e9:.3g} GB/s",
        "of_bound": lambda value: f"{100 * value:.0f} %",
        "peak_bytes": lambda value: f"{value / 1e6:.0f} MB",
    }
    return ", ".join(text(peer[key]) for key, text in formats.items() if peer[key] is not None)


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _interval(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _rates(data: dict[str, Any]) -> str:
    """The rates measured in the session, as they follow the machine's name."""
    bandwidth = data["settings"]["bandwidth_bytes_per_s"] / 1e9
    flops = "".join(f", {rate / 1e12:.3g} TFLOP/s {name}" for name, rate in data["settings"]["flops_per_s"].items())
    return f", measured here {bandwidth:.3g} GB/s{flops}"


def machine(data: dict[str, Any]) -> str:
    """The machine, its rates and the versions in one line."""
    return pages.machine(data["environment"], _rates(data))


def lines(data: dict[str, Any]) -> list[str]:
    """The table for a terminal, then the bars. The baselines' rows and the IQR are only in the files."""
    baselines = {(f"{case['what']} {case['id']}", case["baseline"]) for case in data["cases"]}
    shown = [row for row in rows(data) if row[:2] not in baselines]
    table = [row[:3] + row[4:] for row in (COLUMNS, *shown)]
    return [*aligned(table), "", *aligned([("bar", "aim", "measured"), *_bar_rows(data)])]


def _bar_rows(data: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(bar["name"], bar["aim"], bar["measured"]) for bar in data["bars"]]


def markdown(data: dict[str, Any]) -> str:
    """The whole session as a Markdown page."""
    return "\n".join(
        [
            *pages.heading("Benchmarks", data["environment"], _rates(data)),
            "Times are medians of interleaved rounds, speed-ups medians of the paired ratios with their 95 % interval.",
            "GB/s and TFLOP/s count what the fused kernels have to move and compute; % is of the roofline's bound at",
            "the bandwidth and the matmul rate measured in this session (data in cache exceeds it). Answers: the error",
            "against float64 over eager's, at most 2.",
            "",
            *markdown_table(("bar", "aim", "measured"), _bar_rows(data)),
            "",
            *markdown_table(COLUMNS, rows(data)),
            "",
        ]
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def stem(data: dict[str, Any], complete: bool) -> str:
    """`<what>-<device>-torch<version>`: "all" for the whole suite, else the parts that ran, "-part" for a selection."""
    what = sorted({case["what"] for case in data["cases"]})
    name = "all" if tuple(what) == EVERYTHING else "+".join(what)
    device = data["environment"]["gpu"]["name"].replace(" ", "_") if data["environment"]["gpu"] else "cpu"
    return f"{name}{'' if complete else '-part'}-{device}-torch{pages.torch_version()}"


def write(data: dict[str, Any], folder: Path, complete: bool) -> tuple[list[Path], str | None]:
    """Write the session's files; their paths, and the reason why there is no plot."""
    validate(data)
    return pages.write_result(folder / stem(data, complete), data, markdown(data), draw)
