"""One evaluation of a model or function on private copies of its inputs: outputs, gradients, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastres._copies import deep_copy

Function = Callable[..., Any]


@dataclass
class Run:
    """The tensors of one evaluation, by name.

    ``grads`` holds None where a gradient was requested and did not arrive. ``buffers`` are a module's after the call,
    and the inputs without gradient; ``moved`` names those that the call wrote to.
    """

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    cotangents: dict[str, Tensor] = field(default_factory=dict)

    def get(self, kind: str, name: str) -> Tensor | None:
        return (self.outputs if kind == "output" else self.grads if kind == "grad" else self.buffers).get(name)

    def tensors(self) -> Iterator[tuple[str, str, Tensor | None]]:
        """(kind, name, tensor) of everything to compare."""
        for kind, tensors in (("output", self.outputs), ("grad", self.grads), ("buffer", self.buffers)):
            yield from ((kind, name, t) for name, t in tensors.items())


def map_tensors(tree: Any, function: Callable[[str, Tensor], Any], name: str) -> Any:
    """``tree`` (tensors in tuples, lists, mappings, nested), each tensor replaced by ``function(name, tensor)``."""
    if isinstance(tree, Tensor):
        return function(name, tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(value, function, f"{name}.{key}") for key, value in tree.items()}
        return type(tree)(**mapped) if not isinstance(tree, dict) else mapped
    if isinstance(tree, tuple | list):
        items = [map_tensors(value, function, f"{name}[{index}]") for index, value in enumerate(tree)]
        if isinstance(tree, tuple):
            return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
        return items
    return tree


def named_tensors(tree: Any, name: str) -> dict[str, Tensor]:
    """Every tensor of ``tree`` by its path: ``output``, ``output[1]``, ``output.logits``."""
    found: dict[str, Tensor] = {}
    map_tensors(tree, found.__setitem__, name)
    return found


def call(function: Function, inputs: Any) -> Any:
    """``function(x)`` for a tensor, ``function(*x)`` for a tuple or list, ``function(**x)`` for a mapping."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    if isinstance(inputs, tuple | list):
        return function(*inputs)
    return function(inputs)


class _Passthrough(torch.autograd.Function):
    """A copy with the same strides, offset and autograd history, which the model may overwrite freely."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return same_strides(leaf)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def same_strides(t: Tensor) -> Tensor:
    """A copy of ``t`` and its storage that keeps strides, storage offset (and so alignment) and expanded dimensions."""
    if t.layout is not torch.strided:
        return t.detach().clone()
    storage = t.detach().untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.shape, t.stride())


def perturb_(t: Tensor, amplitude: float, generator: torch.Generator) -> None:
    """``t *= 1 + amplitude * U(-1, 1)``, elementwise, in place; ``t`` is float64."""
    # drawn on the CPU: the same numbers for every device
    noise = torch.rand(t.shape, dtype=torch.float64, generator=generator).mul_(2).sub_(1)
    t.mul_(noise.mul_(amplitude).add_(1).to(t.device))


def devices_of(*trees: Any) -> list[int]:
    """The indices of all tensors' CUDA devices, for saving and restoring their random state."""
    found: set[int] = set()
    for tree in trees:
        module = isinstance(tree, nn.Module)
        tensors = [*tree.parameters(), *tree.buffers()] if module else named_tensors(tree, "").values()
        found |= {t.device.index for t in tensors if t.device.type == "cuda"}
    return sorted(found)


def evaluate(
    function: Function,
    inputs: Any,
    *,
    wanted: frozenset[str] | None,
    seed: int,
    cotangents: Mapping[str, Tensor] | None = None,
    cast: torch.dtype | None = None,
    amplitude: float = 0.0,
    noise: int = 0,
    mode: Any = None,
) -> Run:
    """Call ``function`` once and, unless ``wanted`` is None, go backward once.

    Args:
        function: a callable, or a module that belongs to this evaluation (its buffers move).
        inputs: tensor, tuple or mapping; copied, never written to.
        wanted: names of the inputs whose gradient is requested; those of a module's parameters that require grad always
            are. None for the forward only.
        cotangents: by output name; drawn from N(0, 1) when None.
        cast: dtype for the floating inputs; float64 also switches autocast off.
        amplitude: relative perturbation of every floating input, parameter and buffer; ``noise`` picks which.
        mode: a context manager to run under.
    """
    generator = torch.Generator().manual_seed(seed * 8 + noise)
    leaves: dict[str, Tensor] = {}
    passed: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}

    def prepare(name: str, t: Tensor) -> Tensor:
        if id(t) not in seen:  # a tensor given twice stays one tensor
            own = same_strides(t)
            if own.dtype.is_floating_point:
                own = own if cast is None else own.to(cast)
                if amplitude:
                    own = own.clone()  # with its own memory, even if dimensions are expanded
                    perturb_(own, amplitude, generator)
            if wanted is not None and name in wanted:
                leaves[name] = own.requires_grad_()
                own = _Passthrough.apply(own)  # type: ignore[no-untyped-call]
            seen[id(t)] = own
        passed[name] = seen[id(t)]
        return seen[id(t)]

    module = function if isinstance(function, nn.Module) else None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(wanted is not None))
        if cast is torch.float64:
            for device in {t.device.type for t in named_tensors(inputs, "").values()} | {"cpu"}:
                stack.enter_context(torch.autocast(device, enabled=False))
        arguments = map_tensors(inputs, prepare, "input")
        if module is not None and amplitude:
            with torch.no_grad():
                for t in [*module.parameters(), *module.buffers()]:
                    if t.dtype.is_floating_point:
                        perturb_(t, amplitude, generator)
        state = {name: t for name, t in passed.items() if not t.requires_grad}
        if module is not None:
            state |= dict(module.named_buffers())
        before = {name: t.detach().clone() for name, t in state.items()}  # batch_norm moves no version counters
        torch.manual_seed(seed)
        with mode if mode is not None else ExitStack():
            outputs = named_tensors(call(function, arguments), "output")
            run = Run({name: t.detach().clone() for name, t in outputs.items()})
            if wanted is not None:
                _backward(run, outputs, leaves, module, cotangents, generator)
    if module is not None:
        state |= dict(module.named_buffers())
    run.buffers = {name: t.detach() for name, t in state.items()}
    run.moved = {name for name, t in state.items() if name not in before or not _same_bits(before[name], t)}
    return run


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality in which NaN equals NaN."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()))


def _backward(
    run: Run,
    outputs: dict[str, Tensor],
    leaves: dict[str, Tensor],
    module: nn.Module | None,
    cotangents: Mapping[str, Tensor] | None,
    generator: torch.Generator,
) -> None:
    targets = dict(leaves)
    if module is not None:
        targets |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    roots = {name: t for name, t in outputs.items() if t.requires_grad}
    for name, t in roots.items():
        if cotangents is None:
            noise = torch.randn(t.shape, dtype=torch.float64, generator=generator)
            run.cotangents[name] = torch.empty_like(t).copy_(noise)
        elif name in cotangents:
            run.cotangents[name] = torch.empty_like(t).copy_(cotangents[name])
    roots = {name: t for name, t in roots.items() if name in run.cotangents}
    if not roots or not targets:
        run.grads = dict.fromkeys(targets)
        return
    grads = torch.autograd.grad(
        list(roots.values()), list(targets.values()), [run.cotangents[name] for name in roots], allow_unused=True
    )
    run.grads = {name: None if g is None else g.detach() for name, g in zip(targets, grads, strict=True)}


def private(argument: str, model: nn.Module) -> nn.Module:
    """A deep copy, flags included; TypeError naming the argument if the model cannot be copied."""
    return deep_copy(model, argument=argument)
