"""Times configurations of the Triton kernels on this GPU and writes tuned.json, entry by entry.

    compile   other processes run each candidate once: it fits, spills nothing and gives the shipped one's answers
    time      every candidate of an entry and the shipped configuration, as CUDA graphs, in interleaved rounds with the
              L2 cache flushed, at up to two shapes that use the entry
    choose    the candidate with the best geometric mean over the shapes, if that is 1.02x or more, and nowhere below
              0.97x

Two thirds of the time are for compiling. What is not reached is not in the file: the shipped entry stays.

    python -m gpu_run.tune --out tuned.json --seconds 90
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from fastres.kernels import configs, measured

from fastres.lab.results import environment, write_json
from fastres.lab.timing import interleave, paired_ratio
from gpu_run import files
from gpu_run.clock import cold_timer, graphed, state
from gpu_run.problems import (
    Entry,
    Problem,
    candidates,
    configured,
    differs,
    entries_of,
    known_architecture,
    problems,
    rank,
    tiny_problems,
)

COMPILING = 0.65  # of the time
PROBLEMS = 2  # of an entry
WORKER_GIB = 5  # of GPU memory, at the most
ROUNDS = 11
GAIN, LOSS = 1.02, 0.97
FAULTS = re.compile(r"illegal (memory access|instruction)|misaligned address|unspecified launch failure")
REGISTERS = (
    128  # of kernels that move data: with more, an SM holds too few threads (tests/kernels/test_triton_compile.py)
)


def plan(device: torch.device, chosen: list[Problem]) -> dict[Entry, list[Problem]]:
    """Each entry of the table that the problems use, with the first few of them; the most important first."""
    arch = known_architecture(device)
    found: dict[Entry, list[Problem]] = {}
    for problem in chosen:
        for kernel, shape_class in entries_of(problem, arch):
            users = found.setdefault((kernel, arch, shape_class), [])
            if problem not in users and len(users) < PROBLEMS:
                users.append(problem)
    return dict(sorted(found.items(), key=lambda item: rank(item[0][0], item[0][2])))


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels that Triton launches inside; none in its interpreter."""
    from triton.runtime.jit import JITFunction

    real, found = JITFunction.run, []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = real(self, *args, **kwargs)
        found.append(kernel)
        return kernel

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = real


def attempt(entry: Entry, config: Any, chosen: list[Problem], device: torch.device) -> tuple[str, str] | None:
    """Runs a candidate once at each problem: None, or ("refused" | "wrong", why)."""
    for problem in chosen:
        call, said = problem.make(device), f"{entry[0]} {entry[2]}, {asdict(config)}, {problem.to_dict()}"
        shipped = tuple(t.clone() for t in call())
        try:
            with configured(entry, config), launched() as kernels:
                ours = call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception as error:  # out of registers or shared memory, a size that the compiler has no layout for
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            return ("wrong", f"{said}: {why}") if FAULTS.search(str(error)) else ("refused", why)
        own = [kernel for kernel in kernels if getattr(kernel, "name", "") == entry[0]]
        if any(kernel.n_spills for kernel in own):
            return "refused", f"spills {max(kernel.n_spills for kernel in own)} bytes"
        if any(kernel.n_regs > REGISTERS for kernel in own) and not isinstance(config, configs.GemmConfig):
            return "refused", f"{max(kernel.n_regs for kernel in own)} registers"
        why = differs(ours, shipped)
        if why is not None:
            return "wrong", f"{said}: {why}"
    return None


LATE = object()
Attempts = dict[Entry, dict[Any, Any]]  # None: it can be used; else (kind, why)


def compile_all(entries: dict[Entry, list[Problem]], device: torch.device, until: float, tiny: bool) -> Attempts:
    """Attempts every candidate until the time is over; what was not begun by then is not in the result."""
    found: Attempts = {entry: {} for entry in entries}
    options = {entry: candidates(shipped_config(entry)) for entry in entries}
    if tiny:
        options = {entry: configurations[:1] for entry, configurations in options.items()}
    workers = 1 if tiny else max(1, min((os.cpu_count() or 2) - 2, memory(device) // (WORKER_GIB << 30)))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for entry, chosen in entries.items():
            found[entry] = {config: pool.submit(attempt, entry, config, chosen, device) for config in options[entry]}
        for tried in found.values():
            for config, future in list(tried.items()):
                tried[config] = _result(future, until)
                if tried[config] is LATE:
                    del tried[config]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found


def _result(future: Any, until: float) -> Any:
    """What the attempt came to; LATE where it is not over in time."""
    left = until - time.monotonic()
    if left <= 0 and not future.done():
        future.cancel()
        return LATE
    try:
        return future.result(timeout=max(left, 0))
    except TimeoutError:
        future.cancel()
        return LATE
    except Exception as error:  # the process died: of a fault on the GPU, most likely
        return "refused", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def shipped_config(entry: Entry) -> Any:
    kernel, arch, shape_class = entry
    return configs.TABLE[kernel, arch][shape_class]


def timed(entry: Entry, options: list[Any], problem: Problem, device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds, round by round, of each configuration at one problem."""
    call = problem.make(device)
    calls = {}
    for i, config in enumerate(options):
        if device.type == "cuda":
            with configured(entry, config):
                call()
                calls[str(i)] = graphed(call, device)
        else:
            calls[str(i)] = _inside(entry, config, call)
    samples = interleave(calls, rounds, timer=cold_timer(device))
    return [samples[str(i)] for i in range(len(options))]


def _inside(entry: Entry, config: Any, call: Any) -> Any:
    def run() -> None:
        with configured(entry, config):
            call()

    return run


def choose(samples: list[list[list[float]]]) -> tuple[int, float]:
    """(index of the configuration to take, its speed-up over the shipped one, which is number 0).

    `samples[p][c]` are the seconds of configuration c at problem p.
    """
    best, speedup = 0, 1.0
    for c in range(1, len(samples[0])):
        ratios = [paired_ratio(of_problem[0], of_problem[c]).median for of_problem in samples]
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
        if mean >= max(GAIN, speedup) and min(ratios) >= LOSS:
            best, speedup = c, mean
    return best, speedup


def tune(device: torch.device, end: float, tiny: bool, save: Any) -> None:
    """Calls `save(entries so far, planned, wrong)` after each entry."""
    begun = time.monotonic()
    chosen = tiny_problems() if tiny else problems(batch_for(device))
    entries = plan(device, chosen)
    planned = len(entries)
    attempts = compile_all(entries, device, begun + COMPILING * (end - begun), tiny)
    outcomes = [outcome for tried in attempts.values() for outcome in tried.values() if outcome is not None]
    wrong = [why for kind, why in outcomes if kind == "wrong"]
    done: list[dict[str, Any]] = []
    save(done, planned, wrong)
    for entry, chosen in entries.items():
        if time.monotonic() > end:
            break
        right = [config for config, outcome in attempts[entry].items() if outcome is None]
        if not right:
            continue
        options = [shipped_config(entry), *right]
        samples = [timed(entry, options, problem, device, 2 if tiny else ROUNDS) for problem in chosen]
        best, speedup = choose(samples)
        kernel, arch, shape_class = entry
        done.append(
            {
                "kernel": kernel,
                "arch": arch,
                "shape_class": shape_class,
                "config": asdict(options[best]),
                "speedup": speedup,
                "options": [asdict(option) for option in options],  # the shipped one first
                "refused": [outcome[1] for outcome in attempts[entry].values() if outcome is not None],
                "problems": [
                    problem.to_dict() | {"seconds": [statistics.median(option) for option in at_problem]}
                    for problem, at_problem in zip(chosen, samples, strict=True)
                ],
            }
        )
        save(done, planned, wrong)


def batch_for(device: torch.device) -> int:
    """As large as the GPU's memory makes sensible: several times the L2 cache in every tensor."""
    return 128 if memory(device) >= 40 << 30 else 32


def memory(device: torch.device) -> int:
    """Bytes of the GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def main(arguments: Sequence[str] | None = None) -> int:
    options = files.program_options("tune", __doc__, arguments)
    end = time.monotonic() + options.seconds
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    about = environment(device, " ".join(["gpu_run.tune", *sys.argv[1:]]))
    arch = known_architecture(device)
    why_not = None
    if arch not in configs.ARCHITECTURES:
        why_not = f"the table has no entries of its own for sm_{arch}; this GPU takes those of an older one"

    def save(entries: list[dict[str, Any]], planned: int, wrong: list[str]) -> None:
        data = {
            "schema": measured.SCHEMA,
            "schema_version": measured.VERSION,
            "dry_run": options.dry_run,
            "environment": about | {"clocks": state()},
            "why_not": why_not,
            "planned": planned,
            "wrong": wrong,
            "entries": entries,
        }
        write_json(options.out, data)

    if why_not is not None:
        save([], 0, [])
    else:
        tune(device, end, options.dry_run, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
