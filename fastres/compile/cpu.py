"""On a CPU, the fused graph without Inductor: convolutions on packed weights, what lies between them as it is.

Inductor calls PyTorch's convolution, which reorders its weight in every call, and puts more Python between two calls.
It makes up for it where it fuses what lies between: so a graph takes this way only if little does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres.compile.trace import Traced
from fastres.inference.constants import Constants
from fastres.inference.conv import FrozenConv, frozen_convs
from fastres.inference.cost import step_cost
from fastres.inference.engine import Engine
from fastres.inference.gate import Running
from fastres.inference.normal import aten
from fastres.inference.regions import Region
from fastres.nn.steps import fused_add_relu, fused_bn_act

_NEVER = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# Inductor calls the same kernels, or they are views.
_ALIKE = {
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.mm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten.conv2d.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
}
_MOST = 0.25  # of the bytes that the fused regions move


def suits(traced: Traced, regions: Sequence[Region], constants: Constants) -> bool:
    """Whether the graph is to run here: on a CPU, pure, and little of it is what Inductor would fuse."""
    fused = {node for region in regions for node in region.nodes}
    between = 0
    if traced.writes or not all(isinstance(t, Tensor) for t in traced.outputs):
        return False
    for node in traced.graph.nodes:
        if node.meta.get("device", _CPU) != _CPU:
            return False
        if node.op != "call_function" or node in constants.nodes or node in fused:
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.target is operator.getitem:
                continue
            return False
        if node.target._schema.is_mutable or any(tag in node.target.tags for tag in _NEVER):
            return False
        if node.target not in _ALIKE and "size" in node.meta:
            between += step_cost([node], node.meta["dtype"], constants.nodes)[1]
    moved = sum(step_cost(region.nodes, region.last.meta["dtype"], constants.nodes)[1] for region in regions)
    return bool(between <= _MOST * moved)


_CPU = torch.device("cpu")


class Network:
    """The fused graph as a network of `FrozenConv` steps, for one set of made tensors.

    Args:
        module: a fused graph with weights of its own.
        tensors: what its last placeholders take.
        overflows: answers may be not finite although all tensors are.
    """

    def __init__(self, module: fx.GraphModule, tensors: Sequence[Tensor], overflows: bool) -> None:
        self.module, self.places = _network(module, tensors)
        self.engine = Engine()
        if overflows or not _is_finite(module, tensors):
            for conv in frozen_convs(self.module):
                conv.exact = True  # oneDNN's ReLU turns NaN into 0

    def __call__(self, *arguments: Any) -> Any:
        with Running():
            return self.engine.run(self.module, tuple(arguments[place] for place in self.places), {})


def _is_finite(module: fx.GraphModule, tensors: Sequence[Tensor]) -> bool:
    """Whether the made tensors are, and the norms that they are of have roots."""
    placeholders = module.graph.find_nodes(op="placeholder")[-len(tensors) :]
    made = dict(zip(placeholders, tensors, strict=True))
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.fastres.bn_act.default):
        arguments: tuple[Any, ...] = node.args
        if not bool((made[arguments[4]] + arguments[7] > 0).all()):
            return False
    return all(math.isfinite(float(t.sum())) for t in tensors if t.is_floating_point())


def _network(module: fx.GraphModule, tensors: Sequence[Tensor]) -> tuple[fx.GraphModule, tuple[int, ...]]:
    placeholders = module.graph.find_nodes(op="placeholder")
    given = len(placeholders) - len(tensors)
    made = dict(zip(placeholders[given:], tensors, strict=True))
    graph, root = fx.Graph(), nn.Module()
    values: dict[fx.Node, fx.Node] = {}
    places = [place for place, node in enumerate(placeholders[:given]) if node.users]
    for place in places:
        values[placeholders[place]] = graph.placeholder(str(placeholders[place].target))

    def value(node: fx.Node) -> fx.Node:
        if node not in values:
            root.register_buffer(node.name, made[node])
            values[node] = graph.get_attr(node.name)
        return values[node]

    for node in module.graph.nodes:
        arguments: tuple[Any, ...] = node.args
        if node.op == "placeholder":
            continue
        if node.target is torch.ops.fastres.conv_act.default:
            x, w, b, residual, stride, padding, dilation, groups, act = arguments
            bias = None if b is None else made[b]
            root.add_module(node.name, FrozenConv.of(made[w], bias, stride, padding, dilation, groups, act))
            y: Any = value(x)
            if x.op == "placeholder" and made[w].is_contiguous(memory_format=torch.channels_last):
                y = graph.call_function(aten.contiguous.default, (y,), {"memory_format": torch.channels_last})
            values[node] = graph.call_module(node.name, (y,) if residual is None else (y, value(residual)))
        elif node.target is torch.ops.fastres.bn_act.default:
            x, *norm, residual, _, eps, act = arguments
            names = ("weight", "bias", "running_mean", "running_var")
            options = {name: None if t is None else value(t) for name, t in zip(names, norm, strict=True)}
            inputs = value(x), None if residual is None else value(residual), act, "auto"
            values[node] = graph.call_function(fused_bn_act, inputs, options | {"training": False, "eps": eps})
        elif node.target is operator.getitem and arguments[0].target is torch.ops.fastres.bn_act.default:
            values[node] = values[arguments[0]]
        elif node.target is torch.ops.fastres.add_relu.default:
            values[node] = graph.call_function(fused_add_relu, (value(arguments[0]), value(arguments[1]), "auto"))
        else:
            values[node] = graph.node_copy(node, value)
    return fx.GraphModule(root, graph, "CompiledNetwork").eval(), tuple(places)
