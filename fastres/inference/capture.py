"""Which convolution each BN reads, found by running the model once on the example.

Hooks say when a convolution or a BN runs and on which tensor; a dispatch mode sees every operator that touches a
convolution's output, its weights or a BN's tensors anywhere else. A pair is folded only when every call of the one
feeds exactly one call of the other and nothing else sees what lies between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.inference.fold import CONVS, Refusal, is_norm, refuse_norm
from fastres.nn.steps import is_bare
from fastres.verify.runs import call, named_tensors


@dataclass
class Capture:
    """``pairs`` maps a convolution's name to its BN's; every other convolution and norm has its reason."""

    pairs: dict[str, str] = field(default_factory=dict)
    convs: dict[str, Refusal] = field(default_factory=dict)
    norms: dict[str, Refusal] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    """Follows the outputs of convolutions, by identity: they are kept alive while it lasts."""

    def __init__(self, convs: dict[str, nn.Module], norms: dict[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[str] = []  # the convolutions and norms inside whose forward we are
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # id of an output -> (its convolution, itself)
        self.readers: dict[str, list[str]] = {name: [] for name in convs}  # a norm for each of its calls
        self.sources: dict[str, list[str | None]] = {name: [] for name in norms}  # a convolution for each of its calls
        self.calls = dict.fromkeys(convs, 0)
        self.leaks: set[str] = set()  # modules whose output or tensors something else reads
        self.owners: dict[int, set[str]] = {}  # id of a parameter or buffer -> the modules that hold it
        for name, module in {**convs, **norms}.items():
            for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                self.owners.setdefault(id(t), set()).add(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        current = self.running[-1] if self.running else None
        for t in named_tensors((args, kwargs), "").values():
            if id(t) in self.outputs and current not in self.sources:
                self.leaks.add(self.outputs[id(t)][0])
            owners = self.owners.get(id(t), set())
            if current not in owners:
                self.leaks |= owners
        return func(*args, **kwargs)

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.running.append(name)
            if name in self.sources:
                source = self.outputs.get(id(args[0])) if args else None
                self.sources[name].append(source[0] if source else None)
                if source is not None:
                    self.readers[source[0]].append(name)

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.running.pop()
            if name in self.calls:
                self.calls[name] += 1
                self.outputs[id(output)] = name, output

        return hook

    def refuse_conv(self, name: str) -> Refusal | None:
        """Why nothing can be folded into this convolution."""
        readers = set(self.readers[name])
        if not self.calls[name]:
            return Refusal("NOT_REACHED", "it did not run on the example")
        if not readers:
            return Refusal("NO_NORM", "no BN reads it")
        if name in self.leaks:
            return Refusal("OTHER_USE", "its output or weight is used elsewhere too")
        if len(readers) > 1 or len(self.readers[name]) != self.calls[name]:
            return Refusal("SHARED", f"its {self.calls[name]} calls are read by {', '.join(sorted(readers))}")
        norm = readers.pop()
        if set(self.sources[norm]) != {name}:
            return Refusal("SHARED", f"its BN {norm} reads other tensors too")
        if norm in self.leaks:
            return Refusal("OTHER_USE", f"the tensors of its BN {norm} are used elsewhere too")
        return None

    def refuse_norm(self, name: str) -> Refusal:
        """Why this norm stays."""
        sources = self.sources[name]
        if not sources:
            return Refusal("NOT_REACHED", "it did not run on the example")
        if None in sources:
            return Refusal("NO_CONV", "it reads something else than a convolution's output")
        return Refusal("SHARED", f"it reads {', '.join(sorted({str(s) for s in sources}))}, and not alone")


def capture(model: nn.Module, inputs: Any) -> Capture:
    """Run ``model`` once, without gradients, and say which BN can be folded into which convolution.

    Args:
        model: a private copy in eval mode; hooks are added and removed.
        inputs: an example: a tensor, a tuple of arguments or a mapping.
    """
    found = Capture()
    convs: dict[str, nn.Module] = {}
    norms: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, CONVS):
            if type(module) not in CONVS:
                found.convs[name] = Refusal("CONV_TYPE", f"{type(module).__name__} is not a plain convolution")
            elif not is_bare(module):
                found.convs[name] = Refusal("HAS_HOOKS", "it has hooks or a forward patched on the instance")
            else:
                convs[name] = module
        elif is_norm(module):
            refusal = refuse_norm(module)
            if refusal is None and not is_bare(module):
                refusal = Refusal("HAS_HOOKS", "it has hooks or a forward patched on the instance")
            if refusal is None:
                norms[name] = module
            else:
                found.norms[name] = refusal
        elif isinstance(module, _NormBase) and "Batch" in type(module).__name__:
            found.norms[name] = Refusal("NORM_TYPE", f"{type(module).__name__} is not a class that folding knows")
    watch = _Watch(convs, norms)
    handles = []
    for name, module in {**convs, **norms}.items():
        handles.append(module.register_forward_pre_hook(watch.enter(name)))
        handles.append(module.register_forward_hook(watch.leave(name)))
    try:
        with torch.no_grad(), watch:
            output = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for t in named_tensors(output, "output").values():
        if id(t) in watch.outputs:
            watch.leaks.add(watch.outputs[id(t)][0])
    for name in convs:
        refusal = watch.refuse_conv(name)
        if refusal is None:
            found.pairs[name] = watch.readers[name][0]
        else:
            found.convs[name] = refusal
    for name in norms.keys() - set(found.pairs.values()):
        found.norms[name] = watch.refuse_norm(name)
    return found
