"""A frozen network is called as its source: outputs and arguments of every kind."""

import inspect
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import fastres
from fastres.graph.signature import Signature
from freeze_cases import Net, agree, cifar, compare, freeze, images

Pair = namedtuple("Pair", "features logits")

# ---- outputs ---------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "tensor": lambda x, y, z: z,
    "tuple": lambda x, y, z: (y, z),
    "list": lambda x, y, z: [z, [y]],
    "dict": lambda x, y, z: {"features": y, "logits": z},
    "ordered": lambda x, y, z: OrderedDict(out=z, aux=y),
    "named": lambda x, y, z: Pair(y, z),
    "nested": lambda x, y, z: {"a": (y, {"b": z}), "none": None, "number": 3, "shape": (y.shape[1], 2.5, True)},
    "twice": lambda x, y, z: (z, z),
    "size": lambda x, y, z: (z, z.shape[0]),
    "split": lambda x, y, z: y.split(1, 1),
    "strided": lambda x, y, z: y.view(-1)[::2],
    "infinite": lambda x, y, z: y.where(y > 0.5, float("-inf")),
    "input": lambda x, y, z: (x, z),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind(kind):
    agree(Net(lambda net, x: OUTPUTS[kind](x, *net.head(x))), batches=(2, 1, 5), verify=kind != "infinite")


def test_an_output_that_is_a_weight():
    agree(Net(lambda net, x: (net.fc.weight, net.head(x)[1])))


# ---- arguments -------------------------------------------------------------------------------------------------------


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


def fill(call, batch):
    tensors = images(batch), torch.rand(batch, 5)
    args, kwargs = torch.utils._pytree.tree_map(lambda v: tensors[v] if type(v) is int else v, call)
    return args, kwargs


@pytest.mark.parametrize("first", CALLS[::2])
def test_arguments_by_place_by_name_and_by_default(first):
    net = Arguments(None)
    args, kwargs = fill(first, 2)
    frozen = freeze(net, args or kwargs, tune=False)
    for other in CALLS:  # another kind of call is captured when it comes
        args, kwargs = fill(other, 3)
        compare(net, frozen, *args, **kwargs)
    for args, kwargs, message in (
        ((), {}, "missing"),
        ((images(),), {"wrong": 1}, "unexpected keyword"),
        ((images(), 1.0, None), {}, "too many positional"),
        ((images(),), {"x": 1}, "multiple values"),
    ):
        with pytest.raises(TypeError):
            net(*args, **kwargs)
        with pytest.raises(TypeError, match=message):
            frozen(*args, **kwargs)


def test_plain_arguments_are_part_of_the_signature():
    net = Arguments(None)
    frozen = freeze(net, images(), tune=False)
    for scale in (1, 2, 2, 3, True, 2.0):
        compare(net, frozen, images(), scale)


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(lambda net, x: net.first(x))

    def forward(self, x, others=(), mask=None, *, scale=1.0, names=("a", None)):
        y = self.net(x) * scale
        for other in others:
            y = y + other["t"]
        if mask is not None:
            y = torch.where(mask, y, 0)
        return {"y": y, "pair": Pair(y.mean(), [y.sum(1), names])}


@pytest.mark.parametrize(
    "example",
    [
        lambda n: {"x": images(n), "others": [{"t": torch.randn(n, 4, 8, 8)}, {"t": torch.ones(4, 8, 8)}]},
        lambda n: {"x": images(n), "mask": torch.rand(n, 1, 8, 8) > 0.5, "scale": 2.0},
        lambda n: {"names": ("b", "c"), "x": images(n)},
    ],
    ids=["nested", "mask", "words"],
)
def test_lists_dictionaries_and_words(example):
    net = Many().eval()
    frozen = agree(net, example(2), folded=1)
    for n in (2, 1, 3):
        compare(net, frozen, **example(n))
    compare(net, frozen, images(), (), torch.ones(2, 1, 8, 8, dtype=torch.bool))  # unlike the example: captured anew


def test_the_same_tensor_twice():
    net, x = Net(lambda net, a, b: net.head(a)[1] - net.head(b)[1] * 2), images()
    compare(net, agree(net, (x, x)), images(), images())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.net = nn.Embedding(10, 3), Net(lambda net, x: net.head(x)[1])

    def forward(self, tokens):  # [N, 8, 8]
        return self.net(self.table(tokens).permute(0, 3, 1, 2))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_integers_alone_take_any_batch_and_are_not_cast(batch):
    net = Tokens().eval()
    frozen = agree(net, torch.randint(10, (batch, 8, 8)), sizes=(), folded=1)
    for n in (1, 2, 5):
        compare(net, frozen, torch.randint(10, (n, 8, 8)))
    assert not frozen._variants and "batch" not in " ".join(frozen.report.notes)
    half = freeze(net, torch.randint(10, (batch, 8, 8)), dtype=torch.bfloat16, tune=False)
    assert half(torch.randint(10, (2, 8, 8))).dtype == torch.bfloat16


def test_18_dtypes_and_gradients():
    def forward(net, x, scale, index=None, flag=False):
        y = net.first(x) * scale
        return {"y": y, "index": index, "rest": [y.sum(), flag]}

    net, index = Net(forward), torch.tensor([1, 2])
    example = (images(), torch.tensor(2.0), index, True)
    frozen = freeze(net, example, dtype=torch.bfloat16, tune=False)
    for _ in range(2):
        out = frozen(images(3).requires_grad_(), 0.5, index, True)
        assert out["y"].dtype == torch.bfloat16 and out["index"].dtype == torch.int64
        with pytest.raises(RuntimeError, match="differentiable=True"):
            out["y"].sum().backward()
        assert out["rest"][1] is True and out["y"].shape[0] == 3
    assert not any(t.requires_grad for t in frozen.state_dict(keep_vars=True).values())


def test_signatures_tell_calls_apart():
    def forward(x, y=None, *rest, flag=False, **more): ...

    signature, t = Signature.of(forward), torch.ones(1)
    assert signature.take((t,), {}).tree == signature.take((t, None), {"flag": False}).tree
    assert signature.take((), {"x": t}).tree == signature.take((t,), {}).tree
    call = signature.take((t, None, t), {"flag": True, "z": t})
    assert len(call.tensors) == 3 and [value for _, value in call.plain] == [None, True]
    args, kwargs = call.arguments()
    assert args[1] is None and len(args) == 3 and set(kwargs) == {"flag", "z"}


def test_it_looks_as_its_source_and_has_no_modules():
    frozen = freeze(cifar(), images(2, 16), tune=False, verify=False)
    names = {name.removeprefix("weights.") for name in frozen.state_dict()}
    layers = ("conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)), "fc")
    assert names == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert list(inspect.signature(frozen.forward).parameters) == ["x"] and type(frozen) is fastres.FrozenModel
    with pytest.raises(AttributeError, match=r"no attribute 'module': it runs a list of steps \(.graph\)"):
        frozen.module.conv1  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'conv1'"):
        frozen.conv1  # noqa: B018
    assert not hasattr(frozen, "module")
