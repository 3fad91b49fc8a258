"""Which convolution each BN reads, found by running the model once on the example.

Hooks say when a convolution or a BN runs and on which tensor; a dispatch mode sees every operator that touches a
convolution's output, its weights or a BN's tensors anywhere else. A pair is folded only when every call of the one feeds
exactly one call of the other and nothing else sees what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.inference.fold import CONVS, Refusal, is_norm, refuse_norm
from fastres.nn.steps import is_bare
from fastres.verify.runs import call, named_tensors


@dataclass
class Capture:
    """What was found: ``pairs`` maps a convolution's name to its BN's; the others have their reason."""

    pairs: dict[str, str] = field(default_factory=dict)
    convs: dict[str, Refusal] = field(default_factory=dict)
    norms: dict[str, Refusal] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    """Follows convolution outputs and module tensors; everything is by identity, so outputs are kept alive."""

    def __init__(self, owners: dict[int, set[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = owners  # id of a weight or buffer -> names of the modules that own it
        self.running: list[str] = []  # the convolutions and norms that are running now
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # id of a convolution's output -> (its name, itself)
        self.leaks: set[str] = set()  # convolutions whose output somebody else reads, modules whose tensors are
        self.read_by: dict[str, list[str]] = {}  # convolution -> the norms that read it, a call each
        self.reads: dict[str, list[str | None]] = {}  # norm -> the convolutions it read, a call each
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        current = self.running[-1] if self.running else None
        for t in named_tensors((args, kwargs or {}), "").values():
            if id(t) in self.outputs and current not in self.reads:
                self.leaks.add(self.outputs[id(t)][0])
            owners = self.owners.get(id(t))
            if owners is not None and current not in owners:
                self.leaks |= owners
        return func(*args, **(kwargs or {}))


def capture(model: nn.Module, inputs: Any) -> Capture:
    """Run ``model`` once, without gradients, and say which BN can be folded into which convolution.

    Args:
        model: a private copy in eval mode; hooks are added and removed.
        inputs: an example, as for one call.
    """
    found = Capture()
    convs: dict[str, nn.Module] = {}
    norms: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, CONVS):
            if type(module) not in CONVS:
                found.convs[name] = Refusal("CONV_TYPE", f"{type(module).__name__} is a subclass with a life of its own")
            elif not is_bare(module):
                found.convs[name] = Refusal("HAS_HOOKS", "it has hooks or a forward patched on the instance")
            else:
                convs[name] = module
        elif is_norm(module):
            refusal = refuse_norm(module)
            if refusal is not None:
                found.norms[name] = refusal
            elif not is_bare(module):
                found.norms[name] = Refusal("HAS_HOOKS", "it has hooks or a forward patched on the instance")
            else:
                norms[name] = module
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            found.norms[name] = Refusal("NORM_TYPE", f"{type(module).__name__} is not a class that folding knows")
    watch = _run(model, inputs, convs, norms)
    for name in convs:
        refusal = _refuse_conv(name, watch, found)
        if refusal is None:
            found.pairs[name] = watch.read_by[name][0]
        else:
            found.convs[name] = refusal
    folded = set(found.pairs.values())
    for name in norms.keys() - folded:
        found.norms[name] = _refuse_norm(name, watch)
    return found


def _run(model: nn.Module, inputs: Any, convs: dict[str, nn.Module], norms: dict[str, nn.Module]) -> _Watch:
    owners: dict[int, set[str]] = {}
    for name, module in {**convs, **norms}.items():
        for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            owners.setdefault(id(t), set()).add(name)
    watch = _Watch(owners)
    watch.reads = {name: [] for name in norms}
    handles = []
    for name, conv in convs.items():
        handles.append(conv.register_forward_pre_hook(_enter(watch, name)))
        handles.append(conv.register_forward_hook(_leave_conv(watch, name)))
    for name, norm in norms.items():
        handles.append(norm.register_forward_pre_hook(_enter(watch, name)))
        handles.append(norm.register_forward_hook(_leave))
    _leave.watch = watch  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), watch:
            output = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for t in named_tensors(output, "output").values():
        if id(t) in watch.outputs:
            watch.leaks.add(watch.outputs[id(t)][0])
    return watch
