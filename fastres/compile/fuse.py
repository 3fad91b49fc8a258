"""The graph of fused operators: each region of `fastres.inference.regions` is one call, on weights folded outside.

    conv region     fastres.conv_act(x, w', b', residual, ...)     w', b' of `fastres.nn.fold`
    norm region     fastres.bn_act(x, ..., residual)               a BN that no convolution takes in
    add and ReLU    fastres.add_relu(x, residual)

Everything else stays as it was. The graph takes Dynamo's arguments, in their order, and behind them the tensors that
are made of the weights: folded ones, and constants of the graph's own.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fastres.compile.cpu import suits
from fastres.compile.trace import Traced
from fastres.inference.build import fold_region, fold_regions
from fastres.inference.constants import Constants
from fastres.inference.normal import aten, normalize
from fastres.inference.regions import Region
from fastres.nn.fold import Folded, Refusal

CONV_ACT, BN_ACT, ADD_RELU = (getattr(torch.ops.fastres, name).default for name in ("conv_act", "bn_act", "add_relu"))
_COPIES = frozenset({aten.clone.default})  # somebody may write to one that is an output
_BY_STRIDES = {aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default}
_LEFT_ALONE = ("BATCH_STATISTICS", "NOT_CONSTANT")


class Fused:
    """What became of a graph.

    Attributes:
        module: the graph; its placeholders are Dynamo's and then those of the made tensors.
        weights: the places of the arguments that tensors are made of.
        counts: convolutions that are one call ("conv"), of them with a BN ("bn"), a residual ("add"), an activation
            ("act"); and "norm", "add_relu".
        own_weights: whether all convolutions are calls of `conv_act`, and no weight is an argument.
        overflows: whether a fold was too large for its dtype: finite weights may then give answers that are not.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        traced: Traced,
        made: list[tuple[str, Any]],
        counts: Counter[str],
        layout: Any,
        own_weights: bool,
    ) -> None:
        self.module, self.counts, self.own_weights = module, counts, own_weights
        self.overflows = False
        self._made, self._own, self._layout = made, traced.tensors, layout
        self._graph = traced.graph
        leaves = dict.fromkeys(name for _, what in made for name in _leaves(what))
        self._names = [name for name in leaves if name in traced.static]
        self.weights = tuple(traced.static[name] for name in self._names)

    def make(self, weights: Sequence[Tensor], folded: dict[fx.Node, Folded] | None = None) -> list[Tensor] | None:
        """The tensors behind the arguments; None where these weights do not fold any more.

        Args:
            weights: the arguments at the places ``self.weights``.
            folded: by a convolution's node; what is missing is computed.
        """
        constants = Constants(self._graph, dict(zip(self._names, weights, strict=True)) | self._own)
        tensors: list[Tensor] = []
        for kind, what in self._made:
            if kind != "region":
                t = constants.rounded(what, what.meta["dtype"])
                tensors.append(self._laid_out(t) if kind == "kernel" else t)
                continue
            result: Any = (folded or {}).get(what.head) or fold_region(what, constants, what.head.meta["dtype"])
            if isinstance(result, Refusal):
                return None
            tensors += [self._laid_out(result.weight), result.bias]
        return tensors

    def _laid_out(self, t: Tensor) -> Tensor:
        return t if self._layout is None or t.ndim != 4 else t.contiguous(memory_format=self._layout)


def fuse(
    source: fx.GraphModule, traced: Traced, inputs: Sequence[Any], packs: bool
) -> tuple[Fused, list[Tensor]] | None:
    """The fused graph of ``traced`` and the tensors made for ``inputs``; None where no convolution fuses with anything.

    Args:
        source: Dynamo's module, for what its placeholders carry.
        inputs: real arguments, for the weights.
        packs: on a CPU, make a graph that `fastres.compile.cpu` runs, where it suits.
    """
    normalize(traced.graph, keep=_COPIES)
    constants = Constants(traced.graph, {name: inputs[place] for name, place in traced.static.items()} | traced.tensors)
    regions, folded = fold_regions(traced.graph, constants, lambda node: node.meta["dtype"])
    if not any(_is_conv2d(region) and len(region.nodes) > 1 for region in regions):
        return None
    own_weights = packs and suits(traced, regions, constants)
    layouts: list[Any] = [None] if _depends_on_strides(traced) else [torch.channels_last, None]
    for layout in layouts:
        writer = _Writer(source, traced, constants, regions, folded, own_weights)
        fused = Fused(writer.run(), traced, writer.made, writer.counts, layout, own_weights)
        fused.overflows = any(region.stop is not None and region.stop.code == "OVERFLOW" for region in regions)
        tensors = fused.make([inputs[place] for place in fused.weights], folded)
        assert tensors is not None
        if _keep_strides(fused.module, traced, tensors) or layout is None:
            return fused, tensors
    return None


def _is_conv2d(region: Region) -> bool:
    return region.kind == "conv" and region.head.target is aten.conv2d.default and len(region.head.meta["shape"]) == 4


def _leaves(what: Region | fx.Node) -> list[str]:
    """The names of the constants that something is made of."""
    if isinstance(what, Region):
        nodes = [n for node in (what.head, *what.affines) for n in node.all_input_nodes]
        inside = {what.head.args[0], *what.nodes}
        return [name for node in nodes if node not in inside for name in _leaves(node)]
    if what.op == "get_attr":
        return [str(what.target)]
    return [name for node in what.all_input_nodes for name in _leaves(node)]


# ---- writing ---------------------------------------------------------------------------------------------------------


class _Writer:
    def __init__(
        self,
        source: fx.GraphModule,
        traced: Traced,
        constants: Constants,
        regions: list[Region],
        folded: dict[fx.Node, Folded],
        own_weights: bool,
    ) -> None:
        self.source, self.traced, self.constants, self.own_weights = source, traced, constants, own_weights
        self.regions, self.folded = regions, folded
        self.graph = fx.Graph()
        self.values: dict[Any, fx.Node] = {}
        self.made: list[tuple[str, Any]] = []  # a "region", a "kernel" of a convolution, another "constant"
        self.counts: Counter[str] = Counter()

    def run(self) -> fx.GraphModule:
        last = {region.last: region for region in self.regions if self.is_fused(region)}
        inside = {node for region in last.values() for node in region.nodes[:-1]}
        given = [self.argument(node) for node in self.source.graph.find_nodes(op="placeholder")]
        self.behind = given[-1]
        own = {str(node.target): node for node in given}
        for node in self.traced.graph.nodes:
            if node.op == "placeholder" or (str(node.target) in own and not self.own_weights):
                self.values[node] = own[str(node.target)]
        for node in self.traced.graph.nodes:
            if node in last:
                self.values[node] = self.step(last[node])
            elif node.op not in ("placeholder", "get_attr") and node not in inside and node not in self.constants.nodes:
                self.values[node] = self.graph.node_copy(node, self.value)
                self.values[node].meta = {}
        module = fx.GraphModule(torch.nn.Module(), self.graph, "FusedGraph")
        module.meta = dict(self.source.meta)
        for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id"):
            if hasattr(self.source, name):
                setattr(module, name, getattr(self.source, name))
        return module

    def is_fused(self, region: Region) -> bool:
        if region.kind == "conv":
            return region.head in self.folded or (_is_conv2d(region) and (len(region.nodes) > 1 or self.own_weights))
        if region.kind == "norm":
            is_4d = len(region.head.meta["shape"]) == 4
            return is_4d and region.stop is not None and region.stop.code not in _LEFT_ALONE
        return region.kind == "add_relu"

    def argument(self, node: fx.Node) -> fx.Node:
        """One of Dynamo's placeholders, with what AOTAutograd asks it for."""
        placeholder = self.graph.placeholder(str(node.target))
        placeholder.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
        placeholder._dynamo_source = getattr(node, "_dynamo_source", None)
        return placeholder

    def extra(self) -> fx.Node:
        """A placeholder for a made tensor, whose address does not change from call to call."""
        from torch._dynamo.source import ConstantSource

        count = sum(1 for _ in self.graph.find_nodes(op="placeholder"))
        with self.graph.inserting_after(self.behind):
            placeholder = self.graph.placeholder(f"made_{count}")
        placeholder.meta = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
        placeholder._dynamo_source = ConstantSource(f"fastres_made_{count}")
        self.behind = placeholder
        return placeholder

    def value(self, node: Any, kind: str = "constant") -> Any:
        """A constant that meets the input: its argument, or made, or computed in every call. None is None."""
        if node is None:
            return None
        if node not in self.values:
            keep = self.own_weights and self.constants.is_worth_keeping(node)
            if node in self.constants.nodes and (keep or node.op == "get_attr"):
                self.made.append((kind, node))
                self.values[node] = self.extra()
            else:
                self.values[node] = self.graph.node_copy(node, self.value)
                self.values[node].meta = {}
        return self.values[node]

    def step(self, region: Region) -> fx.Node:
        self.counts[region.kind] += 1
        x: Any = region.head.args[0]
        residual = self.value(region.residual)
        if region.kind == "conv":
            return self.conv(region, self.value(x), residual)
        if region.kind == "norm":
            tensors: Any = region.head.args[1:5]
            live = [self.value(t) for t in tensors]
            eps = region.head.args[7]
            node = self.graph.call_function(BN_ACT, (self.value(x), *live, residual, False, eps, region.act))
            return self.graph.call_function(operator.getitem, (node, 0))
        return self.graph.call_function(ADD_RELU, (self.value(x), residual))

    def conv(self, region: Region, x: fx.Node, residual: fx.Node | None) -> fx.Node:
        arguments: tuple[Any, ...] = region.head.args
        _, weight, bias, *where = (*arguments, None)[: max(len(arguments), 3)]
        if region.head in self.folded:
            self.made.append(("region", region))
            w, b = self.extra(), self.extra()
            self.counts["bn"] += 1
        else:
            w, b = self.value(weight, "kernel"), self.value(bias)
        if not _is_conv2d(region):  # no epilogue, see `find_regions`
            return self.graph.call_function(region.head.target, (x, w, b, *where))  # type: ignore[arg-type]
        self.counts["add"] += residual is not None
        self.counts["act"] += region.act != "none"
        return self.graph.call_function(CONV_ACT, (x, w, b, residual, *where, region.act))


# ---- strides ---------------------------------------------------------------------------------------------------------


def _depends_on_strides(traced: Traced) -> bool:
    """Whether another memory layout inside could show: values by strides, or outputs that share memory."""
    if any(node.target in _BY_STRIDES for node in traced.graph.nodes):
        return True
    storages = [t.untyped_storage()._cdata for t in traced.outputs if isinstance(t, Tensor)]
    return len(set(storages)) < len(storages)


def _keep_strides(module: fx.GraphModule, traced: Traced, tensors: list[Tensor]) -> bool:
    """Copies outputs into the strides that the graph's had, which Dynamo knows them by; False where that fails."""
    made = [traced.mode.from_tensor(t, static_shapes=True) for t in tensors]
    with torch.no_grad(), enable_python_dispatcher():
        FakeTensorProp(module, traced.mode).propagate_dont_convert_inputs(*traced.fakes, *made)
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
