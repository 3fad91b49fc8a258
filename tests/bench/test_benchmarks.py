"""The benchmarks: real shapes, verdicts that catch wrong answers, samples handed on unchanged, files of one schema."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason='pip install "fastres[bench]"')
ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "conftest.py").is_file():  # an installed wheel, tested without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)

import bench_bn_act  # noqa: E402
import measure  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from observed import observed  # noqa: E402
from roofline import Rates  # noqa: E402

SMALL = shapes.Activation(5, 6, 7, shapes.BLOCK_END, 1, 1)
FAST = measure.Effort(budget_s=0.02, rounds=6, sample_s=1e-4)


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_shapes_are_torchvisions(network):
    table = {(a.channels, a.height, a.width, a.role): a.counts[network] for a in shapes.ACTIVATIONS}
    last = {"BasicBlock": "bn2", "Bottleneck": "bn3"}
    seen = observed(network, torch.nn.BatchNorm2d, last, lambda module, inputs, output: output.shape[1:])
    assert {key: count for key, count in table.items() if count} == seen
    assert len(table) == len(shapes.ACTIVATIONS)
    assert sorted(a.size for a in shapes.distinct()) == sorted({a.size for a in shapes.ACTIVATIONS})


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_block_inputs_are_torchvisions(network):
    blocks = pytest.importorskip("bench_blocks")
    net, seen = copy.deepcopy(blocks.network(network)).to("meta"), {}
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: list(inputs[0].shape)}))
    net(torch.empty(shapes.BATCH, 3, 224, 224, device="meta"))
    cases = [case for case in blocks.CASES if case.network == network]
    assert {case.block: case.facts()["shape"] for case in cases} == {case.block: seen[case.block] for case in cases}


def test_bytes_moved():
    def tensors(kind, form, dtype="fp32"):
        case = bench_bn_act.BnActCase(SMALL, kind, form, "channels_last", dtype)
        return case.bytes_moved() / (8 * 5 * 6 * 7)

    assert tensors("eval", "relu") == 2 * 4  # x -> y
    assert tensors("eval", "residual-relu", "bf16") == 3 * 2  # x, r -> y
    assert tensors("train", "none") == (1 + 2 + 2 + 3) * 4  # x; x -> y; dy, x; dy, x -> dx
    assert tensors("train", "residual-relu") == (1 + 3 + 3 + 5) * 4  # x; x, r -> y; dy, x, y; dy, x, y -> dx, dr


def scaled(forward, part):
    """`forward` with one of its results off by 30 %: "y", or the gradient of one of its inputs."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            return 1.3 * g

    def wrong(*inputs):
        inputs = [Scale.apply(t) if i == part else t for i, t in enumerate(inputs)]
        return forward(*inputs) * (1.3 if part == "y" else 1)

    return wrong


@pytest.mark.parametrize("kind", list(bench_bn_act.MODES))
@pytest.mark.parametrize("form", ["residual-relu", "relu", "none"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operators_are_judged(kind, form, dtype, monkeypatch):
    case, cpu = bench_bn_act.BnActCase(SMALL, kind, form, "channels_last", dtype, batch=3), torch.device("cpu")
    real = bench_bn_act.BnActCase.forward_of

    def verdict():
        prepared = case.prepare(cpu, ("eager", "fastres"))
        return prepared.judge({name: call() for name, call in prepared.calls.items()})["fastres"]

    assert verdict().passed
    gradients = [i for i, t in enumerate(case.inputs(cpu)) if t.requires_grad] if kind == "train" else []
    for part in ("y", *gradients):  # every tensor is looked at

        def wrong(self, peer, part=part):
            return scaled(real(self, peer), part) if peer == "fastres" else real(self, peer)

        monkeypatch.setattr(bench_bn_act.BnActCase, "forward_of", wrong)
        found = verdict()
        assert not found.passed and found.error_ratio > 2, f"part {part}"


class SleepCase(measure.Case):
    """A case whose peers cost nothing and count their calls."""

    what, compiled = "sleep", ("compile", "compile_broken")
    id, mode = "sleep", "none"

    def facts(self):
        return {"layout": None, "dtype": None}

    def prepare(self, device, peers):
        self.__dict__["called"] = called = dict.fromkeys(peers, 0)

        def call(name):
            def run():
                called[name] += 1
                if name == "compile_broken":
                    raise RuntimeError("no compiler\nhere")
                return name

            return run

        def judge(results):
            assert list(results) == ["eager", "fastres", "compile"]
            return {"fastres": measure.Verdict(True, 1.0)}

        return measure.Prepared({name: call(name) for name in peers}, judge, timer=lambda f: f() and 1e-3 or 1e-3)


def test_measure():
    case = SleepCase()
    effort = measure.Effort(budget_s=1.0, rounds=9, sample_s=5e-3)
    result = measure.measure(case, torch.device("cpu"), effort, case.peers("all"))
    assert result.left_out == {"compile_broken": "RuntimeError: no compiler"}
    assert result.iterations == 5
    assert {name: len(samples) for name, samples in result.samples.items()} == dict.fromkeys(
        ("eager", "fastres", "compile"), 9
    )
    assert case.called["fastres"] == 1 + 2 + 9 * 5  # judged, estimated twice, nine samples
    assert result.seconds("fastres") == pytest.approx(1e-3 / 5)
    assert result.speedup("fastres").median == 1.0 and result.speedup("fastres").coverage >= 0.95
    judged = measure.measure(case, torch.device("cpu"), measure.JUDGE_ONLY, case.peers("all"))
    assert judged.samples == {} and judged.verdicts["fastres"].passed and case.called["eager"] == 1


def test_threads_are_restored():
    before = torch.get_num_threads()

    class Single(SleepCase):
        threads = 1

        def prepare(self, device, peers):
            assert torch.get_num_threads() == 1
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        measure.measure(Single(), torch.device("cpu"), FAST, ("eager",))
    assert torch.get_num_threads() == before


@functools.cache
def measured():
    cases = [
        bench_bn_act.BnActCase(SMALL, "train", "residual-relu", layout, "fp32", batch=2)
        for layout in ("nchw", "channels_last")
    ]
    results = [measure.measure(case, torch.device("cpu"), FAST, case.peers("eager")) for case in cases]
    return report.document(results, torch.device("cpu"), FAST, "eager", Rates(1e10))


def document():
    """A result file of two cases, measured once."""
    return copy.deepcopy(measured())


def test_document_holds_its_schema():
    data = document()
    report.validate(json.loads(json.dumps(data, allow_nan=False)))
    case = data["cases"][0]
    ours, eager = case["peers"]["fastres"], case["peers"]["eager"]
    ratios = sorted(a / b for a, b in zip(eager["samples"], ours["samples"], strict=True))
    assert ours["speedup"]["eager"]["low"] == ratios[0] and ours["speedup"]["eager"]["n"] == 6 == case["rounds"]
    assert ours["bytes_per_s"] == pytest.approx(case["bytes_moved"] / ours["median"])
    assert eager["verdict"] is None and eager["speedup"] == {} and ours["verdict"]["passed"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema_version",), "1"),
        (("cases", 0, "rounds"), None),
        (("cases", 0, "peers", "eager", "samples", 0), "0.1"),
        (("cases", 0, "peers", "fastres", "verdict", "passed"), 1),
        (("bars", 0, "value"), True),
    ],
)
def test_validate_names_the_place(place, value):
    data = document()
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(ValueError, match=r"result\..*got"):
        report.validate(data)
    del at[place[-1]]
    if isinstance(at, dict):
        with pytest.raises(ValueError, match=f"expected the key '{place[-1]}'"):
            report.validate(data)


def test_losses_are_printed():
    data = document()
    loss = {"median": 0.5, "low": 0.4, "high": 0.6, "n": 6, "coverage": 0.96875}
    for case in data["cases"]:
        case["peers"]["fastres"]["speedup"]["eager"] = loss
    data["bars"] = report.bars(data["cases"])
    text = "\n".join(report.lines(data))
    assert text.count("0.50x eager") == 2 and "0 of 1 at 1.3x or more" in text
    assert report.markdown(data).count("0.50x eager") == 2
    wrong = data["cases"][0]["peers"]["fastres"]["verdict"]
    wrong.update(passed=False, message="dx")
    assert "WRONG dx" in "\n".join(report.lines(data))


def test_suite_runs(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--budget", "tiny", "--peers", "eager", "--device", "cpu", "--results", str(tmp_path)]
    command += ["-k", "bn_act-eval-relu or (512x7x7 and eval and channels_last and fp32) or eval-resnet18-layer4.1"]
    command += ["--benchmark-json", str(tmp_path / "theirs")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    name = f"add_relu+blocks+bn_act+overhead-part-cpu-torch{torch.__version__.partition('+')[0]}"
    data = json.loads((tmp_path / f"{name}.json").read_text())
    report.validate(data)
    assert "benchmarks/" in data["environment"]["command"] and data["environment"]["threads"] == 1
    page = (tmp_path / f"{name}.md").read_text()
    for case in data["cases"]:
        assert f"| {case['what']} {case['id']} |" in page and f"{case['what']} {case['id']}" in done.stdout
        assert all(case["peers"][ours]["verdict"]["passed"] for ours in case["ours"])
    theirs = json.loads((tmp_path / "theirs").read_text())["benchmarks"]
    assert len(theirs) == sum(len(case["peers"]) for case in data["cases"])
    samples = {f"{c['what']}: {c['id']}-{n}": p["samples"] for c in data["cases"] for n, p in c["peers"].items()}
    for bench in theirs:  # pytest-benchmark's own numbers are the interleaved samples, bit for bit
        mine = samples[f"{bench['group']}-{bench['extra_info']['peer']}"]
        assert bench["extra_info"]["samples"] == mine
        assert bench["stats"]["data"] == [sample / bench["stats"]["iterations"] for sample in mine]


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "result.json").write_text(json.dumps(document()))
    assert plot.main([str(tmp_path / "result.json")]) == 0
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bad.json").write_text("{}")
    assert plot.main([str(tmp_path / "bad.json")]) == 1 and plot.main([]) == 2
    assert "expected the key 'schema'" in capsys.readouterr().err and not (tmp_path / "bad.png").exists()


@pytest.mark.parametrize(
    ("option", "says"),
    [("--budget=0", "budget"), ("--device=tpu", "device"), ("--results=file/x", "cannot be written")],
)
def test_wrong_options(option, says, tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks/bench_import.py"), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, option], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4 and says in done.stderr
