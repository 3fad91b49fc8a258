"""freeze(dtype="int8"): exact against integers step by step, calls, copies, files, exports, hostile calibrations."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres._dispatch import operator_of
from fastres.graph.steps import filled
from fastres.inference.gate import snr
from freeze_cases import cifar
from freeze_nets import NETS, prepared
from int8_cases import HOSTILE, frozen_int8, images, moved


@pytest.fixture(scope="module")
def net():
    return cifar()


@pytest.fixture(scope="module")
def frozen(net):
    return frozen_int8(net, images(32))


def by_reference(frozen, x):
    """The steps by the operators' references, which are exact integer arithmetic."""
    executor, inputs, constants = frozen.prepared(x)
    graph = executor.graph
    values = [*inputs, *constants, *[None] * len(graph.steps)]
    for step in graph.steps:
        ours = operator_of(step.operator)
        run = step.operator if ours is None else ours.call
        values[step.writes] = run(*filled(step.args, values), **filled(step.kwargs, values))
        yield step, values[step.writes]


def integers(frozen):
    """How many steps of each operator of ours there are."""
    names = [operator_of(step.operator).name for step in frozen.graph.steps if operator_of(step.operator) is not None]
    return {name: names.count(name) for name in names}


# ---- forward ---------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Grouped, depthwise and dilated convolutions, pools, a concatenation, a shuffle, gates that stay in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.dilated = nn.Conv2d(24, 16, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(40, 32, 1)
        self.gate = nn.Conv2d(32, 32, 1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 7)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        y = F.relu6(self.depthwise(F.relu(self.grouped(x))))
        y = torch.cat([F.hardswish(self.dilated(y)), y], 1)
        y = self.point(y)
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        a, b = F.channel_shuffle(y, 2).chunk(2, 1)
        y = F.relu(self.last(a) + b)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("make", [cifar, Mixed])
def test_every_step_is_the_integer_model(make, batch):
    """The fast calls of a frozen network, each given what the reference gives it: off by the side of a tie at most."""
    frozen = frozen_int8(make().eval(), images(32), **HOSTILE)
    x = images(batch, seed=3)
    executor, inputs, constants = frozen.prepared(x)
    seen = {step.writes: value for step, value in by_reference(frozen, x)}
    values = {**dict(enumerate([*inputs, *constants])), **seen}
    checked = 0
    for step in executor.graph.steps:
        ours = operator_of(step.operator)
        if ours is None or ours.bind is None:
            continue
        args = filled(step.args, values)
        choices = ours.bind(*args)
        if choices is None:
            continue
        for prepare in choices.ways.values():
            prepared = prepare()
            y = prepared.function(*(args[a.place] if hasattr(a, "place") else a for a in prepared.args))
            off = (y.double() - seen[step.writes].double()).abs()
            if y.dtype is torch.uint8:
                assert float(off.max()) <= 1 and float((off > 0).double().mean()) < 1e-3, step
            else:
                assert float(off.max()) <= 1e-4 * float(y.abs().max() + 1), step
            checked += 1
    assert checked >= 8
    want = list(by_reference(frozen, x))[-1][1]
    assert snr(want, frozen(x)) > 40


def test_what_runs_on_integers():
    mixed = frozen_int8(Mixed().eval(), images(32), **HOSTILE)
    found = integers(mixed)
    assert found["conv_int8"] + found["quantize_conv_int8"] == 8 and found["max_pool_int8"] == 1
    assert found["mean_int8"] == 2 and found["quantize"] <= 2 and found["dequantize"] <= 3
    assert mixed.report.quantization.counts == {"int8": 8} and mixed.is_quantized
    resnet = integers(frozen_int8(cifar(), images(32)))
    assert set(resnet) == {"quantize_conv_int8", "conv_int8", "mean_int8"}


def test_any_batch_any_size_any_layout(net, frozen):
    for shape in ((1, 3, 16, 16), (7, 3, 16, 16), (2, 3, 24, 20), (3, 3, 9, 11), (0, 3, 16, 16)):
        x = torch.randn(shape)
        y = frozen(x)
        assert y.shape == net(x).shape and y.dtype is torch.float32
        if len(x):
            assert snr(net(x), y) > 20
            assert snr(y, frozen(x.contiguous(memory_format=torch.channels_last))) > 40
            assert snr(y, torch.cat([frozen(image[None]) for image in x])) > 40


def test_the_plan_is_measured_too(net):
    frozen = frozen_int8(net, images(16), tune="auto")
    x = images(3, seed=2)
    assert frozen.is_quantized and snr(net(x), frozen(x)) > 20 and frozen.report.milliseconds


def test_images_that_are_not_finite_are_answered_by_nan(frozen):
    x = images(5)
    want = frozen(x)
    x[1, 0, 0, 0], x[3, 2] = float("nan"), float("inf")
    y = frozen(x)
    assert y.isnan().all(1).tolist() == [False, True, False, True, False]
    assert torch.equal(y[0], want[0]) and torch.equal(y[4], want[4])
    large = images(2).clamp(-1, 1) * 1e38  # finite, but not their sum
    assert torch.isfinite(frozen(large)).all()


def test_a_model_in_half_precision(net):
    frozen = frozen_int8(copy.deepcopy(net).bfloat16(), images(16))
    assert frozen(images(2)).dtype is torch.float32 and frozen.is_quantized
    assert snr(net(images(4)), frozen(images(4))) > 15


def test_a_cpu_with_seven_bit_products(net, monkeypatch):
    """As without VNNI, where this is asked of oneDNN; the patch stands for such a CPU."""
    monkeypatch.setattr("fastres.inference.calibration.weight_limit", lambda: 64)
    frozen = frozen_int8(net, images(32))
    weights = [t for name, t in frozen.state_dict().items() if name.endswith("weight_int8")]
    assert max(int(t.abs().max()) for t in weights) == 64 and frozen.report.quantization.limit == 64
    assert snr(net(images(4)), frozen(images(4))) > 15


# ---- copies, files, weights ------------------------------------------------------------------------------------------


def test_copies(frozen):
    x = images(3, seed=5)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), frozen.to("cpu")):
        assert torch.equal(other(x), frozen(x))
    other = copy.deepcopy(frozen)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(x), frozen(x)) and "int8" in repr(other)
    for cast in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match="a network in int8 has scales in torch.float32"):
            frozen.to(cast)


@pytest.mark.parametrize("make", [cifar, Mixed])
def test_save_and_load(make, tmp_path):
    frozen, x = frozen_int8(make().eval(), images(32), **HOSTILE), images(3, seed=7)
    frozen.save(tmp_path / "net.fastres")
    loaded = fastres.load(tmp_path / "net.fastres")
    assert torch.equal(loaded(x), frozen(x)) and torch.equal(loaded(x[:1]), frozen(x[:1]))
    assert loaded.is_quantized and str(loaded.report) == str(frozen.report)
    assert loaded.report.quantization == frozen.report.quantization
    plain = fastres.freeze(make().eval(), x, tune=False, verify=False)
    plain.save(tmp_path / "plain.fastres")
    assert (tmp_path / "net.fastres").stat().st_size < (tmp_path / "plain.fastres").stat().st_size
    assert loaded.report.to_dict()["quantization"]["observer"] == "mse"


def test_refresh_quantizes_again():
    net = cifar()
    frozen, x = frozen_int8(net, images(32)), images(4, seed=9)
    before = frozen(x)
    with torch.no_grad():
        net.fc.bias += 1.0
        net.get_submodule("layer1.0.conv1").weight *= 0.9
    assert frozen.is_stale()
    frozen.refresh()
    assert not frozen.is_stale() and snr(net(x), frozen(x)) > 20
    assert float((frozen(x) - before).mean()) > 0.5
    assert any("the gate has not judged the new ones" in note for note in frozen.report.notes)


def test_other_captures_have_the_recipe():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.next = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            y = self.next(F.relu(self.conv(x)))
            return y.mean((2, 3))[:, : 7 if x.shape[2] > 12 else 8 if x.shape[2] > 6 else 4]

    net = Loop().eval()
    frozen = frozen_int8(net, images(16), **HOSTILE)
    small = images(2, size=8)  # all channels: no slice, so other steps, which were not calibrated
    assert snr(net(small), frozen(small)) > 100 and len(frozen._variants) == 1
    tiny = images(2, size=5)
    assert snr(net(tiny), frozen(tiny)) > 20 and [n.executor.quantized for n in frozen._variants] == [False, True]
    shared = {id(t) for n in frozen._networks if n.executor.quantized for t in n.constants(frozen.weights)}
    assert len(shared) == 6  # weight, scale and bias of two layers


def test_threads(frozen):
    x = [images(n, size=size, seed=n) for n in (1, 4) for size in (16, 20)]
    want = [frozen(t) for t in x]
    other, got = copy.deepcopy(frozen), {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: other(x[i % 4])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i % 4]) for i in range(8))


# ---- export, compile -------------------------------------------------------------------------------------------------


def test_export_is_quantize_and_dequantize_around_stock_operators(frozen):
    x = images(3, seed=4)
    exported = torch.export.export(frozen, (x,))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "fastres" in name]
    assert sum("quantize_per_tensor" in name for name in names) >= 2 * 8
    assert sum("dequantize_per_channel" in name for name in names) == 8
    assert snr(exported.module()(x), frozen(x)) > 40


def test_compile(frozen, fresh_compiler):
    x = images(3, seed=4)
    compiled = torch.compile(frozen, fullgraph=True, backend="eager")
    assert snr(compiled(x), frozen(x)) > 40


def test_onnx_holds_quantize_and_dequantize(frozen, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    x = images(3, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(frozen, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("QuantizeLinear") >= 8 and kinds.count("DequantizeLinear") >= 16 and kinds.count("Conv") == 8
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert snr(frozen(x), torch.from_numpy(y)) > 30


# ---- networks that nobody adapted ------------------------------------------------------------------------------------

ZOO = {  # name -> the least layers that can be int8
    "resnet18": 21,
    "resnet50": 54,
    "resnext50_32x4d": 54,
    "mobilenet_v2": 53,
    "mobilenet_v3_small": 54,
    "efficientnet_b0": 82,
    "squeezenet1_1": 26,
    "shufflenet_v2_x0_5": 57,
    "densenet121": 121,
    "timm-skresnet18": 45,
    "timm-resnet18-features": 20,
    "convnext_tiny": 5,
    "hf-v1.5": 54,
}


@pytest.mark.parametrize("name", [n if n == "resnet18" else pytest.param(n, marks=pytest.mark.full) for n in ZOO])
def test_the_zoo(name):
    """Random weights with calibrated norms: every layer that can be is int8, and the gate keeps what it asks for."""
    zoo = NETS[name]
    net, x = prepared(zoo), images(16, size=zoo.size)
    every = frozen_int8(net, x, **HOSTILE)
    assert every.report.quantization.counts["int8"] >= ZOO[name], every.report
    if name == "resnet18":
        assert snr(net(x), every(x)) > 15
    kept = every if name == "resnet18" else frozen_int8(net, x)
    assert kept.report.quantization.holds and kept.report.quantization.snr >= 10
    assert len(moved(kept)) < len(kept.report.quantization.layers)
