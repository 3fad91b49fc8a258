"""What freeze's tests share: a network with the test's own forward, comparison with eager, states bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_map

from fastres import models
from fastres.inference import FrozenModel, freeze
from fastres.ops import _conv_native as native


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size)


def settle(net: nn.Module) -> nn.Module:
    """Eval mode; norms have parameters and statistics away from the initial ones, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if "Norm" not in type(module).__name__:
            continue
        for name, low, high in (("weight", 0.5, 1.5), ("running_var", 0.5, 2.0)):
            t = getattr(module, name, None)
            if t is not None:
                t.data.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)
        for name in ("bias", "running_mean"):
            t = getattr(module, name, None)
            if t is not None:
                t.data.copy_(torch.randn(t.shape, generator=generator))
    return net.eval()


def conv_bn(cin: int = 3, cout: int = 4) -> tuple[nn.Conv2d, nn.Module]:
    return nn.Conv2d(cin, cout, 3, padding=1), settle(nn.BatchNorm2d(cout))


def cifar() -> nn.Module:
    """A ResNet of 7 convolutions and 3 blocks, for any image of 3 channels: 5 classes."""
    return settle(models.cifar_resnet(8, num_classes=5))


class Net(nn.Module):
    """Convolutions 3 -> 4 -> 4, their norms, a classifier 4 -> 5; the forward is a function of the net and its input.

    Args:
        prepare: changes the layers before the norms are settled.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        prepare: Callable[[Any], Any] | None = None,
        bias: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=bias), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=bias), norm(4)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 5)
        if prepare is not None:
            prepare(self)
        self.function = forward
        settle(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)

    def first(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]

    def second(self, y: Tensor) -> Tensor:
        return self.bn2(self.conv2(y))  # type: ignore[no-any-return]

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.first(x))
        return y, self.fc(y.mean((2, 3)))


# ---- comparison with eager -------------------------------------------------------------------------------------------


def fixed() -> Net:
    """A network whose graph is for one image width: its code loops over it."""
    return Net(lambda net, x: sum(net.first(x)[..., i] for i in range(x.shape[-1])))


def same(got: Any, want: Any, tol: float = 1e-4, dtypes: bool = True) -> None:
    """One structure, equal leaves: tensors to rounding, NaN as NaN, everything else exactly."""
    (gots, tree), (wants, wanted) = tree_flatten(got), tree_flatten(want)
    assert type(got) is type(want) and str(tree) == str(wanted)
    for g, w in zip(gots, wants, strict=True):
        assert type(g) is type(w) or isinstance(w, Tensor), (g, w)
        if isinstance(w, Tensor):
            assert g.shape == w.shape and (g.dtype == w.dtype or not dtypes)
            torch.testing.assert_close(g.to(w.dtype), w, rtol=tol, atol=tol, equal_nan=True)
        else:
            assert g == w


def compare(net: nn.Module, frozen: Any, *args: Any, tol: float = 1e-4, dtypes: bool = True, **kwargs: Any) -> None:
    """Three calls of one signature: the first lowers the network, the others run its plan. The input stays as it is."""

    def copies() -> Any:
        keep = {"memory_format": torch.preserve_format}
        return tree_map(lambda t: t.clone(**keep) if isinstance(t, Tensor) else t, (args, kwargs))

    given, named = copies()
    with torch.no_grad():
        want = net(*given, **named)
    for _ in range(3):
        given, named = copies()
        same(frozen(*given, **named), want, tol, dtypes)
        same((given, named), (args, kwargs), 0)


def agree(
    net: nn.Module,
    example: Any = None,
    *,
    batches: tuple[int, ...] = (1, 3, 0),
    sizes: tuple[int, ...] = (8,),
    tol: float = 1e-4,
    capture: str = "graph",
    tune: bool = False,
    verify: bool = True,
    dtype: torch.dtype | None = None,
    **counts: int,
) -> FrozenModel:
    """Freeze, which changes nothing of the source; the referee passes, other batches and sizes are answered as eager's.

    Args:
        example: None: images of the first of `sizes`.
        counts: some of the report's.
    """
    example = images(2, sizes[0]) if example is None else example
    with unchanged(net, example):
        frozen = freeze(net, example, capture=capture, tune=tune, verify=verify, dtype=dtype)  # type: ignore[arg-type]
    report = frozen.report
    assert report.capture == capture or capture == "auto"
    assert bool(report.verification) == verify, report
    assert {name: report.counts[name] for name in counts} == counts, report
    for batch, size in itertools.product(batches, (*sizes,) if isinstance(example, Tensor) else ()):
        given = [size] * 2 if example.ndim == 4 and len(sizes) > 1 else example.shape[2:]
        x = torch.randn(batch, example.shape[1], *given)
        if batch or runs(net, x):
            compare(net, frozen, x, tol=tol, dtypes=dtype is None)
    return frozen


def runs(net: nn.Module, x: Tensor) -> bool:
    """Whether the source takes this: some views do not exist of no image."""
    try:
        with torch.no_grad():
            net(x.clone())
    except RuntimeError:
        return False
    return True


def rows(frozen: FrozenModel, kind: str = "") -> dict[str, str]:
    """Why each layer of the report did not become more, by name."""
    return {row.name: row.reason for row in frozen.report.rows if row.reason and kind in ("", row.kind)}


def others(frozen: FrozenModel) -> list[str]:
    """The operators that stay."""
    return [row.name for row in frozen.report.rows if row.kind == "other"]


def notes(frozen: FrozenModel) -> str:
    return "; ".join(frozen.report.notes)


def operators(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """How often each operator is called, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        function(*args)
    return {event.key: event.count for event in seen.key_averages()}


def written_over(frozen: FrozenModel, x: Tensor) -> int:
    """How many convolutions write over a residual: oneDNN's by the profiler, ours in the plan.

    Ours have one name for that and for an output in planned memory: what they are called with tells.
    """
    frozen(x)
    executor, inputs, _ = frozen.prepared(x)
    plan = executor._plans[executor._key(inputs, executor.exact)]
    slots = [dict(call.slots) for call in plan.calls if call.function in (native.into, native.into_1x1)]
    seen = operators(frozen, x)
    return seen.get("mkldnn::_convolution_pointwise_", 0) + sum(3 in s and s[3] == s.get(9) for s in slots)


# ---- the same to the bit ---------------------------------------------------------------------------------------------

_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]


def _tensor(t: Tensor) -> dict[str, Any]:
    if nn.parameter.is_lazy(t):
        return {"id": id(t), "class": type(t)}
    opaque = t.is_meta or t.is_quantized or t.layout is not torch.strided
    return {
        "id": id(t),
        "class": type(t),
        "version": None if t.is_inference() else t._version,
        "address": None if opaque else t.data_ptr(),
        "shape, strides, dtype, device": (tuple(t.shape), None if opaque else t.stride(), t.dtype, t.device),
        "requires_grad": t.requires_grad,
        "names": sorted(vars(t)) if hasattr(t, "__dict__") else [],
        "bits": None if opaque else t.detach().reshape(-1).view(torch.uint8).tolist(),
        "grad": None if t.grad is None else _tensor(t.grad),
    }


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a careless copy of `model` could move: identities and values of modules, tensors and hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = {
            "id": id(module),
            "class": type(module),
            "training": module.training,
            "names": list(module.__dict__),
            "tables": {table: {k: id(v) for k, v in getattr(module, table).items()} for table in _TABLES},
            "values": {k: repr(v) for k, v in module.__dict__.items() if isinstance(v, int | float | str | list)},
            "tensors": {
                k: _tensor(v)
                for table in (module._parameters, module._buffers)
                for k, v in table.items()
                if v is not None
            },
        }
    return found


def tensors(tree: Any) -> list[dict[str, Any]]:
    """The same of every tensor in an example."""
    return [_tensor(t) for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _difference(before: Any, after: Any) -> str:
    """The innermost entries that differ, short."""
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        return "; ".join(f"{k}: {_difference(v, after[k])}" for k, v in before.items() if after[k] != v)
    return f"{str(before)[:80]} -> {str(after)[:80]}"


@contextmanager
def unchanged(model: Any, *others: Any) -> Iterator[None]:
    """Fails where the model, or a tensor of `others`, is not what it was to the bit; also when the body raises."""
    before = state(model) if isinstance(model, nn.Module) else None
    given = tensors(others)
    generator = torch.random.get_rng_state()
    try:
        yield
    finally:
        after = state(model) if isinstance(model, nn.Module) else None
        if before is not None and after is not None:
            assert before.keys() == after.keys()
            for name, entry in before.items():
                for what, value in entry.items():
                    now = after[name][what]
                    assert now == value, f"{name or 'the model'}: {what} changed: {_difference(value, now)}"
        assert tensors(others) == given, "an example changed"
        assert torch.equal(torch.random.get_rng_state(), generator), "the random state moved"
