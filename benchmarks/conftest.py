"""Benchmarks under pytest-benchmark: a case's peers share one of its tables and are timed in interleaved rounds.

The first test of a case judges and times all of its peers; each test then passes its own samples to pytest-benchmark
through a replaying timer. At the end the results of the session are printed and written (see report.py).

    pytest benchmarks/                                  15 to 20 minutes on two cores
    pytest benchmarks/bench_networks.py -k "resnet50 and fp32"
    pytest benchmarks/bench_bn_act.py -k "train and residual"
    pytest benchmarks/ --budget tiny --peers eager      checks that everything runs
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import roofline
from fastres.lab.devices import pick_device
from fastres.lab.errors import DeviceError, OutputError
from fastres.lab.results import prepare_folder
from measure import JUDGE_ONLY, TINY, Effort, Replay, Result, measure, one_line
from peers import DTYPES, LEVELS
from report import document, lines, machine, write

REPLAY = Replay()
RESULTS = pytest.StashKey[dict]()  # case id -> Result, or the exception that its measurement raised
COLUMNS = ["median", "iqr", "min", "max", "rounds", "iterations"]


def _positive(kind):
    """A parser of positive numbers, for an option."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError(text)
        return value

    return parse


def pytest_addoption(parser):
    group = parser.getgroup("fastres benchmarks")
    group.addoption(
        "--budget",
        type=lambda text: text if text == "tiny" else _positive(float)(text),
        default=1.5,
        metavar="SECONDS",
        help="timed seconds per operator case, all peers together; blocks get 2x, networks 5x, training steps 40x "
        "(default 1.5); 'tiny' calls everything twice and says nothing about speed",
    )
    group.addoption(
        "--rounds", type=_positive(int), default=25, metavar="N", help="rounds per case at most (default 25)"
    )
    group.addoption(
        "--peers",
        choices=LEVELS,
        default="quick",
        help="what to compare with: eager only; quick, also every engine installed, and torch.compile at a few shapes "
        "and one network (default); all, torch.compile everywhere, which takes minutes per network",
    )
    group.addoption("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group.addoption(
        "--results", type=Path, default=Path("out/bench"), metavar="DIR", help="output folder (default out/bench)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[RESULTS] = {}
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = COLUMNS
    if config.option.collectonly:
        return
    try:
        _device(config)
        prepare_folder(config.option.results, [])
    except (DeviceError, OutputError) as error:
        raise pytest.UsageError(str(error)) from error


def _device(config) -> torch.device:
    return pick_device(config.option.device)


def _effort(config) -> Effort:
    budget = config.option.budget
    return TINY if budget == "tiny" else Effort(budget, config.option.rounds, min(6, config.option.rounds))


def pytest_report_header(config):
    option = config.option
    where = f"device {_device(config)}, {torch.get_num_threads()} threads"
    return f"fastres: {where}, budget {option.budget} s a case, peers {option.peers}, results in {option.results}"


def pytest_generate_tests(metafunc):
    if {"case", "peer"} <= set(metafunc.fixturenames):
        level = metafunc.config.option.peers
        rows = []
        for case in metafunc.module.CASES:
            mark = pytest.mark.benchmark(timer=REPLAY, group=case.title)
            rows += [pytest.param(case.id, peer, id=f"{case.id}-{peer}", marks=mark) for peer in case.peers(level)]
        metafunc.parametrize(("case", "peer"), rows)


@pytest.fixture
def run_peer(benchmark, request, pytestconfig):
    """Report one peer of a case in the module's CASES. The first test of a case measures all of its peers."""
    results = pytestconfig.stash[RESULTS]

    def run(name, peer):
        case = next(case for case in request.module.CASES if case.id == name)
        key, level = case.title, pytestconfig.option.peers
        if key not in results:
            effort = _effort(pytestconfig) if benchmark.enabled else JUDGE_ONLY
            try:
                results[key] = measure(case, _device(pytestconfig), effort, case.peers(level))
                results[key].left_out.update(case.absent(level))
            except Exception as error:
                results[key] = error
                raise
        result = results[key]
        if isinstance(result, Exception):
            pytest.fail(f"{key} could not be measured: {one_line(result)}", pytrace=False)
        if peer in result.left_out:
            pytest.skip(result.left_out[peer])
        _replay(benchmark, result, peer)
        verdict = result.verdicts.get(peer)
        if verdict is not None and not verdict.passed:
            pytest.fail(f"{key}: {peer} gives wrong answers: {verdict.message}", pytrace=False)

    return run


def _replay(benchmark, result: Result, peer: str) -> None:
    verdict, case = result.verdicts.get(peer), result.case
    benchmark.extra_info.update(peer=peer, backend=result.backend, verdict=verdict.to_dict() if verdict else None)
    if not result.samples:  # pytest-benchmark is disabled: judged, not timed
        benchmark.pedantic(lambda: None)
        return
    benchmark.extra_info["samples"] = result.samples[peer]
    if peer != result.baseline and peer not in case.alone:
        benchmark.extra_info.update(baseline=result.baseline, speedup=result.speedup(peer).to_dict())
    REPLAY.load(result.samples[peer])
    benchmark.pedantic(lambda: None, rounds=len(result.samples[peer]), iterations=result.iterations)


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter, config):
    measured = [r for r in config.stash[RESULTS].values() if isinstance(r, Result) and r.samples]
    if not measured:
        return
    device = _device(config)
    computed = {r.case.facts()["dtype"] for r in measured if any(work.flops for work in r.case.work())}
    rates = roofline.measured(device, {name: DTYPES[name] for name in computed})
    data = document(measured, device, _effort(config), config.option.peers, rates)
    terminalreporter.section("fastres: speed-up over eager")
    terminalreporter.write_line(machine(data))
    for line in lines(data):
        terminalreporter.write_line(line)
    try:
        paths, why_not = write(data, config.option.results, complete="deselected" not in terminalreporter.stats)
    except OutputError as error:
        terminalreporter.write_line(str(error), red=True)
        return
    for line in [*(f"wrote {path}" for path in paths), *([why_not] if why_not else [])]:
        terminalreporter.write_line(line)
