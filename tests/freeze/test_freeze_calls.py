"""A frozen graph is called as its source: arguments, outputs, batches, other image sizes, and where they cannot be."""

import copy
import gc
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastres
from fastres import models
from fastres.inference import freeze
from fastres.inference.signature import Signature

Pair = namedtuple("Pair", "features logits")


def sample():
    net = models.cifar_resnet(8, num_classes=5)
    net.train()(torch.randn(8, 3, 16, 16))
    return net.eval()


def frozen_of(net, inputs, **how):
    frozen = freeze(net, inputs, tune=False, capture="graph", **how)
    assert frozen.report.capture == "graph"
    return frozen


def same(got, want):
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        return
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, tuple | list):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            same(g, w)
    else:
        assert got == want


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.bn.running_mean.normal_()
        self.eval()

    def head(self, x):
        y = F.relu(self.bn(self.conv(x)))
        return y, self.fc(y.mean((2, 3)))


# ---- outputs -----------------------------------------------------------------------------------------------------

OUTPUTS = {
    "tensor": lambda y, z: z,
    "tuple": lambda y, z: (y, z),
    "list": lambda y, z: [z, [y]],
    "dict": lambda y, z: {"features": y, "logits": z},
    "ordered": lambda y, z: OrderedDict(out=z, aux=y),
    "named": lambda y, z: Pair(y, z),
    "nested": lambda y, z: {"a": (y, {"b": z}), "none": None, "number": 3},
    "twice": lambda y, z: (z, z),
    "size": lambda y, z: (z, z.shape[0]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind(kind):
    class Out(Net):
        def forward(self, x):
            return OUTPUTS[kind](*self.head(x))

    net = Out()
    frozen = frozen_of(net, torch.randn(2, 3, 8, 8))
    for batch in (2, 1, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            same(frozen(x), net(x))
            same(frozen(x), net(x))  # by its program


def test_an_output_that_is_the_input_and_one_that_is_a_weight():
    class Out(Net):
        def forward(self, x):
            return x, self.fc.weight, self.head(x)[1]

    net = Out()
    frozen = frozen_of(net, torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        same(frozen(x), net(x))


# ---- arguments -----------------------------------------------------------------------------------------------------


class Arguments(Net):
    def forward(self, x, scale=1.0, *, mask=None, features=False):
        y, z = self.head(x)
        z = z * scale if mask is None else z * scale * mask
        return (z, y) if features else z


CALLS = [
    ((), {"x": 0}),
    ((0,), {"scale": 1.0}),
    ((0, 2.0), {}),
    ((0,), {"features": True}),
    ((0,), {"mask": 1}),
    ((0, 3.0), {"mask": 1, "features": True}),
]


def fill(call, x, mask):
    args, kwargs = call
    tensors = {0: x, 1: mask}

    def value(v):
        return tensors[v] if type(v) is int else v

    return tuple(map(value, args)), {name: value(v) for name, v in kwargs.items()}


@pytest.mark.parametrize("first", CALLS)
def test_arguments_by_place_by_name_and_by_default(first):
    net = Arguments()
    x, mask = torch.randn(2, 3, 8, 8), torch.rand(2, 2)
    args, kwargs = fill(first, x, mask)
    example = kwargs if not args else args
    frozen = frozen_of(net, example)
    for other in CALLS:  # another kind of call is captured when it comes
        args, kwargs = fill(other, torch.randn(3, 3, 8, 8), torch.rand(3, 2))
        with torch.no_grad():
            same(frozen(*args, **kwargs), net(*args, **kwargs))
    with pytest.raises(TypeError, match="unexpected keyword"):
        frozen(x, wrong=1)
    with pytest.raises(TypeError, match="missing"):
        frozen()


def test_several_tensors_lists_and_dictionaries_of_them():
    class Many(Net):
        def forward(self, images, extra):
            y, z = self.head(images["left"])
            return z + self.head(images["right"])[1] + extra[0] * extra[1]

    net = Many()

    def example(n):
        images = {"left": torch.randn(n, 3, 8, 8), "right": torch.randn(n, 3, 8, 8)}
        return images, [torch.randn(n, 2), torch.randn(n, 1)]

    frozen = frozen_of(net, example(2))
    for batch in (1, 2, 4):
        given = example(batch)
        with torch.no_grad():
            same(frozen(*given), net(*given))


def test_integers_pass_and_are_not_cast():
    class Embedded(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 3)

        def forward(self, tokens):  # [N, 8, 8]
            return self.head(self.table(tokens).permute(0, 3, 1, 2))[1]

    net = Embedded()
    frozen = frozen_of(net, torch.randint(0, 10, (2, 8, 8)))
    tokens = torch.randint(0, 10, (5, 8, 8))
    with torch.no_grad():
        same(frozen(tokens), net(tokens))
        half = freeze(net, tokens, dtype=torch.bfloat16, tune=False, capture="graph")
        assert half(tokens).dtype == torch.bfloat16


def test_the_same_tensor_twice():
    class Twice(Net):
        def forward(self, a, b):
            return self.head(a)[1] - self.head(b)[1] * 2

    net, x = Twice(), torch.randn(2, 3, 8, 8)
    frozen = frozen_of(net, (x, x))
    a, b = torch.randn(2, 2, 3, 8, 8)
    with torch.no_grad():
        same(frozen(a, b), net(a, b))


def test_signatures_tell_calls_apart():
    def forward(x, y=None, *rest, flag=False, **more): ...

    signature, t = Signature.of(forward), torch.ones(1)
    assert signature.take((t,), {}).tree == signature.take((t, None), {"flag": False}).tree
    assert signature.take((), {"x": t}).tree == signature.take((t,), {}).tree
    call = signature.take((t, None, t), {"flag": True, "z": t})
    assert len(call.tensors) == 3 and [value for _, value in call.plain] == [None, True]
    args, kwargs = call.arguments()
    assert args[1] is None and len(args) == 3 and set(kwargs) == {"flag", "z"}


# ---- batches and image sizes -----------------------------------------------------------------------------------------


def test_any_batch_by_one_capture():
    net = sample()
    frozen = frozen_of(net, torch.randn(1, 3, 16, 16))
    for batch in (0, 1, 2, 7):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            same(frozen(x), net(x))
    assert not frozen._variants.found


def test_other_image_sizes_are_captured_on_their_first_call_and_share_the_weights():
    net = sample()
    frozen = frozen_of(net, torch.randn(2, 3, 16, 16))
    before = sum(t.numel() for t in frozen.state_dict().values())
    for size in (24, 8, 24, 16):
        x = torch.randn(3, 3, size, size)
        with torch.no_grad():
            same(frozen(x), net(x))
    assert len(frozen._variants.found) == 2 and sum(t.numel() for t in frozen.state_dict().values()) == before
    mine = {t.data_ptr() for t in frozen.module.parameters()}
    for variant in frozen._variants.found:
        assert {t.data_ptr() for t in variant.module.parameters()} <= mine
    with torch.no_grad():
        net.fc.bias.add_(1)
    assert not torch.equal(frozen(x), net(x))  # a snapshot, at every size
    with pytest.raises(
        RuntimeError, match=r"got \[2, 3, 32, 32\]; .* captured for \[N, 3, 16, 16\].*refresh\(\) first"
    ):
        frozen(torch.randn(2, 3, 32, 32))
    frozen.refresh()
    for size in (16, 24, 32):
        x = torch.randn(3, 3, size, size)
        with torch.no_grad():
            same(frozen(x), net(x))


def test_other_image_sizes_need_the_source():
    net = sample()
    frozen = frozen_of(net, torch.randn(2, 3, 16, 16))
    copied = copy.deepcopy(frozen)
    assert copied(torch.randn(1, 3, 24, 24)).shape == (1, 5)
    del net
    gc.collect()
    with pytest.raises(RuntimeError, match=r"input: got \[1, 3, 24, 24\].*for \[N, 3, 16, 16\].*source.*is gone"):
        frozen(torch.randn(1, 3, 24, 24))
    assert frozen(torch.randn(1, 3, 16, 16)).shape == (1, 5)


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 4, 16, 16), torch.randn(3, 16), torch.randn(2, 3, 16, 16, 1)],
    ids=["channels", "dimensions", "more dimensions"],
)
def test_inputs_that_the_source_does_not_take(x):
    frozen = frozen_of(sample(), torch.randn(2, 3, 16, 16))
    keep = sample()
    frozen = frozen_of(keep, torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"input: got \[.*captured for \[N, 3, 16, 16\], and it cannot be for this"):
        frozen(x)
    assert frozen(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_a_network_that_fixes_its_batch_is_captured_for_each():
    class Fixed(Net):
        def forward(self, x):
            return self.head(x)[1].view(2, -1) if x.shape[0] == 2 else self.head(x)[1]

    net = Fixed()
    frozen = freeze(net, torch.randn(2, 3, 8, 8), tune=False)
    for batch in (2, 1, 3):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            same(frozen(x), net(x))


def test_no_autograd_on_its_path():
    frozen = frozen_of(sample(), torch.randn(2, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    assert not frozen(x).requires_grad and not any(p.requires_grad for p in frozen.parameters())
    with torch.inference_mode():
        y = frozen(x)
    assert torch.equal(y, frozen(x))


def test_state_dict_has_the_sources_names():
    net = sample()
    frozen = frozen_of(net, torch.randn(2, 3, 16, 16))
    names = {name.removeprefix("module.") for name in frozen.state_dict()}
    assert {"conv1.weight", "conv1.bias", "layer1.0.conv1.weight", "fc.weight", "fc.bias"} <= names
    assert not any("bn" in name for name in names) and fastres.FrozenModel is type(frozen)
