"""What the tests of saved networks share: networks, graphs made by hand, files whose content somebody changed."""

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_structure

import fastres
from fastres._files import write_atomically
from fastres.graph.captured import Captured
from fastres.graph.rows import FreezeRow
from fastres.graph.steps import Graph, Slot, Step, freed
from fastres.inference.file import operators, store
from fastres.inference.file.document import Stored
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport
from fastres.verify.verdict import Row, Verification
from swap_cases import scramble

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
X_ALONE = (Slot(0),)
aten, ours = torch.ops.aten, torch.ops.fastres


class Residual(nn.Module):
    """Convolutions with every epilogue, a residual, a pre-activation norm, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 5)
        self.register_buffer("scale", torch.rand(1, 4, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        y = F.silu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        x = self.last(F.relu(self.norm(x))) * self.scale
        x = F.hardswish(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.fc(x.mean((2, 3))).softmax(1)


def freeze(net, inputs=X, **options):
    return fastres.freeze(scramble(net).eval(), inputs, tune=False, verify=False, **options)


def assert_same(got, want):
    """The same structure, the same bits, the same strides."""
    got_leaves, got_tree = tree_flatten(got)
    want_leaves, want_tree = tree_flatten(want)
    assert str(got_tree) == str(want_tree)
    for a, b in zip(got_leaves, want_leaves, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def stored(steps=(), outputs=X_ALONE, inputs=1, tensors=None, **changes):
    """A Stored of steps (operator, args[, kwargs]) that was made by hand; it takes tensors of [N, 4]."""
    tensors = tensors or {}
    first = inputs + len(tensors)
    rows = [Step(row[0], row[1], dict(*row[2:]), first + i, (), f"step{i}") for i, row in enumerate(steps)]
    given = [(("s0", 4), torch.float32)] * inputs
    flat, outputs_tree = tree_flatten(outputs)
    tree = tree_structure((tuple(range(inputs)), {}))
    graph = freed(Graph(inputs, tuple(tensors), rows, tuple(flat)))
    fields = dict(
        calls=[(graph, Captured(fx.Graph(), given, outputs_tree, tree, (), {}, 2))],
        tensors=tensors,
        signature=[(f"x{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty) for i in range(inputs)],
        dtype=torch.float32,
        plan=Plan(),
        device=torch.device("cpu"),
        report=FreezeReport("Net", "float32", "cpu", []),
    )
    return Stored(**(fields | changes))


def through(path, *args, **kwargs):
    """A network made by hand, saved and loaded."""
    store.write(path, stored(*args, **kwargs))
    return fastres.load(path)


def content(path):
    """The metadata and tensors of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def forge(path, meta, tensors, edit=lambda document, tensors: None, text=None, **metadata):
    """Write a file with a changed document, other tensors or metadata, and the checksum that goes with them."""
    meta, tensors = dict(meta), dict(tensors)
    document = json.loads(meta["model"])
    edit(document, tensors)
    meta |= {"model": json.dumps(document) if text is None else text(meta["model"])} | metadata
    meta["sha256"] = metadata.get("sha256", store.checksum(meta, tensors))
    write_atomically(path, lambda file: store.write_tensors(file, tensors, meta))
    return path


def run(code, *args):
    """A fresh Python process that runs `code`."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- files that are not what they say

CANARY = "__import__('builtins').__dict__.__setitem__('pwned', 1)"
JUNK = [
    None,
    True,
    -1,
    2**31,
    2**62,
    2**70,
    0.5,
    "",
    "x",
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    {"tuple": []},
    [{}] * 3,
    CANARY,
]
JUNK += [
    {"slot": 0},
    {"slot": 7},
    {"slot": 99},
    {"dtype": "int64"},
    {"float": "nan"},
    {"device": "cpu"},
    [1, 2],
    "relu",
]


def hostile_base(path):
    """A file that is fine: x -> conv -> bn_act -> * scale -> clone -> mean -> linear; and the images, doubled."""
    torch.manual_seed(0)
    tensors = {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "conv.bias": torch.randn(4),
        "part.scale": torch.rand(1, 4, 1, 1),
    }
    tensors |= {f"norm.{name}": torch.rand(4) + 0.5 for name in ("weight", "bias", "mean", "var")}
    tensors |= {"fc.weight": torch.randn(2, 4), "fc.bias": torch.randn(2)}
    place = {name: Slot(1 + i) for i, name in enumerate(tensors)}
    norm = [place[f"norm.{name}"] for name in ("weight", "bias", "mean", "var")]
    pair, conv = [1, 1], (Slot(0), place["conv.weight"], place["conv.bias"])
    steps = [
        (aten.sym_size.int, (Slot(0), 0)),
        (operators.PYTHON["operator.mul"][0], (Slot(10), 2)),
        (ours.conv_act.default, (*conv, None, None, pair, pair, pair, 1, "relu")),
        (ours.bn_act.default, (Slot(12), *norm, None, False, 1e-5, "relu")),
        (operators.PYTHON["operator.getitem"][0], (Slot(13), 0)),
        (aten.mul.Tensor, (Slot(14), place["part.scale"])),
        (aten.clone.default, (Slot(15),), {"memory_format": torch.contiguous_format}),
        (aten.mean.dim, (Slot(16), [2, 3])),
        (aten.linear.default, (Slot(17), place["fc.weight"], place["fc.bias"])),
    ]
    judged = Verification((Row("out", "output", (2,), "float32", *(0.0,) * 6, 1.0, True),), "float32", False, False)
    rows = [FreezeRow("conv", "conv", "conv + relu", "NO_NORM", "none", ("relu",))]
    report = FreezeReport("Net", "float32", "cpu", rows, milliseconds={"eager": 1.5}, notes=["a"], verification=judged)
    network = stored(steps, {"out": Slot(18), "rest": [Slot(11)]}, tensors=tensors, report=report)
    network.calls[0][1].inputs = [(("s0", 3, 6, 6), torch.float32)]
    network.likeness = {"attributes": {"size": 6, "names": ["a"]}}
    store.write(path, network)


def refused(path, words=""):
    """The error of loading this file, as it must be."""
    with pytest.raises(fastres.FrozenFileError) as caught:
        fastres.load(path)
    text, start = str(caught.value), f"path: {os.fspath(path)!r}: "
    assert text.startswith(start) and len(text) < 700 and "\n" not in text[len(start) :], text
    assert re.search(words, text[len(start) :]), text


def harmless(path):
    """Whether it loads; if so it calls nothing that is not allowed, and answers or raises an ordinary error."""
    try:
        model = fastres.load(path)
    except fastres.FrozenFileError as error:
        assert str(error).startswith(f"path: {os.fspath(path)!r}: ")
        return False
    for step in model.graph.steps:
        assert operators.operator_for(operators.name_of(step.operator), step.args, step.kwargs) is step.operator
    for x in (torch.randn(3, 3, 6, 6), torch.full((2, 3, 6, 6), torch.nan)):
        try:
            model(x), model(x)
        except Exception as error:
            assert not isinstance(error, AssertionError | NameError), error
    str(model), str(model.report), model.state_dict()
    return True
