"""freeze on what nobody adapted: a clear error, or a fallback that the report names; the source never changes."""

from __future__ import annotations

import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

import fastres
from fastres.inference import freeze
from fastres.verify.runs import call
from freeze_cases import state, unchanged


def conv_bn(cin=3, cout=4):
    bn = nn.BatchNorm2d(cout)
    nn.init.normal_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.5, 2.0)
    return nn.Conv2d(cin, cout, 3, padding=1), bn


def plain():
    return nn.Sequential(*conv_bn(), nn.ReLU()).eval()


def images(batch=2):
    return torch.randn(batch, 3, 8, 8)


def frozen_of(model, example, **options):
    """Frozen, with the source, the example and the random state found unchanged to the bit."""
    with unchanged(model, example):
        return freeze(model, example, **{"tune": False, **options})


def refused(error, message, model, example, **options):
    with unchanged(model, example), pytest.raises(error, match=message) as caught:
        freeze(model, example, **{"tune": False, **options})
    assert "\n" not in str(caught.value)


def agrees(fast, model, inputs):
    """The frozen answers are the source's in eval mode, structure, types and NaN included."""
    flags = {m: m.training for m in model.modules()}
    with torch.no_grad():
        want = call(model.eval(), inputs)
    for m, flag in flags.items():
        m.training = flag
    got = call(fast, inputs)
    leaves, tree = torch.utils._pytree.tree_flatten(got)
    theirs, wanted = torch.utils._pytree.tree_flatten(want)
    assert str(tree) == str(wanted)
    for mine, their in zip(leaves, theirs, strict=True):
        if isinstance(their, torch.Tensor):
            torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert type(mine) is type(their) and mine == their


def notes(fast):
    return "; ".join(fast.report.notes)


# ---- training mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["all of it", "a layer", "a layer frozen in eval mode"])
@pytest.mark.parametrize("tune", [False, True])
def test_training_mode_is_frozen_as_eval_mode_and_said(where, tune):
    model = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Dropout(0.5))
    if where == "a layer":
        model.eval()[1].train()
    elif where == "a layer frozen in eval mode":
        model.train()[1].eval()
    fast = frozen_of(model, images(), tune=tune)
    assert "the model is in training mode; frozen as in eval mode" in notes(fast)
    assert fast.report.folded == 1 and fast.report.verification
    agrees(fast, model, images(3))


def test_a_model_with_gradients_and_hooks_of_its_own_stays_as_it_is():
    model = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    model(images()).sum().backward()
    model[0].weight.requires_grad_(False)
    model[0].weight.note = "mine"
    model[2].register_forward_hook(lambda m, a, y: y + 1)
    model.register_buffer("spare", None)
    fast = frozen_of(model, images())
    assert fast.report.capture == "modules" and "hooks" in notes(fast)
    agrees(fast, model, images(3))


# ---- control flow that depends on data -------------------------------------------------------------------------------


class Branch(nn.Module):
    """Its first BN runs for bright images alone; the second pair always."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn(3, 3)
        self.rest = nn.Sequential(*conv_bn(3, 4), nn.ReLU())

    def forward(self, x):
        y = self.conv(x)
        if x.mean() > 0:
            y = self.bn(y)
        return self.rest(y)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = nn.Sequential(*conv_bn(3, 3), nn.ReLU())

    def forward(self, x):
        for _ in range(int(x.abs().max() * 2)):
            x = self.step(x)
        return x


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("example", [1.0, -1.0], ids=["bright", "dark"])
def test_both_branches_are_right_whichever_the_example_took(example, tune):
    model = Branch().eval()
    fast = frozen_of(model, images().abs() * example, tune=tune)
    assert fast.report.capture == "modules" and "data-dependent" in notes(fast)
    assert fast.report.verification
    for sign in (1.0, -1.0, 1.0):
        for batch in (1, 3, 3, 3):  # modules, then a recording, then a program if there is one
            agrees(fast, model, images(batch).abs() * sign)


def test_a_loop_whose_length_the_input_decides():
    model = Loop().eval()
    fast = frozen_of(model, images().clamp(-1, 1))
    assert fast.report.capture == "modules" and fast.report.verification
    for largest in (0.2, 0.6, 1.2, 2.1):
        x = images(3).clamp(-1, 1)
        x[0, 0, 0, 0] = largest
        agrees(fast, model, x)


def test_a_graph_that_is_insisted_on_and_not_there():
    message = "capture: got 'graph', and Branch has none: torch.export: .*data-dependent"
    refused(ValueError, message, Branch().eval(), images(), capture="graph")


# ---- several inputs and outputs --------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn()

    def forward(self, x, others=(), mask=None, *, scale=1.0, names=("a", None)):
        y = self.bn(self.conv(x)) * scale
        for other in others:
            y = y + other["t"]
        if mask is not None:
            y = torch.where(mask, y, 0)
        return {"y": y, "pair": Pair(y.mean(), [y.sum(1), names]), "shape": (y.shape[1], None, 2.5, True)}


@pytest.mark.parametrize(
    "example",
    [
        lambda: images(),
        lambda: (images(), [{"t": torch.randn(2, 4, 8, 8)}, {"t": torch.ones(4, 8, 8)}]),
        lambda: {"x": images(), "mask": torch.rand(2, 1, 8, 8) > 0.5, "scale": 2.0},
        lambda: {"names": ("b", "c"), "x": images()},
    ],
    ids=["one", "nested", "mask", "words"],
)
def test_several_inputs_and_outputs(example):
    model = Many().eval()
    given = example()
    fast = frozen_of(model, given)
    assert fast.report.folded == 1 and fast.report.verification and fast.report.capture == "graph"
    agrees(fast, model, given)
    agrees(fast, model, example())
    agrees(fast, model, (images(), (), torch.ones(2, 1, 8, 8, dtype=torch.bool)))  # unlike the example: captured anew
    agrees(fast, model, {"x": images(3), "scale": -1.5})


def test_wrong_calls_of_a_frozen_model_raise_as_the_source_s():
    model = Many().eval()
    fast = frozen_of(model, images())
    for args, kwargs in (((), {}), ((images(), (), None, 1), {}), ((images(),), {"x": 1}), ((images(),), {"size": 2})):
        with pytest.raises(TypeError):
            model(*args, **kwargs)
        with pytest.raises(TypeError):
            fast(*args, **kwargs)


# ---- other networks --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Tokens to a class, by convolutions."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.bn = nn.Embedding(10, 4), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)

    def forward(self, tokens):
        return self.bn(self.conv(self.embed(tokens).transpose(1, 2))).relu().amax(-1)


class Camera(nn.Module):
    """Bytes to features."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn()

    def forward(self, x):
        return self.bn(self.conv(x.float() / 255))


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
    model = make().eval()
    fast = frozen_of(model, example(2))
    assert fast.report.verification and str(fast.report).startswith(f"{type(model).__name__}: 0 of 0 conv")
    for n in (2, 1, 3):
        agrees(fast, model, example(n))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_integers_alone_take_any_batch(batch):
    model = Classifier().eval()
    fast = frozen_of(model, torch.randint(10, (batch, 7)))
    assert fast.report.capture == "graph" and fast.report.folded == 1 and fast.report.verification
    for n in (1, 2, 5):
        agrees(fast, model, torch.randint(10, (n, 7)))
    assert not fast._variants.found and "batch" not in notes(fast)


def test_bytes_are_judged_beside_eager_where_float64_does_not_run():
    model = Camera().eval()
    fast = frozen_of(model, torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8))
    assert fast.report.folded == 1 and fast.report.verification is None
    assert "not verified, the model does not run in float64" in notes(fast) and "its answers are eager's to" in notes(
        fast
    )
    agrees(fast, model, torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8))


def test_a_wrong_answer_is_found_without_float64_too(monkeypatch):
    from fastres.inference.constants import Constants

    rounded = Constants.rounded
    monkeypatch.setattr(Constants, "rounded", lambda self, *args: rounded(self, *args) * 1.5)
    # which finds it first, and takes the modules instead
    monkeypatch.setattr("fastres.inference.making._why_not_any_batch", lambda *args: "")
    model = nn.Sequential(Camera(), nn.Conv2d(4, 2, 1)).eval()
    refused(
        RuntimeError,
        "output of the frozen Sequential is not the source's",
        model,
        torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8),
    )


# ---- empty -----------------------------------------------------------------------------------------------------------


def test_no_images_at_all():
    model = plain()
    refused(ValueError, r"example_inputs: got float32 \[0, 3, 8, 8\] without an element", model, images(0))
    fast = frozen_of(model, images())
    for _ in range(3):
        empty = fast(images(0))
        assert empty.shape == (0, 4, 8, 8) and empty.dtype == torch.float32
    agrees(fast, model, images(2))


# ---- numbers that are not finite, weights that are not there ---------------------------------------------------------

BROKEN = {
    "convolution": lambda m: m[0].weight.data[0].fill_(float("nan")),
    "running mean": lambda m: m[1].running_mean[:1].fill_(float("nan")),
    "running variance": lambda m: m[1].running_var[:1].fill_(float("nan")),
    "BN weight": lambda m: m[1].weight.data[:1].fill_(float("nan")),
    "linear": lambda m: m[4].weight.data[0, 0].fill_(float("-inf")),
}


@pytest.mark.parametrize("where", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_in_weights_are_reported_and_pass_as_in_eager(where, dtype):
    model = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    BROKEN[where](model)
    fast = frozen_of(model, images(), dtype=dtype)
    assert "not finite" in notes(fast) and fast.report.verification
    x = images(3)
    with torch.no_grad():
        want = model(x)
    assert not want.isfinite().all()
    for _ in range(3):
        got = fast(x)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        if dtype is torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_weights_on_meta():
    message = "model: it is on the meta device and has no weights to fold"
    refused(ValueError, message, plain().to("meta"), images())
    model = plain()
    model[1].to("meta")
    refused(ValueError, message, model, images())


def test_weights_of_a_lazy_module_have_no_shape_yet():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    refused(ValueError, "model: 0.weight has no shape yet: run the model once", model, images())
    model(images())
    agrees(frozen_of(model, images()), model, images(3))


# ---- models that are no float networks -------------------------------------------------------------------------------


def quantised(how):
    from torch.ao import quantization as q

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "dynamic":
            net = nn.Sequential(*conv_bn(), nn.Flatten(), nn.Linear(256, 3)).eval()
            return q.quantize_dynamic(net, {nn.Linear}), "3 is a quantised Linear"
        net = nn.Sequential(q.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), q.DeQuantStub()).eval()
        net.qconfig = q.get_default_qconfig("x86" if "x86" in torch.backends.quantized.supported_engines else "fbgemm")
        prepared = q.prepare(q.fuse_modules(net, ["1", "2"]))
        prepared(images())
        return q.convert(prepared), "0 is a quantised Quantize"


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_a_quantised_model_is_refused_by_the_layer_s_name(how):
    model, layer = quantised(how)
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(
        TypeError, match=rf"model: {layer} \(torch.ao.nn.*expected float weights: freeze the model that"
    ):
        freeze(model, images(), tune=False)
    assert {name: id(m) for name, m in model.named_modules()} == before


@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda model: torch.jit.trace(model, images())], ids=["script", "trace"]
)
def test_torchscript_is_refused(how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = how(plain())
    with pytest.raises(TypeError, match="model: got a .*Module, expected the nn.Module that it was made of"):
        freeze(model, images())


def test_a_compiled_model_and_one_for_several_gpus_run():
    for model in (torch.compile(plain(), backend="eager"), nn.DataParallel(plain()).eval()):
        fast = freeze(model, images(), tune=False)
        assert fast.report.folded == 1 and fast.report.verification
        agrees(fast, model, images(3))


def test_weights_of_another_tensor_class_are_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    model = plain()
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    with pytest.raises(TypeError, match="model: 0.weight is a TwoTensor, expected a tensor"):
        freeze(model, images())


# ---- wrong examples --------------------------------------------------------------------------------------------------

WRONG = {
    "channels": (
        torch.zeros(2, 1, 8, 8),
        ValueError,
        r"does not run on float32 \[2, 1, 8, 8\]: RuntimeError: Given gr",
    ),
    "too few sizes": (torch.zeros(2, 3), ValueError, r"does not run on float32 \[2, 3\]: RuntimeError: Expected 3D"),
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
def test_wrong_examples_are_named(case, capture):
    example, error, message = WRONG[case]
    if capture == "modules" and error is TypeError and isinstance(example, tuple | dict):
        error, message = ValueError, "does not run on"  # the model itself says so
    refused(error, "^example_inputs: " + ".*" + message, plain(), example, capture=capture)


def test_an_example_in_another_floating_dtype_is_cast():
    for dtype in (torch.float64, torch.float16):
        model = plain()
        fast = frozen_of(model, images().to(dtype))
        assert fast.report.verification and fast.report.dtype == "float32"
        x = images(3)
        torch.testing.assert_close(fast(x.double()), model(x).detach(), rtol=1e-4, atol=1e-5)


# ---- forwards with side effects --------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Its answer depends on how often it ran."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.bn(self.conv(x)) + self.calls


@pytest.mark.parametrize("tune", [False, True])
def test_state_that_the_forward_keeps_begins_where_the_source_s_is(tune):
    model = Counting().eval()
    model.calls.fill_(5)
    fast = frozen_of(model, images(), tune=tune)
    assert "its forward writes to calls" in notes(fast) and fast.report.verification
    for _ in range(4):
        agrees(fast, model, images(3))  # each counts for itself
    assert float(model.calls) == 9


class Renormed(nn.Conv2d):
    """The max-norm constraint of EEGNet, taken in forward."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Halved(nn.Conv2d):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


@pytest.mark.parametrize("layer", [Renormed, Halved])
@pytest.mark.parametrize("tune", [False, True])
def test_a_forward_that_writes_to_its_parameters_writes_to_copies(layer, tune):
    model = nn.Sequential(layer(3, 4, 3), nn.ReLU()).eval()
    fast = frozen_of(model, images(), tune=tune)
    assert fast.report.capture == "modules" and fast.report.verification
    for _ in range(3):
        agrees(fast, model, images(3))


@pytest.mark.parametrize("capture", ["auto", "modules"])
@pytest.mark.parametrize("tune", [False, True])
def test_a_network_that_writes_to_its_input_leaves_the_example_alone(capture, tune):
    class Doubled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model = Doubled(*conv_bn(), nn.ReLU()).eval()
    example = images()
    with unchanged(model, example):
        fast = freeze(model, example, tune=tune, capture=capture)
    assert fast.report.folded == 1 and fast.report.verification
    x = images(3)
    got = fast(x.clone())
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_outputs_that_are_no_tensors_are_not_verified_and_that_is_said():
    class Result:
        def __init__(self, y):
            self.y = y

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()

        def forward(self, x):
            return Result(self.net(x))

    model = Wrapped().eval()
    fast = frozen_of(model, images())
    assert fast.report.capture == "modules" and fast.report.verification is None
    assert "not verified, its output holds no tensor" in notes(fast) and "not verified" in str(fast.report)
    x = images(3)
    torch.testing.assert_close(fast(x).y, model(x).y.detach(), rtol=1e-4, atol=1e-5)


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


def test_public_names():
    assert fastres.freeze is freeze
