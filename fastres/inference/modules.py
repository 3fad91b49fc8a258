"""Folding a copy: pairs found by the capture get new weights, their BN go, known blocks get their fused forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastres.inference.blocks import freeze_block
from fastres.inference.conv import freeze_conv
from fastres.inference.report import FreezeRow
from fastres.inference.watch import Capture
from fastres.nn.fold import Refusal, fold, remainder

_PLAIN_BN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def rewrite(model: nn.Module, found: Capture, dtype: torch.dtype) -> list[FreezeRow]:
    """Fold the pairs of ``found`` in ``model``, in place, and cast the rest to ``dtype``.

    BN layers that stay keep float32 tensors in half precision, as every BN computes in float32.

    Args:
        model: a private copy in eval mode.
        found: the capture of a model of the same structure.
        dtype: what the frozen network computes in.

    Returns:
        A row for every convolution, every BN that stays and every block that was fused.
    """
    rows: list[FreezeRow] = []
    done: dict[int, nn.Module] = {}  # id of a folded norm -> what stands in its place
    folded: list[tuple[Any, Any]] = []
    for conv_name, norm_name in found.pairs.items():
        conv: Any = model.get_submodule(conv_name)
        norm = model.get_submodule(norm_name)
        result = fold(conv, norm, dtype)
        if isinstance(result, Refusal):
            rows.append(FreezeRow(conv_name, "conv", "conv", result.code, f"{norm_name}: {result.message}"))
            rows.append(FreezeRow(norm_name, "norm", "batch norm", *result))
            continue
        folded.append((conv, result))
        done[id(norm)] = remainder(norm)
        rows.append(FreezeRow(conv_name, "conv", "conv + bias", "", f"{norm_name} folded", ("bn", "bias")))
    for conv, result in folded:
        conv.weight = nn.Parameter(result.weight, requires_grad=False)
        conv.bias = nn.Parameter(result.bias, requires_grad=False)
    fused = _fuse_activations(model, found, done)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in done:
                module._modules[name] = done[id(child)]
    rows += [FreezeRow(name, "conv", "conv", *refusal) for name, refusal in found.convs.items()]
    rows += [FreezeRow(name, "norm", "batch norm", *refusal) for name, refusal in found.norms.items()]
    for module in model.modules():
        freeze_conv(module)
    for i, row in enumerate(rows):
        if row.name in fused:
            act = fused[row.name]
            rows[i] = replace(row, became=f"{row.became} + {act}", took=(*row.took, act))
    for name, module in model.named_modules():
        if freeze_block(module):
            rows.append(
                FreezeRow(name, "block", "fused block", "", "one call per convolution, the residual in the last")
            )
    _cast(model, dtype)
    return rows


def _fuse_activations(model: nn.Module, found: Capture, done: dict[int, nn.Module]) -> dict[str, str]:
    """Convolutions take the activation in that alone reads them, or the BN folded into them; which one each took."""
    fused: dict[str, str] = {}
    for conv_name in {**found.convs, **found.pairs}:
        norm_name = found.pairs.get(conv_name)
        if norm_name is not None and type(done.get(id(model.get_submodule(norm_name)))) is not nn.Identity:
            continue  # the BN stays between, or timm's drop layer and activation do
        act = found.acts.get(norm_name or conv_name)
        conv: Any = model.get_submodule(conv_name)
        if act is None or not freeze_conv(conv):
            continue
        where, kind = act
        conv.act = kind
        done[id(model.get_submodule(where))] = nn.Identity().eval()
        fused[conv_name] = kind
    return fused


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    model.requires_grad_(False)
    keep = {id(m) for m in model.modules() if type(m) in _PLAIN_BN and dtype in (torch.float16, torch.bfloat16)}
    for module in model.modules():
        target = torch.float32 if id(module) in keep else dtype
        for tensors in (module._parameters, module._buffers):
            for t in tensors.values():
                if t is not None and t.is_floating_point():
                    t.data = t.data.to(target)
