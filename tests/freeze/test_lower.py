"""Lowering: a residual is written over where nobody can tell, and nowhere else.

Hand-written networks first, then random graphs of convolutions, sums and views, run as lowered and step by step.
"""

import operator
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres.graph.steps import Graph, Slot, Step, freed
from fastres.inference.executor import Executor
from freeze_cases import Net, agree, compare, freeze, images, settle, written_over

vision = pytest.importorskip("torchvision").models
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


NETS = {  # y is a convolution's output; how many residuals are written over
    "its only reader": (lambda net, y: F.relu(net.second(F.relu(net.second(y))) + y), 1),
    "the input": (lambda net, y: F.relu(net.second(y.tanh()) + net.x), 0),
    "the convolution's own input": (lambda net, y: F.relu(net.second(y) + y), 0),
    "an output": (lambda net, y: (y, F.relu(net.second(y.tanh()) + y)), 0),
    "read later": (lambda net, y: F.relu(net.second(y.tanh()) + y) * y, 0),
    "read later, a view": (lambda net, y: (lambda v: F.relu(net.second(y.tanh()) + y) + v)(y.transpose(2, 3)), 0),
    "a view whose base is read later": (lambda net, y: F.relu(net.second(y.tanh()) + y[:]) + y.sum(), 0),
    "a part that the rest is read of": (
        lambda net, y: (lambda a, b: torch.cat([F.relu(net.second(a.tanh()) + a), b]))(y[:1], y[1:]),
        0,
    ),
    "a copy": (lambda net, y: F.relu(net.second(y.tanh()) + y.flip(2)) * y, 1),
    "an expanded one": (lambda net, y: F.relu(net.second(y.tanh()) + y.mean(0, True).expand_as(y)), 0),
    "a transposed one": (lambda net, y: F.relu(net.second(y.tanh()) + y.transpose(2, 3)), 0),
    "a chain": (lambda net, y: net.block(net.block(net.block(y))), 3),
    "a chain that is kept": (lambda net, y: (lambda a: (a, net.block(a), net.block(net.block(a))))(net.block(y)), 2),
}


@pytest.mark.parametrize("case", NETS)
def test_24_residuals_are_written_over_where_nobody_can_tell(case):
    function, over = NETS[case]

    class Case(Net):
        def block(self, y):
            return F.relu(self.second(F.relu(self.second(y))) + y)

        def forward(self, x):
            self.x = x.repeat(1, 2, 1, 1)[:, :4] if case != "the input" else x
            return function(self, self.first(x) if case != "the input" else x)

    net = Case(None)
    if case == "the input":
        net.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        net.bn2 = settle(nn.BatchNorm2d(3))
    frozen = freeze(net, images(3), tune=False, verify=False)
    assert frozen.report.capture == "graph"
    for batch in (3, 2):
        compare(net, frozen, images(batch).contiguous(memory_format=torch.channels_last))
    assert written_over(frozen, images(3)) == over


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_24_every_blocks_output_kept(name):
    net = settle(getattr(vision, name)(num_classes=4))

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, features=False):
            x, found = net.maxpool(net.relu(net.bn1(net.conv1(x)))), []
            for block in net.layer1:
                found.append(x := block(x))
            return found if features else found[-1]

    frozen = freeze(Stages().eval(), images(2, 32), tune=False, verify=False)
    x = images(3, 32)
    compare(Stages().eval(), frozen, x)
    assert written_over(frozen, x) == len(net.layer1)
    keep = Stages().eval()
    frozen = freeze(keep, images(2, 32), tune=False, verify=False)
    for call in ({"features": True}, {}, {"features": True}):  # captured when it is first asked for
        compare(keep, frozen, x, **call)


def test_24_an_outputs_memory_is_the_callers():
    frozen = agree(Net(lambda net, x: F.relu(net.second(F.relu(net.first(x))) + net.first(x))))
    x = images(3)
    kept = frozen(x)
    want = kept.clone()
    frozen(x), frozen(images(3))
    assert torch.equal(kept, want)


# ---- random graphs ---------------------------------------------------------------------------------------------------

aten, CONV = torch.ops.aten, torch.ops.fastres.conv_act.default
N, C, SIZE = 4, 4, 3


class Draw:
    """A graph of some 14 steps on values of N or N / 2 images."""

    def __init__(self, seed):
        self.random, self.steps = random.Random(seed), []
        self.pool = {N: [Slot(0), Slot(1)], N // 2: []}
        for _ in range(self.random.randint(8, 16)):
            self.step()
        values = [*self.pool[N], *self.pool[N // 2], Slot(2)]
        outputs = tuple(self.random.sample(values, self.random.randint(1, 3)))
        self.graph = freed(Graph(2, ("w", "b"), self.steps, outputs))
        self.graph.check()

    def add(self, function, *args):
        self.steps.append(Step(function, args, {}, 4 + len(self.steps)))
        return Slot(self.steps[-1].writes)

    def step(self):
        d = self.random
        n = d.choice([n for n, found in self.pool.items() if found])
        pool = self.pool[n]
        x, y = pool[-1] if d.random() < 0.5 else d.choice(pool), d.choice(pool)
        kind = d.choice(["conv"] * 6 + ["view"] * 3 + ["copy", "sum", "halves"])
        if kind == "conv":
            rest = None, [1, 1], [1, 1], [1, 1], 1, d.choice(["relu", "none"])
            new = self.add(CONV, x, Slot(2), Slot(3), d.choice([y, y, y, None]), *rest)
        elif kind == "view":
            views = [
                (aten.alias.default,),
                (aten.slice.Tensor, 0, 0, n),
                (aten.transpose.int, 2, 3),
                (aten.expand.default, [n, C, SIZE, SIZE]),
                (aten.reshape.default, [n, C, SIZE, SIZE]),
            ]
            view, *args = d.choice(views)
            new = self.add(view, x, *args)
        elif kind == "copy":
            new = self.add(aten.tanh.default, x) if d.random() < 0.5 else self.add(aten.flip.default, x, [2])
        elif kind == "sum":
            new = self.add(d.choice([aten.add.Tensor, torch.ops.fastres.add_relu.default]), x, y)
        elif n == N:
            both = self.add(aten.split.Tensor, x, N // 2)
            halves = [self.add(operator.getitem, both, i) for i in (0, 1)]
            self.pool[N // 2] += halves
            new = self.add(aten.cat.default, halves if d.random() < 0.5 else halves[::-1])
        else:
            new = self.add(aten.cat.default, [x, y])
            n = N
        self.pool[n].append(new)


def test_24_random_graphs_give_the_answers_of_their_steps():
    """What is written over, and then read, would be seen: no step comes out equal by chance."""
    over = residuals = 0
    for seed in range(300):
        graph = Draw(seed).graph
        executor = Executor(graph)
        last = {"memory_format": torch.channels_last}
        w, b = torch.randn(C, C, 3, 3).div_(4).contiguous(**last), torch.randn(C)
        for _ in range(2):
            given = [torch.randn(N, C, SIZE, SIZE).contiguous(**last) for _ in range(2)]
            want = executor.trace(given, (w, b))
            kept = [t.clone() for t in (*given, w, b)]
            for _ in range(2):
                got = executor.run(given, (w, b))
                for g, t in zip(got, want, strict=True):
                    torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-4, msg=lambda m, s=seed: f"seed {s}: {m}")
                assert all(torch.equal(t, k) for t, k in zip((*given, w, b), kept, strict=True)), seed
        (plan,) = executor._plans.values()
        over += sum("_convolution_pointwise_.binary" in str(call.function) for call in plan.calls)
        residuals += sum(step.operator is CONV and step.args[3] is not None for step in graph.steps)
    assert over > residuals / 10, (over, residuals)  # or this shows nothing
