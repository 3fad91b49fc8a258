"""The executor: a captured graph and the source's tensors become a `GraphModule` of fused steps.

Every step stands where the last node of its region stood. A step's tensors have the names of the module that they come
from; steps and constants made of the same things are made once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres.inference.capture import Captured
from fastres.inference.constants import Constants, as_channels
from fastres.inference.conv import FrozenConv
from fastres.inference.cost import operator_name, step_cost
from fastres.inference.leaves import FrozenAddReLU, FrozenNorm, PoolLinear
from fastres.inference.normal import aten, normalize
from fastres.inference.regions import Region, arithmetic, find_regions, norm_name, other
from fastres.inference.report import FreezeRow
from fastres.nn.fold import Folded, Refusal, fold_affine, norm_affine


def build(
    captured: Captured, tensors: Mapping[str, Tensor], dtype: torch.dtype, shared: nn.Module | None = None
) -> tuple[fx.GraphModule, list[FreezeRow]]:
    """The network of ``captured`` with BN folded into convolutions in float64, and a row for each that was one.

    Args:
        captured: normalised in place on the first call.
        tensors: the source's parameters and buffers, and the capture's constants, by name.
        dtype: what the network computes in.
        shared: another network of the same source: its steps and constants are taken where they are the same.
    """
    normalize(captured.graph)
    constants = Constants(captured.graph, tensors)
    regions, folded = fold_regions(captured.graph, constants, lambda node: dtype_in(captured, node, dtype))
    return _Builder(captured, constants, regions, folded, dtype, shared).run()


def fold_regions(
    graph: fx.Graph, constants: Constants, dtype_of: Callable[[fx.Node], torch.dtype]
) -> tuple[list[Region], dict[fx.Node, Folded]]:
    """The regions of a normalised graph, and the folded tensors of those convolutions that take an affine in.

    Args:
        dtype_of: what they are rounded to, by the convolution's node.
    """
    refused: dict[fx.Node, Refusal] = {}
    folded: dict[fx.Node, Folded] = {}
    while True:
        regions = find_regions(graph, constants, refused)
        before = len(refused)
        for region in regions:
            if region.affines and region.head not in folded:
                result = fold_region(region, constants, dtype_of(region.head))
                if isinstance(result, Refusal):
                    refused[region.head] = result
                else:
                    folded[region.head] = result
        if len(refused) == before:
            return regions, folded


def dtype_in(captured: Captured, node: fx.Node, dtype: torch.dtype) -> torch.dtype:
    """What a floating tensor of the graph is in where the network computes in ``dtype``."""
    own: torch.dtype = node.meta["dtype"]
    return dtype if own is captured.dtype else own


def fold_region(region: Region, constants: Constants, dtype: torch.dtype) -> Folded | Refusal:
    """The weight and bias of a convolution with the affines behind it, in float64, rounded once."""
    arguments: tuple[Any, ...] = (*region.head.args[1:], None)
    weight, bias = arguments[:2]
    channels: int = weight.meta["shape"][0]
    device = constants.tensors[next(iter(constants.tensors))].device
    scale = torch.ones(channels, dtype=torch.float64, device=device)
    shift = torch.zeros_like(scale)
    current = region.head
    for node in region.affines:
        if node.target is aten.batch_norm.default:
            tensors: list[Any] = [None if t is None else constants.exact(t) for t in node.args[1:5]]
            eps: Any = node.args[7]
            affine = norm_affine(tensors[2], tensors[3], tensors[0], tensors[1], eps)
            if isinstance(affine, Refusal):
                return Refusal(affine.code, f"{norm_name(node)}: {affine.message}")
            scale, shift = scale * affine[0], shift * affine[0] + affine[1]
        else:
            value, name = as_channels(other(node, current), constants, channels), arithmetic(node)
            if name == "mul":
                scale, shift = scale * value, shift * value
            elif name == "div":
                scale, shift = scale / value, shift / value
            elif name == "rsub" or (name == "sub" and node.args[0] is not current):
                scale, shift = -scale, value - shift
            else:
                shift = shift + value if name == "add" else shift - value
        current = node
    exact_bias = None if bias is None else constants.exact(bias)
    result = fold_affine(constants.unrounded(weight), exact_bias, scale, shift, dtype)
    if isinstance(result, Refusal):
        return Refusal(result.code, f"{norm_name(region.affines[0])}: {result.message}")
    return result


class _Builder:
    def __init__(
        self,
        captured: Captured,
        constants: Constants,
        regions: list[Region],
        folded: dict[fx.Node, Folded],
        dtype: torch.dtype,
        shared: nn.Module | None,
    ) -> None:
        self.captured, self.constants, self.folded, self.dtype = captured, constants, folded, dtype
        self.regions = regions
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.rows: list[FreezeRow] = []
        self.others: dict[str, list[tuple[int, int, int]]] = {}  # operators that stay -> the cost of each call
        self.steps: dict[str, str] = {}  # a step's key -> its name
        self.names: set[str] = set()
        self.shared: dict[str, nn.Module] = {}
        for module in shared.modules() if shared is not None else ():
            if "origin" in module.__dict__:
                self.shared[module.__dict__["origin"]] = module
        self.kept = dict(shared.named_buffers()) if shared is not None else {}
        self.in_norms = {
            n for node in captured.graph.nodes if node.target is aten.batch_norm.default for n in node.args[1:5]
        }

    def run(self) -> tuple[fx.GraphModule, list[FreezeRow]]:
        last = {region.last: region for region in self.regions}
        inside = {node for region in self.regions for node in region.nodes[:-1]}
        for node in self.captured.graph.nodes:
            if node in last:
                self.values[node] = self.step(last[node])
            elif node in inside or node in self.constants.nodes:
                continue
            else:
                self.values[node] = self.graph.node_copy(node, self.value)
                self.values[node].meta = {}
                if isinstance(node.target, torch._ops.OpOverload) and "size" in node.meta:
                    cost = step_cost([node], self.dtype, self.constants.nodes)
                    self.others.setdefault(operator_name(node), []).append(cost)
        for name, costs in self.others.items():
            flops, moved, weights = (sum(cost[i] for cost in costs) for i in range(3))
            self.rows.append(FreezeRow(name, "other", f"{len(costs)} call(s)", "", "", (), flops, moved, weights))
        batch = max(self.captured.batch, 1)
        for i, row in enumerate(self.rows):
            self.rows[i] = replace(row, flops=row.flops // batch, bytes=row.bytes // batch)
        network = fx.GraphModule(self.root, self.graph, "FrozenNetwork")
        network.eval()
        return network, self.rows

    def value(self, node: fx.Node) -> fx.Node:
        if node not in self.values:
            self.values[node] = self.constant(node)
        return self.values[node]

    def constant(self, node: fx.Node) -> fx.Node:
        """A constant that meets the input, as a buffer; or computed again where its value would be huge."""
        if not self.constants.is_worth_keeping(node):
            return self.graph.node_copy(node, self.value)
        name = self.unique("constant" if node.op != "get_attr" else str(node.target))
        dtype = self.dtype_in(node)
        if node in self.in_norms and dtype is not torch.float64:
            dtype = torch.float32
        kept = self.kept.get(name) if node.op == "get_attr" else None
        fits = kept is not None and kept.shape == node.meta["shape"] and kept.dtype in (dtype, node.meta["dtype"])
        self.put(name, kept if fits and kept is not None else self.constants.rounded(node, dtype))
        return self.graph.get_attr(name)

    def unique(self, name: str) -> str:
        """A path for a tensor or a step that is no other's, and lies neither above nor within another's."""
        candidate = name = name or "step"
        for count in itertools.count(2):
            within = any(candidate.startswith(f"{taken}.") for taken in self.names)
            if not within and not any(taken == candidate or taken.startswith(f"{candidate}.") for taken in self.names):
                break
            path, dot, leaf = name.rpartition(".")
            candidate = f"{path}_{count}.{leaf}" if within and dot else f"{name}_{count}"
        self.names.add(candidate)
        return candidate

    def put(self, name: str, value: Tensor | nn.Module) -> None:
        """Under a dotted name, with empty modules above it."""
        parent: Any = self.root
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module().eval())
            parent = parent._modules[part]
        if isinstance(value, Tensor):
            parent.register_buffer(leaf, value)
        else:
            parent.add_module(leaf, value)

    def step(self, region: Region) -> fx.Node:
        inputs: list[Any] = [region.head.args[0]]
        if region.kind == "conv":
            if region.head.target is not aten.conv2d.default or len(region.head.meta["shape"]) != 4:
                return self.other_conv(region)
            made: Any = self.conv(region)
        elif region.kind == "norm":
            if (
                region.stop is None
                or region.stop.code in ("BATCH_STATISTICS", "NOT_CONSTANT")
                or len(region.head.meta["shape"]) != 4
            ):
                return self.kept_norm(region)
            made = self.norm(region)
        elif region.kind == "pool_linear":
            made = self.pool_linear(region)
        else:
            made = self.add_relu(region)
        if region.residual is not None:
            inputs.append(region.residual)
        return self.graph.call_module(made, tuple(self.value(node) for node in inputs))

    def add(self, name: str, key: str, make: Any) -> str:
        """The step of that key, made once; its name."""
        if key not in self.steps:
            name = self.unique(name)
            module = self.shared.get(key)
            if module is None:
                module = make()
                module.origin = key
            self.put(name, module)
            self.steps[key] = name
        return self.steps[key]

    def cost(self, region: Region) -> tuple[int, int, int]:
        flops, moved, weights = step_cost(region.nodes, self.dtype, self.constants.nodes)
        if region.kind == "conv":  # what was folded is no longer read
            shape = region.head.args[1].meta["size"]  # type: ignore[union-attr]
            weights = (math.prod(shape) + shape[0]) * self.dtype.itemsize
        return flops, moved, weights

    def key(self, node: Any) -> str:
        return self.constants.key(node) if isinstance(node, fx.Node) else repr(node)

    def dtype_in(self, node: fx.Node) -> torch.dtype:
        return dtype_in(self.captured, node, self.dtype)

    def keys(self, nodes: Any) -> str:
        return ", ".join(self.key(node) for node in nodes)

    def conv(self, region: Region) -> str:
        arguments: tuple[Any, ...] = region.head.args
        _, weight, bias, *where = arguments
        dtype = self.dtype_in(region.head)
        affines = "; ".join(f"{n.target}({self.affine_key(n)})" for n in region.affines)
        key = f"conv({self.keys((weight, bias))}) {tuple(where)} [{affines}] {region.act} {dtype}"

        def make() -> FrozenConv:
            tensors: Any = self.folded.get(region.head) or (
                self.constants.rounded(weight, dtype),
                None if bias is None else self.constants.rounded(bias, dtype),
            )
            w, b = tensors
            stride, padding, dilation, groups = where
            conv: FrozenConv = FrozenConv.of(w, b, stride, padding, dilation, groups, region.act)
            return conv

        name = self.add(module_name(region.head), key, make)
        self.conv_row(name, region)
        return name

    def affine_key(self, node: fx.Node) -> str:
        """Of the constants and numbers of an affine, in their places."""
        return self.keys("x" if isinstance(a, fx.Node) and a not in self.constants.nodes else a for a in node.args)

    def conv_row(self, name: str, region: Region) -> None:
        parts = ["conv"]
        if region.head in self.folded or region.head.args[2] is not None:
            parts.append("bias")
        if region.residual is not None:
            parts.append("add")
        if region.act != "none":
            parts.append(region.act)
        folded_in = ("bn" if self.is_norm(region) else "scale",) if region.head in self.folded else ()
        took = (*folded_in, *parts[1:])
        folded = ", ".join(dict.fromkeys(norm_name(n) for n in region.affines)) if region.head in self.folded else ""
        stop = region.stop or Refusal("", "")
        message = "; ".join(part for part in (f"{folded} folded" if folded else stop.message, readers(region)) if part)
        self.rows.append(FreezeRow(name, "conv", " + ".join(parts), stop.code, message, took, *self.cost(region)))

    def is_norm(self, region: Region) -> bool:
        """Whether one of the affines is a BN, or they are written as one: a product and a sum with tensors."""
        if any(n.target is aten.batch_norm.default for n in region.affines):
            return True
        names = {arithmetic(n) for n in region.affines if len(n.all_input_nodes) > 1}
        return bool(names & {"mul", "div"}) and bool(names & {"add", "sub"})

    def other_conv(self, region: Region) -> fx.Node:
        """A 1-D or 3-D convolution, or one of an unbatched input: folded, and called as it was."""
        arguments: tuple[Any, ...] = (*region.head.args, None)[: max(len(region.head.args), 3)]
        x, weight, bias, *rest = arguments
        name = module_name(region.head)
        tensors: Any = self.folded.get(region.head)
        if tensors is None:
            new = self.value(weight), None if bias is None else self.value(bias)
        else:
            names = [self.unique(f"{name}.{part}") for part in ("weight", "bias")]
            for part, t in zip(names, tensors, strict=True):
                self.put(part, t)
            new = self.graph.get_attr(names[0]), self.graph.get_attr(names[1])
        target: Any = region.head.target
        node = self.graph.call_function(target, (self.value(x), *new, *rest))
        self.conv_row(name, region)
        return node

    def norm(self, region: Region) -> str:
        arguments: tuple[Any, ...] = region.head.args
        _, *tensors, _, _, eps, _ = arguments
        dtype = torch.float64 if self.dtype_in(region.head) is torch.float64 else torch.float32
        names = ("weight", "bias", "running_mean", "running_var")

        def make() -> FrozenNorm:
            values = {
                n: None if t is None else self.constants.rounded(t, dtype) for n, t in zip(names, tensors, strict=True)
            }
            return FrozenNorm(values, eps, region.act)

        name = self.add(norm_name(region.head), f"norm({self.keys(tensors)}) {eps} {region.act} {dtype}", make)
        self.norm_row(name, region)
        return name

    def norm_row(self, name: str, region: Region) -> None:
        parts = ["batch norm"]
        if region.residual is not None:
            parts.append("add")
        if region.act != "none":
            parts.append(region.act)
        stop = region.stop or Refusal("", "")
        self.rows.append(
            FreezeRow(name, "norm", " + ".join(parts), stop.code, stop.message, tuple(parts[1:]), *self.cost(region))
        )

    def kept_norm(self, region: Region) -> fx.Node:
        node = region.head
        for node in region.nodes:
            self.values[node] = self.graph.node_copy(node, self.value)
            self.values[node].meta = {}
        region.residual, region.act = None, "none"
        self.norm_row(norm_name(region.head), region)
        return self.values[node]

    def add_relu(self, region: Region) -> str:
        name = self.add(
            f"{region.last.meta.get('where') or 'act'}.add_relu", "add_relu", lambda: FrozenAddReLU().eval()
        )
        self.rows.append(
            FreezeRow(
                str(region.last.meta.get("where") or name),
                "add",
                "add + relu",
                "",
                "one pass",
                ("add", "relu"),
                *self.cost(region),
            )
        )
        return name

    def pool_linear(self, region: Region) -> str:
        _, weight, bias = (*region.last.args, None)[:3]
        dtype = self.dtype_in(region.last)

        def make() -> PoolLinear:
            values: list[Any] = [None if t is None else self.constants.rounded(t, dtype) for t in (weight, bias)]
            head: PoolLinear = PoolLinear.of(*values)
            return head

        name = self.add(module_name(region.last), f"pool_linear({self.keys((weight, bias))}) {dtype}", make)
        self.rows.append(
            FreezeRow(name, "pool_linear", "global average pool + linear", "", "one step", (), *self.cost(region))
        )
        return name


def module_name(node: fx.Node) -> str:
    """The module that a convolution or linear layer was, by its weight's name where it has one."""
    weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith(".weight"):
        return str(weight.target).removesuffix(".weight")
    return str(node.meta.get("where") or node.name)


def readers(region: Region) -> str:
    """What reads the step's output, where a convolution did not take an activation in."""
    if region.act != "none":
        return ""
    names = sorted(
        {
            str(user.target).removeprefix("aten.") if user.op == "call_function" else user.op
            for user in region.last.users
        }
    )
    return f"read by {', '.join(names)}"
