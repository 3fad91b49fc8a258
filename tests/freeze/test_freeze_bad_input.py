"""freeze on what it cannot take: a clear error by the argument's name; on what is unusual: an answer, and a note."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

from fastres.graph.constants import Constants
from fastres.inference import FrozenModel
from freeze_cases import agree, cifar, compare, conv_bn, freeze, images, notes, state, unchanged


def plain():
    return nn.Sequential(*conv_bn(), nn.ReLU()).eval()


def refused(error, message, model, example, **options):
    """Before anything is changed, in one line."""
    with unchanged(model, example), pytest.raises(error, match=message) as caught:
        freeze(model, example, **{"tune": False, **options})
    assert "\n" not in str(caught.value)


# ---- unusual networks ------------------------------------------------------------------------------------------------


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)


OTHERS = {
    "transformer": (encoder, lambda n: torch.randn(n, 5, 16)),
    "LSTM": (lambda: nn.LSTM(4, 8, 2, batch_first=True), lambda n: torch.randn(n, 5, 4)),
    "GRU": (lambda: nn.GRU(4, 8, bidirectional=True), lambda n: torch.randn(5, n, 4)),
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), lambda n: torch.randn(n, 4)),
    "nothing": (nn.Identity, lambda n: torch.randn(n, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_networks_without_convolutions_run_as_they_are(name):
    make, example = OTHERS[name]
    net = make().eval()
    frozen = agree(net, example(2), sizes=(), capture="auto")
    assert str(frozen.report).startswith(f"{type(net).__name__}: 0 of 0 conv")
    assert {row.kind for row in frozen.report.rows} <= {"other"} and frozen.report.memory_format == "contiguous"
    for n in (2, 1, 3):
        compare(net, frozen, example(n))


@pytest.mark.parametrize("where", ["all of it", "a layer", "a layer frozen in eval mode"])
def test_training_mode_is_frozen_as_eval_mode_and_said(where):
    net = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Dropout(0.5))
    if where == "a layer":
        net.eval()[1].train()
    elif where == "a layer frozen in eval mode":
        net.train()[1].eval()
    frozen = agree(net, folded=1, batches=())
    assert "the model is in training mode; frozen as in eval mode" in notes(frozen)
    compare(net.eval(), frozen, images(3))


def test_a_model_with_gradients_and_hooks_of_its_own_stays_as_it_is():
    net = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    net(images()).sum().backward()
    net[0].weight.requires_grad_(False)
    net[0].weight.note = "mine"
    net[2].register_forward_hook(lambda m, a, y: y + 1)
    net.register_buffer("spare", None)
    assert "hooks" in notes(agree(net.eval(), capture="auto"))


class Camera(nn.Module):
    """Bytes to features."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn()

    def forward(self, x):
        return self.bn(self.conv(x.float() / 255))


def photos(batch):
    return torch.randint(256, (batch, 3, 8, 8), dtype=torch.uint8)


def test_bytes_are_judged_by_eager_where_float64_does_not_run():
    net = Camera().eval()
    frozen = agree(net, photos(2), verify=False, sizes=(), folded=1)
    frozen = freeze(net, photos(2), tune=False)
    assert frozen.report.verification is None and "its answers are eager's to" in notes(frozen)
    assert "not verified, the model does not run in float64" in notes(frozen)
    compare(net, frozen, photos(3))


def test_a_wrong_answer_is_found_without_float64_too(monkeypatch):
    rounded = Constants.rounded  # a fault is planted, and what finds it first is put out of action
    monkeypatch.setattr(Constants, "rounded", lambda self, *args: rounded(self, *args) * 1.5)
    monkeypatch.setattr(sys.modules["fastres.inference.freeze"], "_why_not_any_batch", lambda *args: "")
    net = nn.Sequential(Camera(), nn.Conv2d(4, 2, 1)).eval()
    refused(RuntimeError, "output of the frozen Sequential is not the source's", net, photos(2))


def test_03_no_images_at_all():
    net = plain()
    refused(ValueError, r"example_inputs: got float32 \[0, 3, 8, 8\] without an element", net, images(0))
    frozen = agree(net, batches=(0, 0, 2))
    assert frozen(images(0)).dtype == torch.float32 and frozen(images(0)).shape == (0, 4, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_example_in_another_floating_dtype_is_cast(dtype):
    net, x = plain(), images(3)
    frozen = agree(net, images().to(dtype))
    assert frozen.report.dtype == "float32"
    torch.testing.assert_close(frozen(x.double()), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel])
def test_a_compiled_model_and_one_for_several_gpus_are_frozen_by_their_graph(wrap):
    net = wrap(plain()).eval()
    frozen = freeze(net, images(), tune=False)
    assert frozen.report.folded == 1 and frozen.report.verification
    compare(net, frozen, images(3))
    with pytest.raises(TypeError, match="model: got a FrozenModel"):
        freeze(torch.compile(frozen), images())


# ---- refusals: models ------------------------------------------------------------------------------------------------


class Locked(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a lock")


def quantized(how):
    from torch.ao import quantization as q

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "dynamic":
            net = nn.Sequential(*conv_bn(), nn.Flatten(), nn.Linear(256, 3)).eval()
            return q.quantize_dynamic(net, {nn.Linear})
        net = nn.Sequential(q.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), q.DeQuantStub()).eval()
        net.qconfig = q.get_default_qconfig("x86" if "x86" in torch.backends.quantized.supported_engines else "fbgemm")
        prepared = q.prepare(q.fuse_modules(net, ["1", "2"]))
        prepared(images())
        return q.convert(prepared)


def scripted(how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(plain()) if how == "script" else torch.jit.trace(plain(), images())


def two_tensors():
    from torch.testing._internal.two_tensor import TwoTensor

    net = plain()
    weight = net[0].weight.detach()
    net[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    return net


def partly_meta():
    net = plain()
    net[1].to("meta")
    return net


FLOAT = r"is a quantized {} \(torch.ao.nn.*expected float weights: freeze the model that"
SCRIPT = "model: got a .*Module, expected the nn.Module that it was made of"
META = "model: it is on the meta device and has no weights to fold"
LAZY = "model: 0.weight has no shape yet: run the model once"
MODELS = {
    "a number": (lambda: 3, TypeError, "model: got int"),
    "no copy": (lambda: Locked(3, 3, 1), TypeError, "model: Locked cannot be deep-copied: holds a lock"),
    "meta": (lambda: plain().to("meta"), ValueError, META),
    "partly meta": (partly_meta, ValueError, META),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), ValueError, LAZY),
    "dynamic int8": (lambda: quantized("dynamic"), TypeError, "model: 3 " + FLOAT.format("Linear")),
    "static int8": (lambda: quantized("static"), TypeError, "model: 0 " + FLOAT.format("Quantize")),
    "script": (lambda: scripted("script"), TypeError, SCRIPT),
    "trace": (lambda: scripted("trace"), TypeError, SCRIPT),
    "tensor class": (two_tensors, TypeError, "model: 0.weight is a TwoTensor, expected a tensor"),
    "frozen": (lambda: freeze(plain(), images(), tune=False), TypeError, "model: got a FrozenModel"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_refused(case):
    make, error, message = MODELS[case]
    model = make()
    before = [(name, id(m)) for name, m in model.named_modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message) as caught:
        freeze(model, images(), tune=False)
    assert "\n" not in str(caught.value)
    assert before == ([(name, id(m)) for name, m in model.named_modules()] if isinstance(model, nn.Module) else [])


# ---- refusals: examples and options ----------------------------------------------------------------------------------

DOES_NOT_RUN = r"does not run on {}: RuntimeError: "
WRONG = {
    "channels": (torch.zeros(2, 1, 8, 8), ValueError, DOES_NOT_RUN.format(r"float32 \[2, 1, 8, 8\]") + "Given gr"),
    "too few sizes": (torch.zeros(2, 3), ValueError, DOES_NOT_RUN.format(r"float32 \[2, 3\]") + "Expected 3D"),
    "integers": (torch.zeros(2, 3, 8, 8, dtype=torch.int64), ValueError, r"does not run on int64 \[2, 3, 8, 8\]: "),
    "complex": (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), ValueError, "does not run on complex64"),
    "sparse": (torch.zeros(2, 3, 8, 8).to_sparse(), ValueError, "does not run on float32"),
    "another device": (torch.zeros(2, 3, 8, 8, device="meta"), ValueError, "got a tensor on the meta device"),
    "an array": (torch.zeros(2, 3, 8, 8).numpy(), TypeError, "got ndarray, expected a tensor, a tuple or a mapping"),
    "a number": (3, TypeError, "got int, expected a tensor"),
    "None": (None, TypeError, "got NoneType, expected a tensor"),
    "nothing": ((), ValueError, "no tensor in it"),
    "no tensor": ((None, "x"), ValueError, "no tensor in it"),
    "too many": ((torch.zeros(2, 3, 8, 8),) * 2, TypeError, r"too many positional arguments, Sequential.forward takes"),
    "another name": ({"pixels": torch.zeros(2, 3, 8, 8)}, TypeError, "missing a required argument: 'input'"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("capture", ["auto", "modules"])
def test_50_wrong_examples_are_named(case, capture):
    example, error, message = WRONG[case]
    if capture == "modules" and error is TypeError and isinstance(example, tuple | dict):
        error, message = ValueError, "does not run on"  # the model itself says so
    refused(error, "^example_inputs: " + ".*" + message, plain(), example, capture=capture)


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("dtype", torch.int16, TypeError, "dtype: got torch.int16, expected one of float32"),
        ("tune", "fast", TypeError, "tune: got 'fast', expected True, False or 'auto'"),
        ("verify", "maybe", TypeError, "verify: got 'maybe', expected True, False or 'warn'"),
        ("cuda_graph", 1.5, TypeError, "cuda_graph: got 1.5"),
        ("cuda_graph", True, ValueError, "cuda_graph: got True for a model on cpu"),
    ],
)
def test_50_wrong_options_are_named(option, value, error, message):
    refused(error, message, plain(), images(), **{option: value, "device": "cpu"})


def test_39_train_raises_and_eval_does_not():
    frozen = freeze(cifar(), images(2, 16), tune=False, verify=False)
    assert isinstance(frozen, FrozenModel) and frozen.eval() is frozen and not frozen.training
    for model in (frozen, nn.ModuleList([frozen])):
        with pytest.raises(RuntimeError, match="snapshot for inference"):
            model.train()
    assert not any(m.training for m in frozen.modules())


# ---- the comparison itself -------------------------------------------------------------------------------------------

TAMPER = {
    "a bit of a weight": lambda m: m[0].weight.data.view(torch.int32).view(-1)[:1].add_(1),
    "a buffer": lambda m: m[1].num_batches_tracked.add_(1),
    "a version": lambda m: m[0].weight.detach().add_(0),
    "a parameter's identity": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach())),
    "a flag": lambda m: m[1].train(),
    "requires_grad": lambda m: m[0].weight.requires_grad_(False),
    "a hook": lambda m: m[2].register_forward_hook(lambda *_: None),
    "an attribute": lambda m: setattr(m, "seen", 1),
    "a class": lambda m: setattr(m[1], "__class__", nn.SyncBatchNorm),
    "a child": lambda m: setattr(m, "2", nn.ReLU()),
    "a gradient": lambda m: setattr(m[0].weight, "grad", torch.zeros_like(m[0].weight)),
    "the layout": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("what", TAMPER)
def test_the_comparison_sees(what):
    model = plain()
    with pytest.raises(AssertionError, match="changed"), unchanged(model):
        TAMPER[what](model)
    assert state(model) == state(model)


def test_the_comparison_sees_an_example_and_the_random_state():
    x = images()
    with pytest.raises(AssertionError, match="an example changed"), unchanged(None, {"x": [x]}):
        x[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match="the random state moved"), unchanged(None):
        torch.rand(1)
