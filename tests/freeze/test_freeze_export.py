"""Frozen models given to others: torch.export, ONNX, TorchScript and torch.compile see stock operators alone."""

import copy
import inspect
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import fastres
from fastres.inference import FrozenModel
from freeze_cases import fixed, freeze, images, settle

BATCHES = (5, 2, 1)


class Net(nn.Module):
    """Every kind of step: a convolution with its residual, a BN alone, a sum with its ReLU, a pooled head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pre, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, images):
        y = torch.relu(self.bn1(self.conv1(images)))
        y = torch.relu(self.bn2(self.conv2(y)) + y)
        y = torch.relu(self.pre(y))
        y = torch.relu(y + y.flip(-1))
        return self.fc(y.mean((2, 3)))


class Features(Net):
    def forward(self, images, scale=2.0):
        logits = super().forward(images)
        return {"logits": logits, "others": (logits * scale, logits.argmax(-1))}


def frozen(net, dtype=None):
    return freeze(net, images(2, 16), capture="graph", tune=False, verify=False, dtype=dtype)


@pytest.fixture(params=["run", "loaded"])
def pair(request, tmp_path):
    """A function that makes (source, frozen) of a class: after calls that have left plans, and fresh from a file."""

    def make(cls=Net, dtype=None):
        net = settle(cls())
        fast = frozen(net, dtype)
        if request.param == "run":
            fast(images(2, 16)), fast(images(2, 16))
        if request.param == "loaded":
            fast.save(tmp_path / "net.fastres")
            fast = fastres.load(tmp_path / "net.fastres")
        return net, fast

    return make


def agree(run, net, sizes=(16, 16), tolerance=1e-5):
    for batch in BATCHES:
        x = torch.randn(batch, 3, *sizes)
        with torch.no_grad():
            got, want = tree_leaves(run(x)), tree_leaves(net(x))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(torch.as_tensor(a).to(b.dtype), b, rtol=tolerance, atol=tolerance)


def stock(graph):
    """Whether a graph calls ATen alone, and not through oneDNN by name."""
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    others = [name for name in calls if not name.startswith("aten.") or "mkldnn" in name]
    return [name for name in others if "getitem" not in name] == [] and calls


# ---- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("cls", [Net, Features])
def test_export_gives_stock_operators_for_any_batch(pair, cls, strict):
    net, fast = pair(cls)
    program = torch.export.export(fast, (images(2, 16),), dynamic_shapes=({0: Dim("batch")},), strict=strict)
    assert stock(program.graph)
    agree(program.module(), net)
    agree(fast, net)


def test_export_names_inputs_as_the_source_does(pair):
    net, fast = pair(Features)
    assert list(inspect.signature(fast.forward).parameters) == ["images", "scale"]
    x = images(2, 16)
    program = torch.export.export(fast, (), {"images": x}, dynamic_shapes={"images": {0: Dim("batch")}})
    agree(lambda images: program.module()(images=images), net)


def test_copies_have_the_signature_too():
    fast = frozen(settle(Features()))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert inspect.signature(other.forward) == inspect.signature(fast.forward)
    assert isinstance(FrozenModel.forward, object) and fast.forward(torch.ones(1, 3, 16, 16))["logits"].shape == (1, 5)


def test_bf16(pair):
    net, fast = pair(Net, torch.bfloat16)
    x = images(2, 16)
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: Dim("batch")},))
    assert stock(program.graph)
    agree(program.module(), net, tolerance=0.1)


def test_another_image_size_is_captured_first():
    net = fixed()
    fast, x = frozen(net), images(2, 20)
    with pytest.raises(Exception, match=r"capture\(example\) it before it is exported"):
        torch.export.export(fast, (x,))
    fast.capture(x)
    program = torch.export.export(fast, (x,), dynamic_shapes=(({0: Dim("batch")},),))
    agree(program.module(), net, (20, 20))


@pytest.mark.parametrize("asks", [False, True])
def test_row6_image_sizes_vary_in_an_export_too(asks):
    class Even(Net):
        def forward(self, x):
            return super().forward(x * 2 if asks and x.shape[-1] % 2 else x)

    net = settle(Even())
    sizes = {0: Dim("batch"), 2: Dim("height", min=8, max=64), 3: 2 * Dim("width", min=4, max=32)}
    program = torch.export.export(frozen(net), (images(2, 20),), dynamic_shapes=(sizes,))
    for size in (16, 20, 26):
        agree(program.module(), net, (size, size))


def test_an_export_in_another_thread_changes_no_answer():
    """`torch.export` patches the whole process; a call must not take what it sees for its own tracing."""
    net = settle(Net())
    fast, x, done = frozen(net), images(3, 16), threading.Event()
    want, seen = fast(x), []

    def export():
        try:
            for size in (12, 14, 18, 20):
                torch.export.export(net, (images(2, size),))
                freeze(net, images(2, size), tune=False, verify=False)
        finally:
            done.set()

    thread = threading.Thread(target=export)
    thread.start()
    while not done.is_set():
        seen.append(torch.equal(fast(x), want))
    thread.join()
    assert len(seen) > 10 and all(seen)


def test_hugging_face_outputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    net = settle(transformers.ResNetForImageClassification(config))
    fast = freeze(net, images(2, 32), tune=False)
    shapes = {"pixel_values": {0: Dim("batch")}}
    program = torch.export.export(fast, (), {"pixel_values": images(2, 32)}, dynamic_shapes=shapes)
    assert stock(program.graph)
    x = images(3, 32)
    with torch.no_grad():
        got, want = program.module()(pixel_values=x), net(x)
    assert type(got) is type(want)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_an_exported_program_runs_where_there_is_no_fastres(tmp_path):
    net = settle(Net())
    fast, x = frozen(net), images(3, 16)
    program = torch.export.export(fast, (x[:2],), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save((x, net(x).detach()), tmp_path / "answer.pt")
    code = """
import sys, torch
sys.modules["fastres"] = None
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), y, rtol=1e-5, atol=1e-5)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "net.pt2"), str(tmp_path / "answer.pt")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Net, Features])
def test_onnx_runtime_gives_the_same_answers(pair, cls, tmp_path):
    onnx, _, runtime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    net, fast = pair(cls)
    path = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            fast,
            (images(2, 16),),
            path,
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=({0: Dim("batch")},),
        )
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 2
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == "images"
    agree(lambda x: session.run(None, {"images": x.numpy()}), net)


# ---- TorchScript -----------------------------------------------------------------------------------------------------


def test_a_traced_network_is_stock_torchscript(pair):
    net, fast = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(fast, images(2, 16))
    kinds = {node.kind() for node in script.inlined_graph.nodes()}
    assert {kind.split("::")[0] for kind in kinds} <= {"aten", "prim"}
    agree(script, net)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("cls", [Net, pytest.param(Features, marks=pytest.mark.full)])
def test_compiled(pair, cls, inner):
    torch._dynamo.reset()
    net, fast = pair(cls)
    agree(torch.compile(fast, backend=inner, fullgraph=True), net)
    torch._dynamo.reset()
