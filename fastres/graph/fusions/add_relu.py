"""add -> relu that no convolution takes in becomes one add_relu."""

from __future__ import annotations

import torch
from torch import fx

from fastres.graph.fusions import Fusion, Weights
from fastres.graph.normalize import activation
from fastres.graph.patterns import is_residual_add, only_reader
from fastres.graph.rows import FreezeRow


def _match(node: fx.Node, weights: Weights) -> list[fx.Node] | None:
    if not is_residual_add(node, weights.constants) or len(node.meta["shape"]) != 4:
        return None
    act = only_reader(node)
    return [node, act] if act is not None and activation(act) == "relu" else None


def _write(found: list[fx.Node], weights: Weights) -> None:
    add, act = found
    with weights.graph.inserting_before(act):
        new = weights.graph.call_function(torch.ops.fastres.add_relu.default, add.args)
    name = str(act.meta.get("where") or new.name)
    weights.replace(found, new, FreezeRow(name, "add", "add + relu", "", "one pass", ("add", "relu")))


FUSION = Fusion("add_relu", 3, _match, _write)
