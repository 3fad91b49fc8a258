"""Tuning and benchmarks of `make gpu`: what is tried and chosen, which data may enter the table, what is measured."""

import contextlib
import json
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "gpu_run").is_dir():  # an installed wheel, tested without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from fastres.kernels import configs, measured  # noqa: E402

from fastres.lab.timing import event_timer  # noqa: E402
from gpu_run import problems, tune  # noqa: E402

ENTRY = ("add_relu_forward_kernel", 90, "large")


def table():
    return {key: dict(rows) for key, rows in configs.TABLE.items()}


def data(*entries):
    return {"schema": measured.SCHEMA, "schema_version": measured.VERSION, "entries": list(entries)}


def entry(kernel=ENTRY[0], arch=90, shape_class="large", **config):
    whole = asdict(configs.TABLE[ENTRY[:2]]["large"]) | config
    return {"kernel": kernel, "arch": arch, "shape_class": shape_class, "config": whole}


# ---- data that enters the table --------------------------------------------------------------------------------------


def test_measured_entries_take_the_place_of_the_others(tmp_path):
    found, path = table(), tmp_path / "tuned.json"
    assert measured.load(path, found) == 0 and found == configs.TABLE  # no file: nothing was measured
    measured.load(measured.PATH, found)
    assert found == configs.TABLE  # what is shipped is in the table that launches look at
    path.write_text(json.dumps(data(entry(tile=4096, num_warps=8))))
    assert measured.load(path, found) == 1
    assert found[ENTRY[:2]]["large"] == configs.Config(tile=4096, num_warps=8)
    found[ENTRY[:2]]["large"] = configs.TABLE[ENTRY[:2]]["large"]
    assert found == configs.TABLE  # and nothing else


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"schema": "other"}, "expected the schema"),
        ([], "expected the schema"),
        (data() | {"entries": None}, "expected a list"),
        (data(3), "expected an object"),
        (data(entry(kernel="no_kernel")), "does not have"),
        (data(entry(arch=89)), "does not have"),
        (data(entry(shape_class=["large"])), "does not have"),
        (data(entry(), entry()), "twice"),
        (data(entry(tile=1000)), "tile: got 1000"),
        (data(entry(tile=-2048)), "tile: got -2048"),
        (data(entry(num_warps=0)), "num_warps: got 0"),
        (data(entry(num_warps=True)), "num_warps: got True"),
        (data(entry(line=64)), "line: got 64"),  # flat kernels have none
        (data(entry(more=1)), "expected the keys"),
    ],
)
def test_data_that_the_table_has_no_place_for(tmp_path, wrong, says):
    found, path = table(), tmp_path / "tuned.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=says):
        measured.load(path, found)
    assert found == configs.TABLE


# ---- what is tried ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_candidates_are_others_and_could_enter_the_table(arch):
    for (kernel, known), rows in configs.TABLE.items():
        for shape_class, shipped in rows.items() if known == arch else ():
            found = problems.candidates(shipped)
            assert 2 <= len(found) == len(set(found)) and shipped not in found
            for candidate in found:
                row = {"kernel": kernel, "arch": arch, "shape_class": shape_class, "config": asdict(candidate)}
                measured.checked(data(row), configs.TABLE, "here")


def test_the_problems_use_nearly_every_entry():
    """As on an H100: what no shape of ResNet-50 uses is not tuned."""
    used = {entry for problem in problems.problems(128) for entry in problems.entries_of(problem, 90)}
    whole = {(kernel, c) for (kernel, arch), rows in configs.TABLE.items() if arch == 90 for c in rows}
    assert used <= whole
    assert {c for kernel, c in whole - used if kernel != "conv_act_forward_kernel"} <= {"few"}
    assert all(c.endswith("_ieee") for kernel, c in whole - used if kernel == "conv_act_forward_kernel")
    ranks = {entry: problems.rank(*entry) for entry in used}
    assert ranks["conv_act_forward_kernel", "wide"] == ranks["bn_act_forward_kernel", "rows"] == 0
    assert ranks["bn_statistics_merge_kernel", "many"] == max(ranks.values())


def test_a_configuration_is_in_the_table_only_inside():
    shipped, other = configs.TABLE[ENTRY[:2]]["large"], configs.Config(tile=512, num_warps=1)
    with pytest.raises(RuntimeError), problems.configured(ENTRY, other):
        assert configs.config(ENTRY[0], 90, "large") is other
        raise RuntimeError
    assert configs.TABLE[ENTRY[:2]]["large"] is shipped


class Planted:
    """A problem whose answer depends on the configuration."""

    def __init__(self, answer):
        self.answer = answer

    def to_dict(self):
        return {"what": "planted"}

    def make(self, device):
        return lambda: (self.answer(configs.config(ENTRY[0], 90, "large")),)


def test_a_candidate_with_other_answers_is_found_out():
    shipped = configs.TABLE[ENTRY[:2]]["large"]
    other, cpu = replace(shipped, tile=shipped.tile * 2), torch.device("cpu")
    right = Planted(lambda config: torch.full((4,), 3.0))
    wrong = Planted(lambda config: torch.full((4,), 3.0 if config is shipped else 3.01))
    nan = Planted(lambda config: torch.full((4,), 3.0 if config is shipped else torch.nan))

    def raising(text):
        def answer(config):
            if config is not shipped:
                raise RuntimeError(text)
            return torch.ones(1)

        return Planted(answer)

    assert tune.attempt(ENTRY, other, [right], cpu) is None
    for planted in (wrong, nan):
        kind, why = tune.attempt(ENTRY, other, [right, planted], cpu)
        assert kind == "wrong" and "output 0 differs" in why
    refused = tune.attempt(ENTRY, other, [raising("out of resource: shared memory\nmore")], cpu)
    assert refused == ("refused", "RuntimeError: out of resource: shared memory")
    fault = raising("Triton Error [CUDA]: an illegal memory access was encountered")
    assert tune.attempt(ENTRY, other, [fault], cpu)[0] == "wrong"


def test_the_best_is_chosen_over_all_shapes_and_never_one_that_loses():
    def times(*medians):
        return [[m * (1 + 0.001 * i) for i in range(7)] for m in medians]

    assert tune.choose([times(1.0, 0.8, 0.9)]) == (1, pytest.approx(1.25))
    assert tune.choose([times(1.0, 0.8, 0.9), times(1.0, 1.1, 0.9)]) == (2, pytest.approx(1 / 0.9))
    assert tune.choose([times(1.0, 0.99)]) == (0, 1.0)  # within the noise
    assert tune.choose([times(1.0)]) == (0, 1.0)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_the_cache_is_flushed_before_the_clock_starts(monkeypatch):
    """event_timer on a GPU that only writes down what it is told."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 2.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("idle"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    timer = event_timer(torch.device("cuda"), before=lambda: told.append("flush"))
    assert timer(lambda: told.append("call")) == 2e-3
    assert told == ["idle", "flush", "record", "call", "record", "wait"]


def test_the_items_of_a_gpu(monkeypatch):
    pytest.importorskip("torchvision")
    from gpu_run import bench

    gpu = types.SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = bench.items(torch.device("cuda"))
    whats = [item.case.what for item in found]
    assert whats[0] == "bn_act" and whats.index("networks") > whats.index("conv_act")
    assert {item.case.facts()["dtype"] for item in found} == {"fp32", "fp16", "bf16"}
    for item in found:
        assert set(item.peers) >= {*item.case.baselines, *item.case.ours} and item.case.work() is not None
        assert not item.cold or {"triton", "cuda"} <= set(item.peers)
    # a case that comes twice comes with more peers
    seen = {}
    for item in found:
        assert set(seen.get(item.case.title, ())) < set(item.peers)
        seen[item.case.title] = item.peers


def test_wrong_answers_and_cases_that_break_are_written_down(tmp_path, monkeypatch):
    from fastres.lab.timing import wall_timer
    from gpu_run import bench
    from measure import Verdict

    item = next(bench.dry())
    monkeypatch.setattr(bench, "measured_rates", lambda device, small: bench.Rates(1e10, {"fp32": 1e11}))
    session, timed = bench.Session(tmp_path / "bench.json", torch.device("cpu"), True, [item] * 2), []
    real = bench.measure

    def wrong(*arguments):
        result = real(*arguments)
        result.verdicts["fastres"] = Verdict(False, 7.0, "y: error ratio 7, at most 2")
        return result

    monkeypatch.setattr(bench, "measure", wrong)
    session.add(item, lambda call: timed.append(call()) or 1e-3)  # an operator is timed with the cold timer
    session.save()
    assert timed
    found = json.loads((tmp_path / "bench.json").read_text())["run"]
    assert found["measured"] == [item.case.title] and "wrong answers: y" in found["failed"][item.case.title]

    def broken(*arguments):
        raise RuntimeError("planted\nmore")

    monkeypatch.setattr(bench, "measure", broken)
    session.add(item, wall_timer())
    assert session.failed[item.case.title] == "RuntimeError: planted"
