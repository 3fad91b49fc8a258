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

from fastres.nn.fold import CONVS, Refusal, is_norm, refuse_norm
from fastres.nn.steps import is_bare
from fastres.verify.runs import call, named_tensors


@dataclass
class Capture:
    """``pairs`` maps a convolution's name to its BN's; every other convolution and norm has its reason.

    ``acts`` maps a convolution or a norm to the activation module that alone reads it, and reads nothing else.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    acts: dict[str, tuple[str, str]] = field(default_factory=dict)  # -> (the activation's name, what conv_act calls it)
    convs: dict[str, Refusal] = field(default_factory=dict)
    norms: dict[str, Refusal] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    """Follows the outputs of convolutions, by identity: they are kept alive while it lasts."""

    def __init__(self, convs: dict[str, nn.Module], norms: dict[str, nn.Module], acts: dict[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[str] = []  # the convolutions and norms inside whose forward we are
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # id of an output -> (its convolution, itself)
        self.readers: dict[str, list[str]] = {name: [] for name in convs}  # a norm for each of its calls
        self.sources: dict[str, list[str | None]] = {name: [] for name in norms}  # a convolution for each of its calls
        self.calls = dict.fromkeys(convs, 0)
        self.leaks: set[str] = set()  # modules whose output or tensors something else reads
        self.finals: dict[int, tuple[str, Tensor]] = {}  # id of an output, of a convolution or a norm
        self.final_leaks: set[str] = set()  # whose output something else than an activation module reads
        self.act_sources: dict[str, list[str | None]] = {name: [] for name in acts}
        self.reads_values = False  # the network asks for a value: other inputs may take other ways through it
        self.owners: dict[int, set[str]] = {}  # id of a parameter or buffer -> the modules that hold it
        for name, module in {**convs, **norms}.items():
            for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                self.owners.setdefault(id(t), set()).add(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.reads_values = True
        current = self.running[-1] if self.running else None
        for t in named_tensors((args, kwargs), "").values():
            if id(t) in self.outputs and current not in self.sources:
                self.leaks.add(self.outputs[id(t)][0])
            final = self.finals.get(id(t))
            if final is not None and current not in self.act_sources and current != final[0]:
                self.final_leaks.add(final[0])
            owners = self.owners.get(id(t), set())
            if current not in owners:
                self.leaks |= owners
        return func(*args, **kwargs)

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.running.append(name)
            if name in self.act_sources:
                final = self.finals.get(id(args[0])) if args else None
                self.act_sources[name].append(final[0] if final else None)
            if name in self.sources:
                source = self.outputs.get(id(args[0])) if args else None
                self.sources[name].append(source[0] if source else None)
                if source is not None:
                    self.readers[source[0]].append(name)

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.running.pop()
            if name in self.act_sources:
                self.finals.pop(id(output), None)  # in place: what comes out is no longer the source's output
                return
            self.finals[id(output)] = name, output
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

    def act_of(self, name: str, calls: int) -> str | None:
        """The activation module that alone reads every output of this convolution or norm, and reads nothing else."""
        readers = {act for act, sources in self.act_sources.items() if name in sources}
        if name in self.final_leaks or len(readers) != 1:
            return None
        act = readers.pop()
        return act if self.act_sources[act] == [name] * calls else None

    def refuse_norm(self, name: str) -> Refusal:
        """Why this norm stays."""
        sources = self.sources[name]
        if not sources:
            return Refusal("NOT_REACHED", "it did not run on the example")
        if None in sources:
            return Refusal("NO_CONV", "it reads something else than a convolution's output")
        return Refusal("SHARED", f"it reads {', '.join(sorted({str(s) for s in sources}))}, and not alone")


def _neighbours(model: nn.Module) -> dict[str, str]:
    """Convolutions whose output can only go to the BN behind them: neighbours in a plain nn.Sequential."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        if is_bare(module):
            names = [f"{name}.{child}".lstrip(".") for child in module._modules]
            found |= dict(zip(names, names[1:], strict=False))
    return found


def act_name(module: nn.Module) -> str | None:
    """What conv_act calls this activation; None for any other module."""
    return {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}.get(type(module))


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
            if refusal is None and module.training:
                refusal = Refusal("BATCH_STATISTICS", "it stays in training mode when its network is put in eval mode")
            if refusal is None and not is_bare(module):
                refusal = Refusal("HAS_HOOKS", "it has hooks or a forward patched on the instance")
            if refusal is None:
                norms[name] = module
            else:
                found.norms[name] = refusal
        elif isinstance(module, _NormBase) and "Batch" in type(module).__name__:
            found.norms[name] = Refusal("NORM_TYPE", f"{type(module).__name__} is not a class that folding knows")
    acts = {name: m for name, m in model.named_modules() if act_name(m) is not None and is_bare(m)}
    watch = _Watch(convs, norms, acts)
    handles = []
    for name, module in {**convs, **norms, **acts}.items():
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
        if id(t) in watch.finals:
            watch.final_leaks.add(watch.finals[id(t)][0])
    for name in {**convs, **norms}:
        calls = watch.calls[name] if name in convs else len(watch.sources[name])
        act = watch.act_of(name, calls)
        if act is not None and not watch.reads_values:
            found.acts[name] = act, str(act_name(acts[act]))
    neighbours = _neighbours(model) if watch.reads_values else None
    for name in convs:
        refusal = watch.refuse_conv(name)
        if refusal is None and neighbours is not None and neighbours.get(name) != watch.readers[name][0]:
            refusal = Refusal("DATA_DEPENDENT", "the network reads values: other inputs may take another way")
            found.norms[watch.readers[name][0]] = refusal
        if refusal is None:
            found.pairs[name] = watch.readers[name][0]
        else:
            found.convs[name] = refusal
    for name in norms.keys() - set(found.pairs.values()) - found.norms.keys():
        found.norms[name] = watch.refuse_norm(name)
    return found
