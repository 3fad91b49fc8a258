"""The modules that a saved network may hold, one entry each: how their settings become JSON, and they are built again.

A leaf has tensors of its own, which are stored beside the network's other tensors, and no children; its settings are
plain values. One more class is one more entry of LEAVES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.inference.conv import _UNARY as _ACTIVATIONS
from fastres.inference.conv import FrozenConv
from fastres.inference.json_values import FrozenFileError, short
from fastres.inference.leaves import FrozenAddReLU, FrozenNorm, PoolLinear

_LARGEST = 2**16  # stride, padding, dilation


@dataclass(frozen=True)
class Leaf:
    """One class of modules.

    ``settings`` reads them from a module. ``build`` makes a module of these settings around these tensors, and raises
    FrozenFileError where they do not fit. ``settle`` is called once the module is in place.
    """

    cls: type[nn.Module]
    settings: Callable[[Any], dict[str, Any]]
    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]
    settle: Callable[[Any, Mapping[str, Any]], None] | None = None


def _conv_settings(conv: FrozenConv) -> dict[str, Any]:
    packs, weight = conv.packs, conv.weight
    current = packs.weight == (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
    plain = [
        (tuple(shape), tuple(strides))
        for (shape, strides), t in (packs.found.items() if current else ())
        if t is not None and not t.is_mkldnn and t.data_ptr() == weight.data_ptr()
    ]
    return {
        "stride": tuple(conv.stride),
        "padding": tuple(conv.padding),
        "dilation": tuple(conv.dilation),
        "groups": conv.groups,
        "act": conv.act,
        "exact": conv.exact,
        "plain": plain,  # inputs that were measured to be faster on the plain weight
    }


def _conv_build(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 4 or not weight.is_floating_point() or 0 in weight.shape:
        raise FrozenFileError("its weight is not [K, C/groups, R, S] and floating")
    _fits("bias", bias, (len(weight),), weight.dtype)
    groups, act, exact = settings["groups"], settings["act"], settings["exact"]
    if type(groups) is not int or groups < 1 or len(weight) % groups:
        raise FrozenFileError(f"{short(groups)} groups do not divide {len(weight)} channels")
    if (
        not isinstance(act, str)
        or act not in _ACTIVATIONS
        or type(exact) is not bool
        or type(settings["plain"]) is not list
    ):
        raise FrozenFileError(f"{short(act)}, {short(exact)} are no settings of it")
    stride, padding, dilation = (_pair(settings[name], name != "padding") for name in ("stride", "padding", "dilation"))
    conv = FrozenConv.of(weight, bias, stride, padding, dilation, groups, act)
    conv.exact = exact
    return conv  # type: ignore[no-any-return]


def _conv_settle(conv: FrozenConv, settings: Mapping[str, Any]) -> None:
    """Keeps the plain weight for the inputs that were faster on it."""
    plain, weight = settings["plain"], conv.weight
    if not plain or weight.is_meta:
        return
    conv.packs.weight = weight.data_ptr(), -1 if weight.is_inference() else weight._version
    for row in plain:
        if type(row) is not tuple or len(row) != 2 or not all(map(_is_four, row)):
            raise FrozenFileError(f"{short(row)} is no shape and strides of an input")
        conv.packs.found[torch.Size(row[0]), row[1]] = weight.detach()


def _is_four(sizes: Any) -> bool:
    return type(sizes) is tuple and len(sizes) == 4 and all(type(n) is int and n >= 0 for n in sizes)


def _norm_build(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    mean, eps, act = tensors.get("running_mean"), settings["eps"], settings["act"]
    if mean is None or mean.ndim != 1 or not mean.is_floating_point() or "running_var" not in tensors:
        raise FrozenFileError("its statistics are not [C] and floating")
    for name, t in tensors.items():
        _fits(name, t, tuple(mean.shape), mean.dtype)
    if type(eps) is not float or act not in ("none", "relu"):
        raise FrozenFileError(f"{short(eps)}, {short(act)} are no settings of it")
    return FrozenNorm({name: tensors.get(name) for name in ("weight", "bias", "running_mean", "running_var")}, eps, act)


def _head_build(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise FrozenFileError("its weight is not [K, C] and floating")
    _fits("bias", bias, (len(weight),), weight.dtype)
    return PoolLinear.of(weight, bias)  # type: ignore[no-any-return]


def _fits(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t is not None and (tuple(t.shape) != shape or t.dtype != dtype):
        got = f"{short(list(t.shape))} of {t.dtype}"
        raise FrozenFileError(f"its {name} is {got}, expected {list(shape)} of {dtype}")


def _pair(value: Any, least: int) -> Any:
    fits = type(value) is tuple and len(value) == 2 and all(type(v) is int and least <= v < _LARGEST for v in value)
    if not fits:
        raise FrozenFileError(f"{short(value)} is no pair of sizes")
    return value


LEAVES: dict[str, Leaf] = {
    "FrozenConv": Leaf(FrozenConv, _conv_settings, _conv_build, _conv_settle),
    "FrozenNorm": Leaf(FrozenNorm, lambda norm: {"eps": float(norm.eps), "act": norm.act}, _norm_build),
    "FrozenAddReLU": Leaf(FrozenAddReLU, lambda _: {}, lambda *_: FrozenAddReLU()),
    "PoolLinear": Leaf(PoolLinear, lambda _: {}, _head_build),
}


def leaf_to_json(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The name of a module's class and its settings; None for a class that no file can hold."""
    for name, leaf in LEAVES.items():
        if type(module) is leaf.cls:
            return name, leaf.settings(module)
    return None


def leaf_from_json(name: Any, settings: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module of this class and these settings around these tensors. Raises FrozenFileError."""
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


def settle(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """What is left to do for a module of LEAVES that holds its own tensors now. Raises FrozenFileError."""
    for leaf in LEAVES.values():
        if type(module) is leaf.cls and leaf.settle is not None:
            leaf.settle(module, settings)
