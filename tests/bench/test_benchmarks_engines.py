"""The benchmarks' engines: real convolutions, hand-computed bounds, absent peers named, files compared."""

import copy
import functools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason='pip install "fastres[bench]"')
pytest.importorskip("torchvision.models")
ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "conftest.py").is_file():  # an installed wheel without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)

import bench_conv_act  # noqa: E402
import bench_networks  # noqa: E402
import compare  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import runtimes  # noqa: E402
import shapes  # noqa: E402
from observed import observed  # noqa: E402
from peers import judge_outputs  # noqa: E402

CPU = torch.device("cpu")


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_convolutions_are_torchvisions(network):
    table = {(c.inputs, c.outputs, c.kernel, c.stride, c.padding, c.size, c.role): c.counts for c in shapes.CONVS}

    def key(module, inputs, output):
        where = module.kernel_size[0], module.stride[0], module.padding[0], inputs[0].shape[-1]
        return module.in_channels, module.out_channels, *where

    seen = observed(network, torch.nn.Conv2d, {"BasicBlock": "conv2", "Bottleneck": "conv3"}, key)
    assert {key: counts[network] for key, counts in table.items() if counts[network]} == seen
    assert len(table) == len(shapes.CONVS) == len({c.id for c in shapes.CONVS})


# ---- the roofline ----------------------------------------------------------------------------------------------------


def test_bound_of_one_convolution():
    c = shapes.Conv(64, 256, 1, 1, 56, shapes.BLOCK_END, 0, 1)
    work = roofline.conv(c, 2, 4)
    assert work.flops == 2 * 2 * 56 * 56 * 256 * 64  # 2 N P Q O C
    assert work.bytes == 4 * (2 * 56 * 56 * (64 + 256 + 256) + 256 * 64)  # x, residual and y; the weight
    assert work.seconds(1e9, 1e30) == work.bytes / 1e9 and work.seconds(1e30, 1e9) == work.flops / 1e9
    strided = roofline.conv(shapes.Conv(64, 128, 1, 2, 56, shapes.PROJECTION, 1, 0), 1, 2)
    assert strided.bytes == 2 * (28 * 28 * (64 + 128) + 128 * 64)  # a strided 1x1 reads a quarter of the pixels
    stem = roofline.conv(shapes.Conv(3, 64, 7, 2, 224, shapes.INNER, 1, 1), 1, 2)
    assert stem.flops == 2 * 112 * 112 * 64 * 7 * 7 * 3 and stem.bytes == 2 * (224**2 * 3 + 112**2 * 64 + 64 * 147)


@pytest.mark.parametrize(
    ("network", "batch", "kernels", "gflop", "megabytes", "microseconds"),
    [  # the project's design tables, per image: 2 bytes an element, 4.3 TB/s, 788 TFLOP/s, one kernel a convolution
        ("resnet50", 8, 56, 8.18, 61.08, 16.98),
        ("resnet50", 256, 56, 8.18, 54.90, 16.62),
        ("resnet18", 8, 23, 3.63, 15.29, 5.34),
        ("resnet18", 256, 23, 3.63, 12.46, 5.30),
    ],
)
def test_bound_of_a_network(network, batch, kernels, gflop, megabytes, microseconds):
    works = roofline.network(network, batch, 2)
    assert len(works) == kernels
    assert sum(work.flops for work in works) / batch / 1e9 == pytest.approx(gflop, abs=0.005)
    assert sum(work.bytes for work in works) / batch / 1e6 == pytest.approx(megabytes, abs=0.005)
    assert roofline.bound(works, 4.3e12, 788e12) / batch * 1e6 == pytest.approx(microseconds, abs=0.005)


# ---- conv_act --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("role", [shapes.INNER, shapes.BLOCK_END, shapes.PROJECTION])
def test_conv_act_is_judged(role, dtype):
    case = bench_conv_act.ConvActCase(shapes.Conv(64, 8, 3, 2, 9, role, 1, 1), dtype, 2)
    prepared = case.prepare(CPU, ("eager", "fastres"))
    results = {name: call() for name, call in prepared.calls.items()}
    assert results["fastres"][0].shape == (2, 8, 5, 5) and prepared.judge(results)["fastres"].passed
    wrong = results["fastres"][0].clone()
    wrong[0, 0, 0, 0] += 0.3 * wrong.abs().max()
    for answer in (wrong, results["fastres"][0] * 1.2):  # one element; every one
        assert not prepared.judge({**results, "fastres": (answer,)})["fastres"].passed


# ---- engines ---------------------------------------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    """Stands for a network: [N, 3, 8, 8] -> [N, 5]."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def tiny():
    torch.manual_seed(0)
    return Tiny().eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_judged(dtype):
    net, x = tiny(), torch.randn(3, 3, 8, 8).to(dtype)
    right = copy.deepcopy(net).to(dtype)(x)
    wrong = right.clone()
    wrong[1, 2] += 0.2 * right.abs().max()
    answers = {"right": right, "wrong": wrong, "scaled": right * 1.1, "nan": right * torch.nan, "short": right[:2]}
    verdicts = judge_outputs(net, (x,), answers)
    assert {name: verdict.passed for name, verdict in verdicts.items()} == {name: name == "right" for name in answers}
    assert judge_outputs(net, (x,), {}) == {}


@pytest.mark.parametrize("name", ["eager", "eager_channels_last", "torchscript"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_engines(name, dtype):
    net, x = tiny(), torch.randn(2, 3, 8, 8).to(dtype)
    y = runtimes.BUILDERS[name](net, x)()
    assert y.dtype == dtype and not y.requires_grad and net.conv.weight.dtype is torch.float32
    assert judge_outputs(net, (x,), {name: y})[name].passed


@pytest.mark.parametrize(
    ("peer", "module", "command"),
    [
        ("onnxruntime", "onnxruntime", "pip install onnxruntime onnx onnxscript"),
        ("openvino", "openvino", "pip install openvino"),
        ("openvino_throughput", "openvino", "pip install openvino"),
        ("jax", "jax", "pip install 'jax"),
    ],
)
def test_absent_engines_say_how_to_install_them(peer, module, command, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    runtimes.forget()
    for of_a_gpu in ("compile_max_autotune", "cudagraph"):
        with pytest.raises(measure.Absent, match="CUDA"):
            runtimes.BUILDERS[of_a_gpu](tiny(), torch.randn(2, 3, 8, 8))
    with pytest.raises(measure.Absent, match="not installed") as caught:
        runtimes.BUILDERS[peer](tiny(), torch.randn(2, 3, 8, 8))
    assert command in str(caught.value)


@pytest.mark.parametrize("module", ["onnxruntime", "openvino"])
def test_installed_engines(module):
    pytest.importorskip(module)
    if module == "onnxruntime":
        pytest.importorskip("onnxscript")
    case = bench_networks.NetworkCase("resnet18", "fp32", 2)
    peers = ("eager", *(name for name in case.runtimes if name.startswith(module)))
    result = measure.measure(case, CPU, measure.JUDGE_ONLY, peers)
    assert not result.left_out and result.verdicts.keys() == set(peers[1:])
    assert all(verdict.passed for verdict in result.verdicts.values())
    runtimes.forget()


def test_network_cases():
    ids = [case.id for case in bench_networks.CASES]
    assert len(set(ids)) == 12 and "resnet50-inference-fp32-batch8" in ids
    for case in bench_networks.CASES:
        for level in ("quick", "all"):  # every peer is measured or says why not
            assert {*case.optional} == {*case.peers(level), *case.absent(level)} - {*case.baselines, *case.ours}
        assert not case.absent("all") and "compile" in case.peers("quick") or not case.quick()


class Broken(measure.Case):
    """A case whose engines are missing, broken and well."""

    what, id, mode, compiled, runtimes = "broken", "broken", "none", (), ("missing", "raises", "well")

    def facts(self):
        return {"layout": None, "dtype": "fp32"}

    def work(self):
        return [roofline.Work("one", 1e6, 1e6)]

    def prepare(self, device, peers):
        def missing():
            raise measure.Absent("gone is not installed: pip install gone")

        def raises():
            raise RuntimeError  # without a message

        calls = {name: lambda name=name: name for name in ("eager", "fastres")}
        build = {"missing": missing, "raises": raises, "well": lambda: lambda: "well"}
        return measure.Prepared(calls, lambda results: {}, timer=lambda f: f() and 1e-3, build=build)


@functools.cache
def measured(scale):
    """The document of a session with one case; fastres takes `scale` times as long."""
    case = Broken()
    result = measure.measure(case, CPU, measure.Effort(1.0, 8, sample_s=1e-3), case.peers("quick"))
    result.samples["fastres"] = [sample * scale for sample in result.samples["fastres"]]
    return report.document([result], CPU, measure.TINY, "quick", roofline.Rates(1e9, {"fp32": 4e9}))


def broken(scale=1.0):
    return copy.deepcopy(measured(scale))


def test_absent_peers_are_listed():
    data = broken(2.0)
    report.validate(json.loads(json.dumps(data, allow_nan=False)))
    case = data["cases"][0]
    assert case["left_out"] == {"missing": "gone is not installed: pip install gone", "raises": "RuntimeError: "}
    assert "pip install gone" in report.markdown(data) and "pip install gone" in "\n".join(report.lines(data))
    assert case["bound_s"] == 1e-3 and case["peers"]["well"]["of_bound"] == pytest.approx(1.0)
    assert case["peers"]["fastres"]["flops_per_s"] == pytest.approx(1e6 / 2e-3)
    row = next(row for row in report.rows(data) if row[1] == "well")
    assert row[report.COLUMNS.index("fastres over it")].startswith("0.50x")  # a loss, printed like a win


# ---- compare ---------------------------------------------------------------------------------------------------------


def run(tmp_path, a, b, *options):
    for name, data in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])


def test_compare(tmp_path, capsys):
    a = broken()
    assert run(tmp_path, a, a, "--fail-if-slower", "5%") == 0
    assert "0 faster, 3 same, 0 slower" in capsys.readouterr().out
    assert run(tmp_path, a, broken(1.1), "--fail-if-slower", "5%") == 1
    out = capsys.readouterr().out
    assert "slower, over the limit" in out and "1 of ours slower by more than 5 %" in out and "0.91x" in out
    assert run(tmp_path, a, broken(1.1), "--fail-if-slower", "20") == 0
    assert run(tmp_path, a, broken(1.1)) == 0
    assert run(tmp_path, broken(1.1), a, "--fail-if-slower", "0") == 0 and "1 faster" in capsys.readouterr().out


def test_compare_allows_what_the_samples_scatter(tmp_path, capsys):
    a, b = broken(), broken(1.1)
    for data in (a, b):
        samples = data["cases"][0]["peers"]["fastres"]["samples"]
        samples[:] = [sample * (0.8 + 0.1 * i) for i, sample in enumerate(samples)]
    assert run(tmp_path, a, b, "--fail-if-slower", "5%") == 0
    assert "0 faster, 3 same, 0 slower" in capsys.readouterr().out


def test_compare_names_what_only_one_has_and_other_machines(tmp_path, capsys):
    a, b = broken(), broken()
    del b["cases"][0]["peers"]["well"]
    b["environment"]["threads"] += 1
    assert run(tmp_path, a, b) == 0
    out = capsys.readouterr().out
    assert "only in A: broken broken, well" in out and "note: threads is" in out


def test_compare_refuses(tmp_path, capsys):
    a = broken()
    other = copy.deepcopy(a)
    other["cases"][0]["id"] = "another"
    empty = copy.deepcopy(a)
    empty["cases"][0]["peers"]["well"]["samples"] = []
    cut = copy.deepcopy(a)
    del cut["cases"][0]["peers"]["well"]["median"]
    for b, message in (
        ("{", "not a JSON file"),
        ("[]", "not a result of these benchmarks"),
        ({"schema": "fastres.demo/1"}, "fastres.demo/1"),
        ({**a, "schema_version": 1}, "another version"),
        (cut, "expected the key 'median'"),
        (other, "no case and peer in common"),
        (empty, "got no samples"),
    ):
        assert run(tmp_path, a, b) == 2
        assert message in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none.json"), str(tmp_path / "a.json")]) == 2
    for limit in ("-1%", "nan", "fast"):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, a, a, "--fail-if-slower", limit)
