"""freeze on random networks: every layer, written form, alias and in-place call that a seed happens to draw.

A network is frozen by its graph and compared with its source in float64, at 1, 2 and 3 images, twice each: the first
call lowers the network, the second runs its plan. The answers may be off by what float32 costs: at most four times
eager's own error, and a floor of 2e-5 of the largest answer. Every third network is also copied, or saved and loaded.

More of them than the tests run: FASTRES_FUZZ=1000:3000 pytest tests/freeze/test_freeze_fuzz.py
"""

import copy
import os
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from fastres.inference import load
from freeze_cases import freeze, images, settle, unchanged

FIRST, LAST = (int(n) for n in os.environ.get("FASTRES_FUZZ", "0:40").split(":"))

ACTS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    F.relu,
    F.relu_,
    torch.Tensor.relu,
    lambda t: t.clamp(min=0),
    lambda t: t.clamp_(0),
    lambda t: torch.clamp_min(t, 0),
    lambda t: t.clamp(max=4),
    lambda t: t.clamp(0.1, 3),
    lambda t: torch.maximum(t, t.new_zeros(())),
    lambda t: F.threshold(t, 0, 0),
    lambda t: F.threshold(t, 0.5, 0.1),
    nn.ReLU6(),
    nn.ReLU6(inplace=True),
    lambda t: F.hardtanh(t, 0, 6),
    F.hardtanh,
    lambda t: t.clamp_(0, 6),
    F.silu,
    nn.SiLU(inplace=True),
    lambda t: t * t.sigmoid(),
    lambda t: t.mul_(t.sigmoid()),
    F.hardswish,
    nn.Hardswish(inplace=True),
    lambda t: t * F.relu6(t + 3) / 6,
    lambda t: F.leaky_relu(t, 0.1),
    lambda t: F.leaky_relu_(t, 0.2),
    F.gelu,
    torch.tanh,
    torch.sigmoid,
    lambda t: t * 1,
]
SUMS = [
    lambda a, b: a + b,
    lambda a, b: b + a,
    lambda a, b: a.add_(b),
    lambda a, b: torch.add(b, a),
    lambda a, b: torch.add(a, b, alpha=2),
    lambda a, b: a.sub_(b, alpha=0.5),
    lambda a, b: a - b,
    lambda a, b: a.__iadd__(b),
    lambda a, b: a * b.sigmoid(),
    lambda a, b: a.mul_(b.sigmoid()),
    lambda a, b: a.copy_(b) + 1,
    lambda a, b: torch.cat([a, b], 1).chunk(2, 1)[1] + a,
    lambda a, b: torch.stack([a, b]).sum(0),
    lambda a, b: torch.where(a > b, a, b),
]
# [N, C, H, W] -> the same size, C even
MOVES = [
    lambda t: torch.cat(t.chunk(2, 1)[::-1], 1),
    lambda t: torch.cat([t[:, 1:], t[:, :1]], 1),
    lambda t: t.view(t.shape[0], 2, -1, *t.shape[2:]).transpose(1, 2).reshape(t.shape),
    lambda t: t.reshape(t.shape[0], 2, t.shape[1] // 2, *t.shape[2:]).transpose(1, 2).contiguous().flatten(1, 2),
    lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    lambda t: t.flip(3),
    lambda t: t.transpose(2, 3),
    lambda t: t[:, torch.tensor([1, 0, *range(2, t.shape[1])])],
    lambda t: t[..., :] * 1,
    lambda t: F.pad(t, (1, 0, 0, 1))[:, :, 1:, :-1],
    lambda t: F.pad(t, (1, 1, 1, 1))[..., 1:-1, 1:-1],
    lambda t: t.clone(),
    lambda t: t.detach(),
    lambda t: t.expand(-1, -1, -1, -1),
    lambda t: t.roll(1, 1),
    lambda t: F.dropout(t, 0.5, False),
    lambda t: F.max_pool2d(t, 3, 1, 1),
    lambda t: F.avg_pool2d(t, 3, 1, 1),
    lambda t: F.avg_pool2d(t, 3, 1, 1, count_include_pad=False),
    lambda t: F.interpolate(t, scale_factor=2)[:, :, ::2, ::2],
    lambda t: t.unsqueeze(1).squeeze(1),
    lambda t: torch.einsum("nchw->nhwc", t).permute(0, 3, 1, 2),
]


def _half(t):
    return t[:, : t.shape[1] // 2]


# in-place calls through views; some hand the written tensor on, some a view that was taken before
WRITES = [
    lambda t: (_half(t).mul_(0.5), t)[1],
    lambda t: (_half(t).relu_(), t + 0)[1],
    lambda t: (t[:, 0].zero_(), t)[1],
    lambda t: (t.__setitem__((slice(None), 1), 1.5), t)[1],
    lambda t: (t.__setitem__((slice(None), [0, 1]), t[:, [1, 0]]), t)[1],
    lambda t: (t.__setitem__(t < 0, 0.0), t)[1],
    lambda t: t.masked_fill_(t > 2, 2.0),
    lambda t: (lambda v: (t.relu_(), torch.cat([v, v], 1))[1])(_half(t)),
    lambda t: (lambda v: (v.add_(1), torch.cat([v, t[:, t.shape[1] // 2 :]], 1))[1])(_half(t)),
    lambda t: (lambda a, b: (a.add_(b), t)[1])(*t.chunk(2, 1)),
    lambda t: (lambda a, b: (b.relu_(), torch.cat([b, a], 1))[1])(*t.split(t.shape[1] // 2, 1)),
    lambda t: (t.flatten(1).add_(0.5), t)[1],
    lambda t: (t.permute(0, 2, 3, 1).mul_(torch.linspace(0.5, 1.5, t.shape[1])), t)[1],
    lambda t: (lambda c: (t.relu_(), c + t)[1])(t.clone()),
    lambda t: (lambda s: (t.relu_(), t + s)[1])(t.sigmoid()),
    lambda t: (t.copy_(t.flip(1)), t)[1],
    lambda t: (torch.mul(t, 2, out=t), t)[1],
    lambda t: t.add_(t),
    lambda t: (lambda z: (z[:, 1:].copy_(t[:, :-1]), z)[1])(torch.zeros_like(t)),
    lambda t: (lambda z: (z[:, :1].add_(t[:, -1:]), z + t)[1])(t.new_ones(t.shape[0], *t.shape[1:])),
    lambda t: t.unsqueeze_(0).squeeze_(0).relu_(),
]


class Frozen(nn.Module):
    """A BN written as arithmetic, with an eps of its own."""

    def __init__(self, c):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(c) + 0.5)

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-3).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class Scale(nn.Module):
    """One number a channel, or one in all, in one of the forms that they are written in."""

    def __init__(self, c, form):
        super().__init__()
        self.gain, self.form = nn.Parameter(torch.rand(c) + 0.5), form

    def forward(self, x):
        g = self.gain
        forms = [
            lambda: x * g[:, None, None],
            lambda: g.view(1, -1, 1, 1) * x + 0.5,
            lambda: x / g[None, :, None, None],
            lambda: 1.5 - x,
            lambda: g.exp()[:, None, None] - x,
            lambda: x.mul(2).sub(g[:, None, None], alpha=2),
            lambda: x.div_(3).add_(g[:, None, None]),
            lambda: x * g.double()[:, None, None].float(),
            lambda: x + torch.arange(len(g))[:, None, None],
            lambda: x * torch.tensor(0.7) - g.mean(),
            lambda: torch.rsub(x, g[:, None, None]),
            lambda: x * g[: x.shape[-1], None] if len(g) == x.shape[-1] else x * g[0],
        ]
        return forms[self.form % len(forms)]()


class Random(nn.Module):
    """A network of `length` random steps, written into a list of tensors of two widths at one size of image."""

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        d = self.draw
        self.layers = nn.ModuleList()
        self.steps = []
        widths = [3]  # of every tensor that a later step may read
        for _ in range(d.randint(3, 10)):
            self.step(d, widths)
        self.head = d.choice(["none", "pool", "mean", "flat", "mean kept", "several", "dict"])
        self.fc = nn.Linear(widths[-1], 5)
        settle(self)

    def add(self, layer):
        self.layers.append(layer)
        return len(self.layers) - 1

    def conv(self, d, c, k):
        groups = d.choice([1, 1, 1, c if k % c == 0 else 1])
        size, dilation = d.choice([(1, 1), (3, 1), (3, 1), (3, 2), (5, 1)])
        pad = d.choice([dilation * (size - 1) // 2, "same"])
        bias, mode = d.random() < 0.4, d.choice(["zeros"] * 4 + ["reflect", "circular"])
        kind = d.choice(["conv"] * 8 + ["transposed", "padded", "standardized"])
        if kind == "transposed":
            return nn.ConvTranspose2d(c, k, 3, padding=1, bias=bias)
        if kind == "padded" and size == 3 and dilation == 1:
            return nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(c, k, 3, bias=bias, groups=groups))
        conv = nn.Conv2d(c, k, size, padding=pad, dilation=dilation, groups=groups, bias=bias, padding_mode=mode)
        if kind == "standardized":
            nn.utils.parametrizations.weight_norm(conv)
        return conv

    def norm(self, d, k):
        made = [
            lambda: nn.BatchNorm2d(k),
            lambda: nn.BatchNorm2d(k),
            lambda: nn.BatchNorm2d(k, eps=0.1),
            lambda: nn.BatchNorm2d(k, affine=False),
            lambda: nn.SyncBatchNorm(k),
            lambda: Frozen(k),
            lambda: Scale(k, d.randint(0, 99)),
            lambda: nn.Identity(),
            lambda: nn.GroupNorm(2, k),
        ]
        return d.choice(made)()

    def step(self, d, widths):
        place = d.choice([len(widths) - 1] * 3 + [d.randrange(len(widths))])
        c = widths[place]
        kind = d.choice(["block"] * 5 + ["sum"] * 3 + ["move"] * 2 + ["write"] * 2 + ["act", "norm", "again", "gate"])
        same = [i for i, w in enumerate(widths) if w == c and i != place]
        convs = [(i, s) for i, s in enumerate(self.steps) if s[0] == "block" and s[1][2] == c]
        if kind == "sum" and not same or kind == "again" and not convs or c == 3:
            kind = "block"
        if kind == "block":
            k = d.choice([4, 8])
            self.steps.append(
                (kind, (place, self.add(self.conv(d, c, k)), c, self.add(self.norm(d, k)), d.choice([None, *ACTS])))
            )
            widths.append(k)
        elif kind == "again":  # the same modules once more
            _, (_, conv, _, norm, act) = d.choice(convs)[1]
            norm = d.choice([norm, self.add(nn.BatchNorm2d(self.out(conv)))])
            self.steps.append(("block", (place, conv, c, norm, d.choice([act, F.relu]))))
            widths.append(self.out(conv))
        elif kind == "norm":
            self.steps.append(("norm", (place, self.add(self.norm(d, c)), d.choice([None, *ACTS]))))
            widths.append(c)
        elif kind == "gate":
            self.steps.append(("gate", (place, self.add(nn.Conv2d(c, c, 1)))))
            widths.append(c)
        elif kind == "sum":
            self.steps.append(("sum", (place, d.choice(same), d.choice(SUMS), d.choice([None, *ACTS]))))
            widths.append(c)
        else:
            table = {"act": ACTS, "move": MOVES, "write": WRITES}[kind]
            self.steps.append(("call", (place, d.choice(table))))
            widths.append(c)

    def out(self, conv):
        layer = self.layers[conv]
        return (layer[1] if isinstance(layer, nn.Sequential) else layer).out_channels

    def forward(self, x):
        seen = [x]
        for kind, what in self.steps:
            t = seen[what[0]]
            if t is x:
                t = t * 1 if kind != "block" else t
            if kind == "block":
                _, conv, _, norm, act = what
                t = self.layers[norm](self.layers[conv](t))
                t = t if act is None else act(t)
            elif kind == "norm":
                t = self.layers[what[1]](t)
                t = t if what[2] is None else what[2](t)
            elif kind == "gate":
                t = t * self.layers[what[1]](t.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "sum":
                t = what[2](t, seen[what[1]])
                t = t if what[3] is None else what[3](t)
            else:
                t = what[1](t)
            seen.append(t)
        return self.end(seen)

    def end(self, seen):
        t = seen[-1]
        if self.head == "pool":
            return self.fc(F.adaptive_avg_pool2d(t, 1).flatten(1))
        if self.head == "mean":
            return self.fc(t.mean((2, 3)))
        if self.head == "mean kept":
            return self.fc(t.mean((-1, -2), keepdim=True).view(t.shape[0], -1))
        if self.head == "flat":
            return t.flatten(1).softmax(1), t.shape[0]
        if self.head == "several":
            return t, seen[len(seen) // 2], [t[:, :1], None]
        if self.head == "dict":
            return {"a": t, "b": seen[1:]}
        return t


def tensors(outputs):
    return [t for t in tree_flatten(outputs)[0] if isinstance(t, torch.Tensor)]


def check(net, exact, frozen, x):
    with torch.no_grad():
        want, eager = (tensors(m(t.clone())) for m, t in ((exact, x.double()), (net, x)))
    for _ in range(2):
        given = x.clone()
        got = tensors(frozen(given))
        assert torch.equal(given, x) and len(got) == len(want)
        for g, e, w in zip(got, eager, want, strict=True):
            assert g.shape == e.shape and g.dtype == e.dtype
            if bool(torch.isfinite(w).all()) and w.numel():
                off, own = ((t.double() - w).abs().max().item() for t in (g, e))
                assert off <= 4 * own + 2e-5 * w.abs().max().item(), (off, own)


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_random_networks(seed, tmp_path):
    net = Random(seed)
    exact = copy.deepcopy(net).double()
    example = images()
    with torch.no_grad():
        try:
            net(example.clone())
        except RuntimeError:
            pytest.skip("this one does not run")  # a view of what has no such view
    with unchanged(net, example):
        frozen = freeze(net, example, tune=False, verify=False)
    if frozen.report.capture == "modules":  # written to through a view that no schema tells of
        assert "hands it on" in frozen.report.capture_reason
    elif seed % 3 == 1:
        frozen = copy.deepcopy(frozen)
    elif seed % 3 == 2:
        frozen.save(tmp_path / "frozen")
        frozen = load(tmp_path / "frozen")
    for batch in (1, 2, 3):
        check(net, exact, frozen, images(batch))
