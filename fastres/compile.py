"""The backend: inference graphs with convolutions are rewritten, all others go to Inductor as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._dynamo.exc import RestartAnalysis, SkipFrame

import fastres.ops  # noqa: F401  the operators
from fastres.compile.cpu import Network
from fastres.compile.folds import Folds
from fastres.compile.fuse import Fused, fuse
from fastres.compile.trace import Unchanged, is_weight, trace

logger = logging.getLogger("fastres")

Compiled = Callable[..., Any]
Inner = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one graph of Dynamo's: ``torch.compile(model, backend="fastres")``.

    In a graph for which no gradients are recorded, each convolution takes in the batch norms, residual sum and
    activation that follow it and is one call of ``fastres.conv_act`` on weights folded in float64; batch norms that
    stand alone and residual sums become ``fastres.bn_act`` and ``fastres.add_relu``. The rest of the graph goes to
    Inductor. Weights are folded again when they have changed: after a step of an optimizer, ``load_state_dict``, an
    update of a moving average. On a GPU a write through ``.data`` is not seen.

    Graphs with gradients, and those that cannot be rewritten, go to Inductor unchanged; the logger ``fastres`` says so.

    Args:
        module, example_inputs: from Dynamo.
        mode: of ``torch.compile``, for Inductor.
        options: of ``torch.compile``: settings of Inductor, and ``"inner"``, the name of the backend that gets all
            graphs. Without it that is Inductor, and on a CPU a graph with little beside its convolutions runs on
            packed weights, as a frozen network does.

    Returns:
        A function of the graph's arguments.

    Raises:
        ValueError: an unknown inner backend, or settings of Inductor for another one.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        >>> fast = torch.compile(net, backend="fastres", options={"inner": "aot_eager"})
        >>> with torch.no_grad():
        ...     fast(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """
    inner, named = inner_backend(mode, options)
    if records_gradients(module):
        logger.info("compile: gradients are recorded for this graph, which is compiled as it is; no_grad() fuses it")
        return inner(module, example_inputs)
    if not any(is_kernel(node, x) for node, x in zip(_placeholders(module), example_inputs, strict=True)):
        return inner(module, example_inputs)
    try:
        return _rewritten(module, example_inputs, inner, packs=not named)
    except Unchanged as reason:
        logger.info("compile: a graph is compiled as it is: %s", reason)
    except (RestartAnalysis, SkipFrame):  # Dynamo's own ways
        raise
    except Exception as error:  # what models hold has no end; the graph itself is sound
        text = f"compile: a graph is compiled as it is, rewriting it failed: {type(error).__name__}: {error}"
        if text not in _warned:
            _warned.add(text)
            logger.warning(text)
    return inner(module, example_inputs)


_warned: set[str] = set()


def inner_backend(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Inner, bool]:
    """What compiles the graphs, and whether it was asked for by name.

    Raises:
        ValueError: an unknown backend, or settings of Inductor for another one.
    """
    settings = dict(options or {})
    name = settings.pop("inner", None)
    if mode is not None and mode != "default":
        from torch._inductor import list_mode_options

        settings = {**list_mode_options(mode), **settings}
    if name not in (None, "inductor"):
        known = [other for other in list_backends(None) if other != "fastres"]
        if name not in known:
            raise ValueError(f"options: inner: got {name!r}, expected one of {', '.join(known)}")
        if settings:
            raise ValueError(f"options: got {sorted(settings)}, settings of Inductor, and inner={name!r}")
        named: Any = lookup_backend(name)
        return named, True
    inductor: Any = lookup_backend("inductor")
    return partial(inductor, config_patches=settings) if settings else inductor, name is not None


def records_gradients(module: fx.GraphModule) -> bool:
    """Whether an output of a graph of Dynamo's has a gradient."""
    (output,) = module.graph.find_nodes(op="output")
    values = [node.meta.get("example_value") for node in output.all_input_nodes]
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def is_kernel(node: fx.Node, value: Any) -> bool:
    """Whether an argument may be the weight of a convolution."""
    return isinstance(value, Tensor) and value.ndim == 4 and is_weight(node, value)


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _rewritten(module: fx.GraphModule, inputs: Sequence[Any], inner: Inner, packs: bool) -> Compiled:
    traced = trace(module, inputs)
    if torch.is_grad_enabled() and traced.writes and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise Unchanged("it writes to an argument while gradients are recorded")
    autocast = torch._C._is_any_autocast_enabled()  # its casts are in the traced graph
    with torch.no_grad(), _without_autocast(autocast):
        found = fuse(module, traced, inputs, packs)
        if found is None:
            raise Unchanged("no convolution in it fuses with anything")
        fused, tensors = found
        folds = Folds(fused.weights, fused.make)
        with torch.inference_mode(False):
            folds.put([inputs[place] for place in fused.weights], tensors)
        # fakes: the sizes of made tensors are constants, which only the arguments of Dynamo's need guards for
        made = [traced.mode.from_tensor(t, static_shapes=True) for t in tensors]
        compiled = None if fused.own_weights else inner(fused.module, [*inputs, *made])
    what = ", ".join(f"{count} {name}" for name, count in sorted(fused.counts.items()))
    way = "runs on packed weights" if fused.own_weights else "goes to the compiler"
    logger.info("compile: a graph is fused (%s) and %s", what, way)
    return _Run(module, fused, folds, compiled, autocast)


def _without_autocast(enabled: bool) -> Any:
    return torch._C._DisableAutocast() if enabled else nullcontext()


class _Run:
    """A fused graph as a function of Dynamo's arguments.

    Args:
        source: Dynamo's graph, for weights that do not fold any more.
        compiled: what runs the fused graph, on the arguments and the made tensors; None: `Network`.
        autocast: whether the graph was made under autocast.
    """

    def __init__(
        self, source: fx.GraphModule, fused: Fused, folds: Folds, compiled: Compiled | None, autocast: bool
    ) -> None:
        self.source, self.fused, self.folds, self.compiled, self.autocast = source, fused, folds, compiled, autocast

    def __call__(self, *arguments: Any) -> Any:
        made = self.folds.of(arguments)
        if made.tensors is None:
            return self.source(*arguments)
        with torch.no_grad(), _without_autocast(self.autocast):
            if self.compiled is not None:
                return self.compiled(*arguments, *made.tensors)
            if made.network is None:
                with torch.inference_mode(False):
                    made.network = Network(self.fused.module, made.tensors, self.fused.overflows)
            return made.network(*arguments)
