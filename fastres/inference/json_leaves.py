"""The modules that a saved network may hold, one entry each: how their settings become JSON, and they are built again.

A leaf has tensors of its own, which are stored beside the network's other tensors, and no children; its settings are
plain values. One more class is one more entry of LEAVES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastres.inference.conv import ACTIVATIONS, FrozenConv, freeze_conv
from fastres.inference.json_values import FrozenFileError, short

_LARGEST = 2**16  # stride, padding, dilation


@dataclass(frozen=True)
class Leaf:
    """One class of modules.

    ``settings`` reads them from a module. ``build`` makes a module of these settings for tensors of these shapes, on
    meta (it is given the tensors afterwards), and raises FrozenFileError where they do not fit.
    """

    cls: type[nn.Module]
    settings: Callable[[Any], dict[str, Any]]
    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]


def _conv_settings(conv: FrozenConv) -> dict[str, Any]:
    return {
        "stride": tuple(conv.stride),
        "padding": tuple(conv.padding),
        "dilation": tuple(conv.dilation),
        "groups": conv.groups,
        "act": conv.act,
        "exact": conv.exact,
    }


def _conv_build(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 4 or not weight.is_floating_point() or 0 in weight.shape:
        raise FrozenFileError("its weight is not [K, C/groups, R, S] and floating")
    k, c, r, s = weight.shape
    if bias is not None and (bias.shape != (k,) or bias.dtype != weight.dtype):
        raise FrozenFileError(f"its bias is {short(tuple(bias.shape))} of {bias.dtype}, not [{k}] of {weight.dtype}")
    groups, act, exact = settings["groups"], settings["act"], settings["exact"]
    if type(groups) is not int or groups < 1 or k % groups:
        raise FrozenFileError(f"{short(groups)} groups do not divide {k} channels")
    if act not in ACTIVATIONS:
        raise FrozenFileError(f"{short(act)} is none of its activations")
    if type(exact) is not bool:
        raise FrozenFileError("exact is true or false")
    stride, padding, dilation = (_pair(settings[name], name != "padding") for name in ("stride", "padding", "dilation"))
    conv: Any = nn.Conv2d(
        c * groups, k, (r, s), stride, padding, dilation, groups, bias is not None, device="meta", dtype=weight.dtype
    )
    freeze_conv(conv)
    conv.act, conv.exact = act, exact
    made: nn.Module = conv
    return made


def _pair(value: Any, least: int) -> tuple[int, int]:
    if type(value) is not tuple or len(value) != 2 or any(type(v) is not int or not least <= v < _LARGEST for v in value):
        raise FrozenFileError(f"{short(value)} is no pair of sizes")
    return value


LEAVES: dict[str, Leaf] = {
    "FrozenConv": Leaf(FrozenConv, _conv_settings, _conv_build),
}


def leaf_to_json(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The name of a module's class and its settings; None for a class that no file can hold."""
    for name, leaf in LEAVES.items():
        if type(module) is leaf.cls:
            return name, leaf.settings(module)
    return None


def leaf_from_json(name: Any, settings: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module of this class and these settings, its tensors still on meta. Raises FrozenFileError."""
    leaf = LEAVES.get(name) if isinstance(name, str) else None
    if leaf is None:
        raise FrozenFileError(f"{short(name)} is no module that this version knows: {', '.join(LEAVES)}")
    if not isinstance(settings, dict):
        raise FrozenFileError(f"a {name} has no settings")
    try:
        module = leaf.build(settings, tensors)
    except KeyError as error:
        raise FrozenFileError(f"a {name} lacks its setting {error}") from error
    mine = {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
    if mine != set(tensors):
        raise FrozenFileError(f"a {name} has the tensors {short(sorted(tensors))}, expected {short(sorted(mine))}")
    return module
