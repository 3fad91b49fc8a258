"""Programs: what a frozen network calls, written down once for an input signature and then run without its modules.

Between two convolutions a module's Python (its call, its checks, its attributes) finds the caches full of weights and
costs several times what it costs alone: 2 to 4 % of a ResNet-50 at batch 1. A program is one function of as many lines
as there are operator calls, on the same weights, the packed ones included, in the same order, so with the same bits.

It is recorded below the modules, so it holds what they decided for this signature. Whatever could decide otherwise is
asked at every call: the modules, their tensors and versions, hooks. A network that reads a value (``item()``), draws
random numbers, writes to something it did not make, or answers another input differently, keeps running its modules.
"""

from __future__ import annotations

import functools
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastres.nn.steps import has_global_hooks
from fastres.ops._autograd import is_plain_eager, recorded_below

_SIGNATURES = 8  # that a model keeps a program for
_REFUSED_TAGS = (torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape)
_BINARY = torch.ops.mkldnn._convolution_pointwise.binary
_BINARY_ = torch.ops.mkldnn._convolution_pointwise_.binary
_PLAIN = (bool, int, float, str, type(None))


class _Refused(Exception):
    """This network has no program."""


class _Line:
    """A name in a program's text; its repr is what stands there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class _Recorder(TorchDispatchMode):
    """Writes every operator call down as a line: `t5 = f3(t2, c7, [1, 1])`."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []
        self.binaries: dict[int, tuple[str, int]] = {}  # line -> itself over its residual, and the residual's memory
        self.scope: dict[str, Any] = {}  # the constants too: nothing takes their place in memory
        self.names: dict[int, _Line] = {}  # id of a tensor that is alive -> its name
        self.count = 0
        self.ends: dict[int, weakref.ref[Tensor]] = {}  # tells when one goes, and its id may be used again
        self.memories: dict[int, tuple[int, int]] = {}  # a storage -> its number, and how many tensors of it are alive
        self.memory_of: dict[str, int] = {}  # a tensor of the program -> its storage's number
        self.last_use: dict[str, int] = {}  # a tensor of the program -> the line that reads it last
        self.foreign: set[int] = set()  # storages of constants: the network's own tensors
        self.not_ours: set[int] = set()  # numbers of those, where views have names, and of the inputs'
        for t in inputs:
            self.give_name(t)
            self.not_ours.add(self.memory_of[self.names[id(t)].name])

    def give_name(self, t: Tensor) -> _Line:
        """The tensor's name in the program. It is not kept: a recording needs no more memory than a call."""
        name = self.names.get(id(t))
        if name is None:
            name = self.names[id(t)] = _Line(f"t{self.count}")
            self.count += 1
            storage = _storage(t)
            number, alive = self.memories.get(storage, (self.count, 0))
            self.memories[storage] = number, alive + 1
            self.memory_of[name.name] = number
            if storage in self.foreign:
                self.not_ours.add(number)
            self.ends[id(t)] = weakref.ref(t, functools.partial(self.forget, id(t), storage))
        self.last_use[name.name] = len(self.lines)
        return name

    def forget(self, key: int, storage: int, _: Any) -> None:
        """A tensor is gone."""
        del self.names[key], self.ends[key]
        number, alive = self.memories.pop(storage)
        if alive > 1:
            self.memories[storage] = number, alive - 1

    def constant(self, value: Any, letter: str) -> _Line:
        name = f"{letter}{len(self.scope)}"
        self.scope[name] = value
        return _Line(name)

    def spell(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self.names.get(id(value))
            if known is not None:
                self.last_use[known.name] = len(self.lines)
                return known
            self.foreign.add(_storage(value))
            return self.constant(value, "c")
        if isinstance(value, _PLAIN) and not (isinstance(value, float) and not math.isfinite(value)):
            return value
        return self.constant(value, "c")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _REFUSED_TAGS):
            raise _Refused(f"it calls {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            own = isinstance(value, Tensor) and id(value) in self.names and _storage(value) not in self.foreign
            if written and isinstance(value, Tensor) and not own:
                raise _Refused(f"{func} writes to a tensor that is not its own")
        output = func(*args, **kwargs)
        leaves, _ = tree_flatten(output)
        returns = any(isinstance(leaf, Tensor) for leaf in leaves)
        if not returns and not func._schema.is_mutable:
            return output  # a kernel that left the call to another one
        spelled = ", ".join(
            [repr(tree_map(self.spell, value)) for value in args]
            + [f"{key}={tree_map(self.spell, value)!r}" for key, value in kwargs.items()]
        )
        if not returns:  # it has written to tensors of the program
            self.lines.append(f"{self.constant(func, 'f')}({spelled})")
            return output
        targets = [self.give_name(leaf).name if isinstance(leaf, Tensor) else "_" for leaf in leaves]
        target = targets[0] if isinstance(output, Tensor) else f"({', '.join(targets)},)"
        if func is _BINARY and id(args[1]) in self.names:
            over = ", ".join(repr(tree_map(self.spell, value)) for value in (args[1], args[0], *args[2:]))
            memory = self.memory_of[self.names[id(args[1])].name]
            self.binaries[len(self.lines)] = f"{target} = {self.constant(_BINARY_, 'f')}({over})", memory
        self.lines.append(f"{target} = {self.constant(func, 'f')}({spelled})")
        return output

    def overwrite(self, outputs: list[Any]) -> None:
        """Convolutions with a residual write over it where the program made it and nothing reads its memory later.

        Out of place the residual is copied first: 0.8 to 1.2 ms of a ResNet-18 at batch 8.
        """
        returned = {self.names[id(t)].name for t in outputs if id(t) in self.names}
        last: dict[int, float] = {}  # a storage's number -> the last line that reads it
        for name, memory in self.memory_of.items():
            last[memory] = max(last.get(memory, 0), math.inf if name in returned else self.last_use[name])
        for line, (text, memory) in self.binaries.items():
            if last[memory] <= line and memory not in self.not_ours:
                self.lines[line] = text


def _storage(t: Tensor) -> int:
    opaque = t.layout is torch._mkldnn  # type: ignore[attr-defined]  # a packed weight has no storage of torch's
    return id(t) if opaque else int(t.untyped_storage()._cdata)


def _write(recorder: _Recorder, inputs: list[Tensor], outputs: list[Any]) -> Callable[..., list[Any]]:
    """The function of the recorded lines; a tensor is let go behind the line that reads it last."""
    names = [recorder.names[id(t)].name for t in inputs]
    returned = [repr(recorder.spell(leaf)) for leaf in outputs]
    body = []
    for index, line in enumerate(recorder.lines):
        body.append(line)
        dead = [name for name, last in recorder.last_use.items() if last == index and name not in returned]
        if dead:
            body.append(f"del {', '.join(dead)}")
    text = "\n    ".join([f"def program({', '.join(names)}):", *body, f"return [{', '.join(returned)}]"])
    scope = dict(recorder.scope)
    exec(text, scope)
    made: Callable[..., list[Any]] = scope["program"]
    made.__doc__ = text
    return made


class _Guards:
    """What a program was recorded with; it holds while all of it is unchanged."""

    def __init__(self, module: nn.Module) -> None:
        self.entries: list[tuple[dict[str, Any], str, Any]] = []
        self.hooks: list[Any] = []
        tensors: dict[int, Tensor] = {}
        for m in module.modules():
            for table in (m._modules, m._parameters, m._buffers):
                self.entries += [(table, name, value) for name, value in table.items()]
            tensors |= {id(t): t for t in [*m._parameters.values(), *m._buffers.values()] if t is not None}
            self.hooks += [m._forward_hooks, m._forward_pre_hooks]
        self.tensors = [(t, t.data_ptr(), t._version) for t in tensors.values() if not t.is_inference()]

    def hold(self) -> bool:
        for table, name, value in self.entries:
            if table.get(name) is not value:
                return False
        for t, address, version in self.tensors:
            if t._version != version or t.data_ptr() != address:
                return False
        return not any(self.hooks) and not has_global_hooks()


class Programs:
    """A frozen network's programs by input signature, made at the second call of one. Copies and pickles are empty."""

    def __init__(self) -> None:
        # With the tree of its outputs; None: the signature was seen once.
        self._found: dict[Any, tuple[Callable[..., list[Any]], Any] | None] = {}
        self._guards: _Guards | None = None
        self.refusal = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()

    def __len__(self) -> int:
        return sum(found is not None for found in self._found.values())

    def describe(self) -> str:
        """A few words for the report."""
        if self.refusal:
            return f"none: {self.refusal}"
        calls = [
            len(re.findall(r"\bf\d+\(", found[0].__doc__ or "")) for found in self._found.values() if found is not None
        ]
        return f"{calls[0]} calls" if calls else "none"

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`module(*args, **kwargs)`, by its program where there is one. Call it without gradients."""
        if self.refusal or torch.is_autocast_enabled("cpu"):  # casts would be written down with the calls
            return module(*args, **kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(t.device.type != "cpu" for t in tensors) or not is_plain_eager(*tensors):
            return module(*args, **kwargs)
        key = tuple((t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else (type(t), t) for t in leaves), tree
        try:
            found = self._found[key]
        except (KeyError, TypeError):  # TypeError: an argument that is no key
            return self._seen_once(key, module, args, kwargs)
        guards = self._guards  # another thread may drop it
        if guards is not None and not guards.hold():
            self._found.clear()
            self._guards = None
            return self._seen_once(key, module, args, kwargs)
        if found is None:
            return self._record(key, module, args, kwargs)
        program, outputs = found
        return tree_unflatten(program(*tensors), outputs)

    def _seen_once(self, key: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = module(*args, **kwargs)
        try:
            for oldest in list(self._found)[: 1 - _SIGNATURES]:  # a list: other threads write to the table
                self._found.pop(oldest, None)
            self._found[key] = None
        except TypeError:
            self.refusal = "an argument is neither a tensor nor hashable"
        return output

    def _record(self, key: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guards = self._guards or _Guards(module)
        if not guards.hold():  # hooks: not now, perhaps later
            return module(*args, **kwargs)
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        try:
            recorder = _Recorder(tensors)
            with recorded_below(), recorder:
                output = module(*args, **kwargs)
            outputs, tree = tree_flatten(output)
            if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in outputs):
                raise _Refused("it returns something else than tensors and plain values")
            plain = list(recorder.lines)
            recorder.overwrite(outputs)
            program = _write(recorder, tensors, outputs)
            if not self._agrees(program, module, args, kwargs):
                # a residual that is written over may be added in another order
                recorder.lines = plain
                program = _write(recorder, tensors, outputs)
                if not self._agrees(program, module, args, kwargs):
                    raise _Refused("it answers another input differently")
        except _Refused as reason:
            self.refusal = str(reason)
            return module(*args, **kwargs)
        self._guards, self._found[key] = guards, (program, tree)
        return output

    def _agrees(self, program: Callable[..., list[Any]], module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether the program answers another input as the modules do, to the bit."""
        other = tree_map(lambda t: t.flip(-1) if isinstance(t, Tensor) and t.ndim else t, (args, kwargs))
        other = tree_map(_like, other, (args, kwargs))
        wanted, _ = tree_flatten(module(*other[0], **other[1]))
        got = program(*[leaf for leaf in tree_flatten(other)[0] if isinstance(leaf, Tensor)])
        return all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(got, wanted, strict=True)
        )


def _like(t: Any, of: Any) -> Any:
    """`t` with the strides of the tensor `of`."""
    return torch.empty_like(of).copy_(t) if isinstance(t, Tensor) else t
