"""Time configurations of the Triton kernels on this GPU and write tuned.json, entry by entry.

    compile   other processes run each candidate once: it must fit, spill nothing and agree with the shipped one
    time      an entry's candidates and its shipped configuration, as CUDA graphs, in interleaved rounds with the L2
              cache flushed, at up to two shapes that use the entry
    choose    the candidate with the best geometric mean over the shapes, if that is at least 1.02x and nowhere below
              0.97x

Two thirds of the time go to compiling. Entries that are not reached are not in the file and keep their configuration.

    python -m gpu_run.tune --out tuned.json --seconds 90
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
from fastres.kernels import configs, measured

from fastres.lab.timing import interleave, paired_ratio
from gpu_run import problems
from gpu_run.problems import Entry, Problem
from gpu_run.program import Program, cold_timer, memory, workers
from measure import cuda_graph, one_line

COMPILING = 0.65  # of the time
PROBLEMS = 2  # per entry
ROUNDS = 11
GAIN, LOSS = 1.02, 0.97
FAULTS = re.compile(r"illegal (memory access|instruction)|misaligned address|unspecified launch failure")
# Kernels that move data: with more registers an SM holds too few threads (tests/kernels/test_triton_compile.py).
REGISTERS = 128


def plan(device: torch.device, chosen: list[Problem]) -> dict[Entry, list[Problem]]:
    """The entries of the table that the problems use, the most important first, each with its first few problems."""
    arch = problems.known_architecture(device)
    found: dict[Entry, list[Problem]] = {}
    for problem in chosen:
        for kernel, shape_class in problems.entries_of(problem, arch):
            users = found.setdefault((kernel, arch, shape_class), [])
            if problem not in users and len(users) < PROBLEMS:
                users.append(problem)
    return dict(sorted(found.items(), key=lambda item: problems.rank(item[0][0], item[0][2])))


@contextmanager
def launched() -> Iterator[list[Any]]:
    """Collect the compiled kernels that Triton launches in the block; none in its interpreter."""
    from triton.runtime.jit import JITFunction

    real, found = JITFunction.run, []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(real(self, *args, **kwargs))
        return found[-1]

    with patch.object(JITFunction, "run", run):
        yield found


def attempt(entry: Entry, config: Any, chosen: list[Problem], device: torch.device) -> tuple[str, str] | None:
    """Run a candidate once at each problem. None if it is usable, else ("refused" | "wrong", why)."""
    for problem in chosen:
        call, said = problem.make(device), f"{entry[0]} {entry[2]}, {asdict(config)}, {problem.to_dict()}"
        shipped = tuple(t.clone() for t in call())
        try:
            with problems.configured(entry, config), launched() as kernels:
                ours = call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception as error:  # out of registers or shared memory, a size that the compiler has no layout for
            why = one_line(error)[:140]
            return ("wrong", f"{said}: {why}") if FAULTS.search(str(error)) else ("refused", why)
        own = [kernel for kernel in kernels if getattr(kernel, "name", "") == entry[0]]
        if any(kernel.n_spills for kernel in own):
            return "refused", f"spills {max(kernel.n_spills for kernel in own)} bytes"
        if any(kernel.n_regs > REGISTERS for kernel in own) and not isinstance(config, configs.GemmConfig):
            return "refused", f"{max(kernel.n_regs for kernel in own)} registers"
        why = problems.differs(ours, shipped)
        if why is not None:
            return "wrong", f"{said}: {why}"
    return None


Attempts = dict[Entry, dict[Any, Any]]  # entry -> candidate -> None where it is usable, else (kind, why)


def compile_all(entries: dict[Entry, list[Problem]], device: torch.device, until: float, tiny: bool) -> Attempts:
    """Attempt every candidate until the time is over; the result has only those finished by then."""
    pool = workers(device)
    futures: dict[Entry, dict[Any, Future[Any]]] = {}
    try:
        for entry, chosen in entries.items():
            options = problems.candidates(shipped_config(entry))[: 1 if tiny else None]
            futures[entry] = {config: pool.submit(attempt, entry, config, chosen, device) for config in options}
        found: Attempts = {entry: {} for entry in entries}
        for entry, tried in futures.items():
            for config, future in tried.items():
                try:
                    found[entry][config] = future.result(timeout=max(until - time.monotonic(), 0))
                except (TimeoutError, CancelledError):
                    future.cancel()
                except Exception as error:  # the process died, most likely of a fault on the GPU
                    found[entry][config] = "refused", one_line(error)[:140]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found


def shipped_config(entry: Entry) -> Any:
    kernel, arch, shape_class = entry
    return configs.TABLE[kernel, arch][shape_class]


def timed(entry: Entry, options: list[Any], problem: Problem, device: torch.device, rounds: int) -> list[list[float]]:
    """The seconds of each configuration at one problem, round by round."""
    call = problem.make(device)

    def configured_call(config: Any) -> Callable[[], Any]:
        def run() -> Any:
            with problems.configured(entry, config):
                return call()

        run()  # before a capture
        return cuda_graph(run, device)

    samples = interleave({str(i): configured_call(c) for i, c in enumerate(options)}, rounds, timer=cold_timer(device))
    return list(samples.values())


def choose(samples: list[list[list[float]]]) -> tuple[int, float]:
    """The index of the configuration to use, and its speed-up over the shipped one, which is number 0.

    `samples[p][c]` are the seconds of configuration c at problem p.
    """
    best, speedup = 0, 1.0
    for c in range(1, len(samples[0])):
        ratios = [paired_ratio(of_problem[0], of_problem[c]).median for of_problem in samples]
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
        if mean >= max(GAIN, speedup) and min(ratios) >= LOSS:
            best, speedup = c, mean
    return best, speedup


def tune(program: Program, save: Callable[[list[dict[str, Any]], int, list[str]], None]) -> None:
    """Call `save(entries so far, planned, wrong)` after each entry."""
    device, tiny = program.device, program.dry_run
    chosen = problems.tiny_problems() if tiny else problems.problems(batch_for(device))
    entries = plan(device, chosen)
    attempts = compile_all(entries, device, program.started + COMPILING * program.seconds, tiny)
    outcomes = [outcome for tried in attempts.values() for outcome in tried.values() if outcome is not None]
    wrong = [why for kind, why in outcomes if kind == "wrong"]
    done: list[dict[str, Any]] = []
    save(done, len(entries), wrong)
    for entry, chosen in entries.items():
        if time.monotonic() > program.end:
            break
        right = [config for config, outcome in attempts[entry].items() if outcome is None]
        if not right:
            continue
        options = [shipped_config(entry), *right]
        samples = [timed(entry, options, problem, device, 2 if tiny else ROUNDS) for problem in chosen]
        best, speedup = choose(samples)
        refused = [outcome[1] for outcome in attempts[entry].values() if outcome is not None]
        at = [
            problem.to_dict() | {"seconds": [statistics.median(option) for option in at_problem]}
            for problem, at_problem in zip(chosen, samples, strict=True)
        ]
        done.append(
            dict(zip(("kernel", "arch", "shape_class"), entry, strict=True))
            | {"config": asdict(options[best]), "speedup": speedup, "refused": refused, "problems": at}
            | {"options": [asdict(option) for option in options]}  # the shipped one first
        )
        save(done, len(entries), wrong)


def batch_for(device: torch.device) -> int:
    """A batch that makes every tensor several times as large as the L2 cache, where the memory allows it."""
    return 128 if memory(device) >= 40 << 30 else 32


def main(arguments: Sequence[str] | None = None) -> int:
    program = Program("tune", __doc__, arguments)
    arch, why_not = problems.known_architecture(program.device), None
    if arch not in configs.ARCHITECTURES:
        why_not = f"the table has no entries for sm_{arch}; this GPU uses those of an older one"

    def save(entries: list[dict[str, Any]], planned: int, wrong: list[str]) -> None:
        data = {"why_not": why_not, "planned": planned, "wrong": wrong, "entries": entries}
        program.save(measured.SCHEMA, measured.VERSION, **data)

    if why_not is not None:
        save([], 0, [])
    else:
        tune(program, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
