"""verify=: each block against the float64 referee, on the inputs that it meets inside the model.

A copy of the stock model runs the example twice, in eval and in training mode, and records what every block receives;
then each block's stock and fused copies are compared on it. The model itself is not run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastres._copies import deep_copy
from fastres.swap.fused import Options, convert
from fastres.swap.match import Match

Inputs = dict[str, tuple[Any, ...]]

# Name, training, backward; without gradients a block in eval mode writes over its convolutions' outputs.
WAYS = (("eval mode", False, True), ("training mode", True, True), ("inference", False, False))


def measure(
    model: nn.Module, matches: list[Match], example: Any, options: Options
) -> tuple[dict[str, float], dict[str, str]]:
    """Error ratios of all blocks, and messages for those that fail, by name.

    Raises:
        ValueError: `example` does not run through the model in eval or in training mode.
        TypeError: the model cannot be copied.
    """
    from fastres.verify import verify

    stock = deep_copy(model, argument="verify")
    probes = {match.name: _probe(stock, match) for match in matches}
    ratios: dict[str, float] = {}
    failures: dict[str, str] = {}
    with _random_state_kept():
        recorded = {training: _record(stock, probes, example, training) for training in (False, True)}
        for name, probe in probes.items():
            fused = deep_copy(probe)
            convert(fused, options)
            for mode, training, backward in WAYS:
                inputs = recorded[training]
                if name not in inputs:
                    continue  # the example never reaches this block
                try:
                    verdict = verify(probe, fused, inputs[name], training=training, backward=backward)
                except RuntimeError as error:  # the fused forward raised: as wrong as can be
                    ratios[name] = math.inf
                    failures.setdefault(name, f"{mode}: {error}")
                    continue
                ratios[name] = max(ratios.get(name, 0.0), verdict.error_ratio)
                if not verdict:
                    failures.setdefault(name, f"{mode}: {verdict.error_ratio:.3g} times eager's error, at most 2")
    return ratios, failures


def _probe(stock: nn.Module, match: Match) -> nn.Module:
    assert match.adapter is not None
    return match.adapter.probe(stock.get_submodule(match.name))


def _record(stock: nn.Module, probes: dict[str, nn.Module], example: Any, training: bool) -> Inputs:
    """Record what each probe receives, detached; one that is no part of the model, at its first child."""
    recorded: Inputs = {}
    handles = []
    members = set(stock.modules())
    for name, probe in probes.items():
        target = probe if probe in members else next(iter(probe.children()))

        def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            recorded.setdefault(name, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args))

        handles.append(target.register_forward_pre_hook(hook))
    modes = {module: module.training for module in stock.modules()}
    try:
        stock.train(training)
        with torch.no_grad():
            if isinstance(example, Mapping):
                stock(**example)
            else:
                stock(*(example if isinstance(example, (tuple, list)) else (example,)))
    except Exception as error:
        mode = "training" if training else "eval"
        raise ValueError(f"verify: the example does not run through the model in {mode} mode: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode_before in modes.items():
            module.training = mode_before
    return recorded


def _random_state_kept() -> Any:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])
