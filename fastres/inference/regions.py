"""The region graph: which nodes of a normalised graph become one step, and why not more.

    conv          conv2d -> affine ... -> [add] -> [act]    affine: a BN, or a product or sum with a number a channel
    norm          BN -> [add] -> [relu]                       what no convolution takes in (pre-activation networks)
    add_relu      add -> relu
    pool_linear   global average pool -> flatten -> linear

Everything else stays a node of its own. A region's nodes form a chain in which each is read by the next alone, so the
region runs where its last node stood, and a tensor that is also read elsewhere ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import fx

from fastres.inference.constants import Constants, per_channel
from fastres.inference.normal import activation, pair
from fastres.nn.fold import Refusal

aten = torch.ops.aten
_CONVS = (aten.conv2d.default, aten.conv1d.default, aten.conv3d.default)
_RESIDUAL_ACTS = ("relu",)  # that a convolution fuses behind a residual
_ARITHMETIC = {
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.rsub.Tensor: "rsub",
    aten.rsub.Scalar: "rsub",
}

Kind = Literal["conv", "norm", "add_relu", "pool_linear"]


@dataclass
class Region:
    """One step. ``nodes`` in their order, the last gives the output; ``affines`` those of them that are folded.

    ``stop`` says why a convolution or a norm did not take more: a code and a sentence.
    """

    kind: Kind
    nodes: list[fx.Node]
    affines: list[fx.Node] = field(default_factory=list)
    residual: fx.Node | None = None
    act: str = "none"
    stop: Refusal | None = None

    @property
    def head(self) -> fx.Node:
        return self.nodes[0]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


def find_regions(graph: fx.Graph, constants: Constants, refused: Mapping[fx.Node, Refusal]) -> list[Region]:
    """The regions of ``graph``, each node in one at most; convolutions in ``refused`` take no affine in."""
    taken: set[fx.Node] = set()
    regions: list[Region] = []

    def keep(region: Region | None) -> None:
        if region is not None:
            regions.append(region)
            taken.update(region.nodes)

    nodes = [node for node in graph.nodes if node.op == "call_function" and node not in constants.nodes]
    for node in nodes:
        if node.target in _CONVS:
            keep(_conv(node, constants, taken, refused.get(node)))
    for node in nodes:
        if node in taken:
            continue
        if node.target is aten.batch_norm.default:
            keep(_norm(node, constants, taken))
        elif node.target is aten.linear.default:
            keep(_pool_linear(node, constants, taken))
    for node in nodes:
        if node not in taken and is_residual_add(node, constants):
            act = _only_reader(node)
            if act is not None and activation(act) == "relu" and len(node.meta["shape"]) == 4:
                keep(Region("add_relu", [node, act], residual=node.args[1], act="relu"))
    return regions


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def _conv(node: fx.Node, constants: Constants, taken: set[fx.Node], refused: Refusal | None) -> Region | None:
    arguments: tuple[Any, ...] = (*node.args, None, None)
    _, weight, bias = arguments[:3]
    ready = weight in constants.nodes and (bias is None or bias in constants.nodes)
    if not ready or not node.meta["dtype"].is_floating_point:
        return None
    region = Region("conv", [node])
    current = node
    if len(node.meta["shape"]) != len(weight.meta["shape"]):  # one image: its channels are in another place
        region.stop = Refusal("NO_BATCH", "its input has no batch dimension")
        return region
    while refused is None and (reader := _only_reader(current)) is not None and reader not in taken:
        if not is_affine(reader, current, constants):
            break
        region.affines.append(reader)
        region.nodes.append(reader)
        current = reader
    if node.target is aten.conv2d.default and len(node.meta["shape"]) == 4:
        _epilogue(region, constants, taken, _RESIDUAL_ACTS)
    region.stop = refused or _why_no_more(region, constants, taken)
    return region


def _epilogue(region: Region, constants: Constants, taken: set[fx.Node], residual_acts: tuple[str, ...]) -> None:
    """[add] -> [act] behind the region's last node."""
    current = region.last
    reader = _only_reader(current)
    if reader is not None and reader not in taken and is_residual_add(reader, constants):
        region.residual = other(reader, current)
        region.nodes.append(reader)
        current = reader
        reader = _only_reader(current)
    if reader is None or reader in taken:
        return
    act = activation(reader)
    if act is not None and (region.residual is None or act in residual_acts):
        region.act = act
        region.nodes.append(reader)


def is_residual_add(node: fx.Node, constants: Constants) -> bool:
    """Whether this is x + y of two different tensors of one shape and dtype, neither of them constant."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return False
    x, y = node.args
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or x is y or {x, y} & constants.nodes:
        return False
    same = x.meta.get("shape") == y.meta.get("shape") == node.meta.get("shape")
    return same and x.meta["dtype"] == y.meta["dtype"] == node.meta["dtype"] and x.meta["dtype"].is_floating_point


def other(node: fx.Node, operand: fx.Node) -> Any:
    """The other operand of a sum or product."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def is_affine(node: fx.Node, x: fx.Node, constants: Constants) -> bool:
    """Whether `node` is scale * x + shift with one scale and shift a channel, all constant."""
    if node.target is aten.batch_norm.default:
        statistics = node.args[1:5]
        known = all(t is None or t in constants.nodes for t in statistics)
        return node.args[0] is x and known and None not in statistics[2:] and not node.args[5]
    name = _ARITHMETIC.get(cast(Any, node.target))
    if name is None or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return False
    if node.meta.get("shape") != x.meta.get("shape") or node.meta["dtype"] != x.meta["dtype"]:
        return False
    if name in ("div", "rsub") and node.args[0] is not x:
        return False
    return node.args[0] is not node.args[1] and per_channel(other(node, x), constants, x.meta["shape"]) is not None


def arithmetic(node: fx.Node) -> str:
    """mul, div, add, sub or rsub (value - x) of an affine that is no BN."""
    return _ARITHMETIC[cast(Any, node.target)]


def norm_name(node: fx.Node) -> str:
    """The module that a BN or another affine came from."""
    if node.target is aten.batch_norm.default:
        for t in node.args[1:5]:
            if isinstance(t, fx.Node) and t.op == "get_attr":
                return str(t.target).rpartition(".")[0] or str(t.target)
    return str(node.meta.get("where") or node.name)


def _why_no_more(region: Region, constants: Constants, taken: set[fx.Node]) -> Refusal | None:
    """For a convolution that took no BN in: why."""
    if region.affines:
        return None
    conv = region.head
    norms = [user for user in conv.users if user.target is aten.batch_norm.default]
    if not norms:
        return Refusal("NO_NORM", "no BN reads it")
    names = ", ".join(norm_name(norm) for norm in norms)
    if len(conv.users) > 1:
        return Refusal("OTHER_USE", f"{names} reads it, and {len(conv.users) - 1} other(s) do too")
    if norms[0].args[5]:
        return Refusal("BATCH_STATISTICS", f"{names} normalises by the batch's statistics in eval mode too")
    return Refusal("NOT_CONSTANT", f"the tensors of {names} are computed from the input")


def _norm(node: fx.Node, constants: Constants, taken: set[fx.Node]) -> Region | None:
    region = Region("norm", [node])
    x: Any = node.args[0]
    if node.args[5]:
        region.stop = Refusal("BATCH_STATISTICS", "in eval mode too it normalises by the batch's statistics")
        return region
    if not all(t is None or t in constants.nodes for t in node.args[1:5]):
        region.stop = Refusal("NOT_CONSTANT", "its tensors are computed from the input")
        return region
    is_conv = x.op == "call_function" and x.target in _CONVS
    reason = (
        ("SHARED", f"{x.name} is read elsewhere too") if is_conv else ("NO_CONV", "it reads no convolution's output")
    )
    region.stop = Refusal(*reason)
    if len(node.meta["shape"]) == 4:
        _epilogue(region, constants, taken, ("relu",))
        if region.act not in ("none", "relu"):
            region.nodes.pop()
            region.act = "none"
    return region


def _pool_linear(node: fx.Node, constants: Constants, taken: set[fx.Node]) -> Region | None:
    arguments: tuple[Any, ...] = (*node.args, None)
    x, weight, bias = arguments[:3]
    if weight not in constants.nodes or not (bias is None or bias in constants.nodes):
        return None
    if len(weight.meta["shape"]) != 2:  # a vector
        return None
    chain = [node]
    while isinstance(x, fx.Node) and x.target in (aten.flatten.using_ints, aten.reshape.default, aten.squeeze.dims):
        chain.insert(0, x)
        x = x.args[0]
    if not isinstance(x, fx.Node) or x in taken or not _is_global_pool(x):
        return None
    chain.insert(0, x)
    if any(_only_reader(a) is not b for a, b in zip(chain, chain[1:], strict=False)):
        return None
    source: Any = x.args[0]
    shape, flat = source.meta.get("shape", ()), node.args[0].meta.get("shape", ())  # type: ignore[union-attr]
    if len(shape) != 4 or tuple(flat) != (shape[0], shape[1]):
        return None
    return Region("pool_linear", chain)


def _is_global_pool(node: fx.Node) -> bool:
    shape = getattr(node.args[0], "meta", {}).get("shape", ()) if node.args else ()
    if node.target is aten.adaptive_avg_pool2d.default:
        return pair(node.args[1]) == [1, 1]
    if node.target is aten.mean.dim:
        dims = node.args[1]
        return len(shape) == 4 and sorted(d % 4 for d in pair(dims)) == [2, 3] and node.kwargs.get("dtype") is None
    if node.target is aten.avg_pool2d.default and len(shape) == 4:
        return pair(node.args[1]) == list(shape[2:]) and len(node.args) <= 3  # no padding
    return False
