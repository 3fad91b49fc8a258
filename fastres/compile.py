"""`torch.compile(model, backend="fastres")`: convolutions fused in inference graphs, the rest to Inductor.

The fusions are those of freeze (fastres/graph/fusions), but nothing made of weights is kept: Dynamo hands parameters
and buffers over as arguments of every call, the convolution runs on the weight as it is, and the BN's scale and shift
are computed in the graph. So whatever is written to a weight, in whatever way, the next call follows.

The entry point `torch_dynamo_backends` names this module, so it needs no import of fastres. Whoever imports it has
Dynamo.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fastres.ops  # noqa: F401  the operators
from fastres.graph.dynamo import Traced, Unchanged, is_weight, trace
from fastres.graph.fusions import Weights, fuse
from fastres.graph.normalize import aten, normalize

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
    activation that follow it and is one call of ``fastres.conv_act``, with the BN's scale and shift computed in the
    graph; batch norms that stand alone and residual sums become ``fastres.bn_act`` and ``fastres.add_relu``. The rest
    of the graph goes to Inductor. Nothing made of weights is kept: any change of them is followed.

    Graphs with gradients, and those that cannot be rewritten, go to Inductor unchanged; the logger ``fastres`` says so.

    Args:
        module, example_inputs: from Dynamo.
        mode: of ``torch.compile``, for Inductor.
        options: of ``torch.compile``: settings of Inductor, and ``"inner"``, the name of the backend that gets all
            graphs instead of it.

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
    inner = inner_backend(mode, options)
    if records_gradients(module):
        logger.info("compile: gradients are recorded for this graph, which is compiled as it is; no_grad() fuses it")
        return inner(module, example_inputs)
    if not any(is_kernel(node, x) for node, x in zip(_placeholders(module), example_inputs, strict=True)):
        return inner(module, example_inputs)
    try:
        return _rewritten(module, example_inputs, inner)
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


def inner_backend(mode: str | None, options: Mapping[str, Any] | None) -> Inner:
    """Return what compiles the graphs.

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
        return named  # type: ignore[no-any-return]
    inductor: Any = lookup_backend("inductor")
    return partial(inductor, config_patches=settings) if settings else inductor


def records_gradients(module: fx.GraphModule) -> bool:
    """Tell whether an output of a graph of Dynamo's has a gradient."""
    (output,) = module.graph.find_nodes(op="output")
    values = [node.meta.get("example_value") for node in output.all_input_nodes]
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def is_kernel(node: fx.Node, value: Any) -> bool:
    """Tell whether an argument may be the weight of a convolution."""
    return isinstance(value, Tensor) and value.ndim == 4 and is_weight(node, value)


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _rewritten(module: fx.GraphModule, inputs: Sequence[Any], inner: Inner) -> Compiled:
    traced = trace(module, inputs)
    if torch.is_grad_enabled() and traced.writes and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise Unchanged("it writes to an argument while gradients are recorded")
    autocast = torch._C._is_any_autocast_enabled()  # its casts are in the traced graph
    with torch.no_grad(), _without_autocast(autocast):
        fused, counts = _fused(module, traced, inputs)
        compiled = inner(fused, inputs)
    what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    logger.info("compile: a graph is fused (%s) and goes to the compiler", what)

    def run(*arguments: Any) -> Any:
        with torch.no_grad(), _without_autocast(autocast):
            return compiled(*arguments)

    return run


def _without_autocast(enabled: bool) -> Any:
    return torch._C._DisableAutocast() if enabled else nullcontext()


# ---- the fused graph -------------------------------------------------------------------------------------------------

_COPIES = frozenset({aten.clone.default})  # somebody may write to one that is an output
_BY_STRIDES = {aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default}


def _fused(source: fx.GraphModule, traced: Traced, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Counter[str]]:
    """The fused graph, which takes Dynamo's arguments in their order, and what is in it.

    Raises:
        Unchanged: no convolution fuses with anything.
    """
    graph = traced.graph
    normalize(graph, keep=_COPIES)
    tensors = {name: inputs[place] for name, place in traced.static.items()} | traced.tensors
    weights = Weights(graph, tensors, lambda node: node.meta["dtype"], torch.get_default_dtype(), folds=False)
    fuse(weights)
    rows = [row for row in weights.rows.values()]
    counts: Counter[str] = Counter({"add": "add_relu"}.get(row.kind, row.kind) for row in rows)
    for row in rows:
        if row.kind == "conv":
            acts = bool(row.took) and row.took[-1] not in ("bias", "add", "bn", "scale")
            counts += Counter(bn="bn" in row.took or "scale" in row.took, add="add" in row.took, act=acts)
    if not counts["conv"]:
        raise Unchanged("no convolution in it fuses with anything")
    layouts: list[Any] = [None] if _depends_on_strides(traced) else [torch.channels_last, None]
    for layout in layouts:
        module = _module(source, traced, layout)
        if _keep_strides(module, traced):
            return module, +counts
    raise Unchanged("its outputs would have other strides")


def _module(source: fx.GraphModule, traced: Traced, layout: Any) -> fx.GraphModule:
    """The graph with Dynamo's placeholders for its weights; images that a convolution reads first are laid out."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    own: dict[str, fx.Node] = {}
    for node in source.graph.find_nodes(op="placeholder"):  # with what AOTAutograd asks them for
        own[str(node.target)] = placeholder = graph.placeholder(str(node.target))
        placeholder.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
        placeholder._dynamo_source = getattr(node, "_dynamo_source", None)
    for node in traced.graph.nodes:
        if str(node.target) in own and node.op in ("placeholder", "get_attr"):
            values[node] = own[str(node.target)]
        elif node.op == "get_attr":  # a constant of the graph's own: AOTAutograd knows the source of every attribute
            t = traced.tensors[str(node.target)]
            values[node] = graph.call_function(torch.tensor, (t.tolist(),), {"dtype": t.dtype, "device": t.device})
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], values.__getitem__))
            continue
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            x = node.args[0] if node.target is torch.ops.fastres.conv_act.default else None
            if layout is not None and isinstance(x, fx.Node) and x.op == "placeholder":
                with graph.inserting_before(values[node]):
                    laid = graph.call_function(aten.clone.default, (values[x],), {"memory_format": layout})
                values[node].args = (laid, *values[node].args[1:])
        values[node].meta = {} if node.op == "call_function" else values[node].meta
    module = fx.GraphModule(torch.nn.Module(), graph, "FusedGraph")
    module.meta = dict(source.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id"):
        if hasattr(source, name):
            setattr(module, name, getattr(source, name))
    return module


def _depends_on_strides(traced: Traced) -> bool:
    """Tell whether another memory layout inside could show: values by strides, or outputs that share memory.

    The kernels of attention count: which one runs was decided for the strides of the trace, and it may read no others.
    """
    if any(node.target in _BY_STRIDES or "_scaled_dot_product_" in str(node.target) for node in traced.graph.nodes):
        return True
    storages = [t.untyped_storage()._cdata for t in traced.outputs if isinstance(t, Tensor)]
    return len(set(storages)) < len(storages)


def _keep_strides(module: fx.GraphModule, traced: Traced) -> bool:
    """Copies outputs into the strides that the graph's had, which Dynamo knows them by; False where that fails."""
    with torch.no_grad(), enable_python_dispatcher():
        FakeTensorProp(module, traced.mode).propagate_dont_convert_inputs(*traced.fakes)
    (output,) = module.graph.find_nodes(op="output")
    results: list[Any] = list(output.args[0])
    for place, (result, wanted) in enumerate(zip(results, traced.outputs, strict=True)):
        if not isinstance(result, fx.Node) or result.op == "placeholder" or not isinstance(wanted, Tensor):
            continue
        got = result.meta["val"]
        if all(statically_known_true(a == b) for a, b in zip(got.stride(), wanted.stride(), strict=True)):
            continue
        formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
        ranks = (wanted.ndim, 4, 5)
        fitting = [f for f, n in zip(formats, ranks, strict=True) if wanted.ndim == n and _is_laid_out(wanted, f)]
        if not fitting:
            return False
        with module.graph.inserting_before(output):
            results[place] = module.graph.call_function(aten.clone.default, (result,), {"memory_format": fitting[0]})
    output.args = (tuple(results),)
    for node in module.graph.nodes:
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
    module.recompile()
    return True


def _is_laid_out(t: Tensor, layout: Any) -> bool:
    return bool(t.is_contiguous(memory_format=layout))
