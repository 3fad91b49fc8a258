"""Global average pool -> flatten -> linear becomes a mean and a matrix product, with no view between."""

from __future__ import annotations

from typing import Any

from torch import fx

from fastres.graph.fusions import Fusion, Weights
from fastres.graph.normalize import aten, pair
from fastres.graph.patterns import module_name, only_reader
from fastres.graph.rows import FreezeRow

_VIEWS = (aten.flatten.using_ints, aten.reshape.default, aten.squeeze.dims)


def _match(node: fx.Node, weights: Weights) -> list[fx.Node] | None:
    if node.target is not aten.linear.default or not weights.folds or "row" in node.meta:
        return None
    x, weight, bias = (*node.args, None)[:3]
    constants = weights.constants.nodes
    if weight not in constants or not (bias is None or bias in constants):
        return None
    if len(weight.meta["shape"]) != 2:  # type: ignore[union-attr]  # a vector
        return None
    chain = [node]
    while isinstance(x, fx.Node) and x.target in _VIEWS:
        chain.insert(0, x)
        x = x.args[0]
    if not isinstance(x, fx.Node) or not _is_global_pool(x):
        return None
    chain.insert(0, x)
    if any(only_reader(a) is not b for a, b in zip(chain, chain[1:], strict=False)):
        return None
    source: Any = x.args[0]
    shape, flat = source.meta.get("shape", ()), node.args[0].meta.get("shape", ())  # type: ignore[union-attr]
    return chain if len(shape) == 4 and tuple(flat) == (shape[0], shape[1]) else None


def _is_global_pool(node: fx.Node) -> bool:
    shape = getattr(node.args[0], "meta", {}).get("shape", ()) if node.args else ()
    if node.target is aten.adaptive_avg_pool2d.default:
        return pair(node.args[1]) == [1, 1]
    if node.target is aten.mean.dim:
        dims = node.args[1]
        return len(shape) == 4 and sorted(d % 4 for d in pair(dims)) == [2, 3] and node.kwargs.get("dtype") is None
    if node.target is aten.avg_pool2d.default and len(shape) == 4:
        kernel = [k.meta.get("value") if isinstance(k, fx.Node) else k for k in pair(node.args[1])]
        return kernel == list(shape[2:]) and len(node.args) <= 3  # no padding
    return False


def _write(found: list[fx.Node], weights: Weights) -> None:
    pool, linear = found[0], found[-1]
    _, weight, bias = (*linear.args, None)[:3]
    name, dtype = module_name(linear), weights.dtype_of(linear)
    row = FreezeRow(name, "pool_linear", "global average pool + linear", "", "one step")
    with weights.graph.inserting_before(linear):
        mean = weights.graph.call_function(aten.mean.dim, (pool.args[0], [2, 3]))  # [N, C]
        mean.meta = {"row": True}
        kept = weights.kept(weight, f"{name}.weight", dtype), weights.kept(bias, f"{name}.bias", dtype)
        new = weights.graph.call_function(aten.linear.default, (mean, *kept))
    weights.replace(found, new, row)


FUSION = Fusion("pool_linear", 2, _match, _write)
