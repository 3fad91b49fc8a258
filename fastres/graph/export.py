"""A network as a graph of functional ATen operators: `torch.export`, tensors by their names, in-place calls undone.

The capture is of one call: its arguments that are no tensors are constants. The batch and the sizes of images may vary
as far as what the code asks of them has the same answers (questions.py). It is made at a batch of at least 2, because
a size of 1 is silently frozen in, and holds no tensor of the source but the constants that its forward makes, only
names.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.dynamic_shapes import ShapesCollection
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastres._copies import deep_copy
from fastres.graph.captured import Captured, Dims
from fastres.graph.functionalize import Impure, functionalize
from fastres.graph.questions import listening, questions_of
from fastres.graph.signature import Call
from fastres.nn.steps import has_global_hooks, is_bare

WRITES_TO_INPUT = "the source writes to its input in place; the frozen network leaves it alone"

# `torch.export` works on the whole process, so captures take turns: in another thread it patches `nn.Module.__call__`
# and sets `torch.compiler.is_compiling()`, which frozen networks therefore don't go by.
LOCK = threading.RLock()


def _free_in_child() -> None:
    """A forked child has the forking thread alone; another one may have held the lock."""
    global LOCK
    LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)


class CaptureError(Exception):
    """The network has no graph; the message says why."""


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its own modules, buffers and parameters; these are on the memory of the model's.

    For a forward that does not write to its parameters; one that may needs `own_memory` first.

    Raises:
        TypeError: the model cannot be copied.
    """
    return deep_copy(model, {id(p): _alias(p) for p in model.parameters() if type(p) is nn.Parameter})


def _alias(p: nn.Parameter) -> nn.Parameter:
    alias = nn.Parameter(p.data, p.requires_grad)  # .data: with a version counter of its own
    alias.__dict__.update(p.__dict__)
    return alias


def own_memory(model: nn.Module) -> None:
    """Gives the parameters of a `sharing_copy` memory of their own."""
    for p in model.parameters():
        p.data = p.data.clone()


def capture(model: nn.Module, call: Call, any_size: bool = True) -> Captured:
    """The graph of ``model`` for calls like ``call``: any batch and, where its code allows that, any image size.

    Args:
        model: in eval mode; a copy of one's own (`sharing_copy`), since its forward runs once.
        call: an example, of any batch size.
        any_size: whether the sizes of images may vary; else the batch alone.

    Raises:
        CaptureError: with the reason: hooks, control flow that depends on data, state that the forward writes to.
    """
    _refuse_hooks(model)
    before, attributes = plain_state(model), _attributes(model)
    try:
        captured = _capture_for_most(model, call, any_size)
        after = plain_state(model)
    except CaptureError:
        raise
    except Exception as error:  # export raises whatever the model's code does with symbols
        raise CaptureError(f"torch.export: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        _put_back(attributes)
    changed = difference({name: before[name] for name in before if name in after}, after)
    if changed:
        raise CaptureError(f"its forward changes {changed}")
    captured.dtype = dtype_of(model)
    return captured


def _capture_for_most(model: nn.Module, call: Call, any_size: bool) -> Captured:
    """The graph for the most sizes that the model can be exported for."""
    batch = batch_of(call.tensors)
    pairs = [_at_least_two(t, batch) for t in call.tensors]
    batches = [{0} if t.ndim and len(t) == batch else set() for t in call.tensors]
    images = [set(range(2, t.ndim)) if any_size and t.is_floating_point() else set() for t in call.tensors]
    for sizes in ([a | b for a, b in zip(batches, images, strict=True)], batches) if any(images) else (batches,):
        try:
            with LOCK, listening() as asked:
                program, written = _export(model, call, pairs, sizes)
            if _varies(program, batches):
                captured = _read(program, call, max(batch, 2), questions_of(program, asked), written)
                if captured.takes(call):
                    return captured
        except Exception as error:
            on_data = type(error).__name__ == "GuardOnDataDependentSymNode"
            if sizes is batches or on_data or isinstance(error, CaptureError):
                raise  # else, with fewer symbols its code may run
    given = [t.detach().clone() for t in call.tensors]  # as it is: another batch has other numbers in it
    program, written = _export(model, call, given, [set() for _ in given])
    return _read(program, call, batch, (), written)


def _export(model: nn.Module, call: Call, tensors: list[Tensor], varying: list[set[int]]) -> tuple[Any, bool]:
    """The exported program, without in-place calls, and whether one wrote to an input.

    Args:
        tensors: of the call.
        varying: of each of them the dimensions that may be of any size.
    """
    shapes = ShapesCollection()
    for t, dims in zip(tensors, varying, strict=True):
        if dims:
            shapes[t] = dict.fromkeys(sorted(dims), Dim.AUTO)
    args, kwargs = call.arguments(tensors)
    with LOCK, _quiet(), torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=cast(Any, shapes), strict=False)
        try:
            return program, functionalize(program.graph_module.graph, _lifted(program))
        except Impure:
            if any(dims - {0} for dims in varying):
                raise  # decomposed, its operators may depend on sizes in ways that are no questions
            return program.run_decompositions({}), False


def _varies(program: Any, batches: list[set[int]]) -> bool:
    """Tell whether the batch has stayed a symbol: the code has not asked for one size of it."""
    lifted = _lifted(program)
    inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name not in lifted]
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    sizes = [cast(Any, t).shape[0] for t, dims in zip(tensors, batches, strict=True) if dims]
    return not any(isinstance(size, int) or size.node.expr.is_number for size in sizes)


_MISSING = object()
_PLAIN = (bool, int, float, str)
_TORCHS_OWN = {"training", "_is_full_backward_hook"}  # of every module; they change nothing in eval mode


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Classes of the modules, their numbers and strings, what is in their lists of those: what a graph has fixed."""
    state: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        state[prefix or "the model"] = type(module).__name__
        for name, value in module.__dict__.items():
            place = f"{prefix}.{name}".lstrip(".")
            if name in _TORCHS_OWN:
                continue
            if isinstance(value, _PLAIN):
                state[place] = value
            elif isinstance(value, list | tuple | dict | set) and name[:1] != "_":
                plain = len(value) < 100 and all(isinstance(item, _PLAIN) for item in value)
                state[place] = repr(value) if plain else len(value)
    return state


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What has another value in the second state: `head.scale, which was 1 and is 2`; empty where nothing has."""
    for name in {**before, **after}:
        was, now = before.get(name, _MISSING), after.get(name, _MISSING)
        if now is _MISSING or was is _MISSING:
            return f"{name}, which {'is gone' if now is _MISSING else 'was not there'}"
        if was != now and (was == was or now == now):  # NaN is no change
            return f"{name}, which was {was!r} and is {now!r}"
    return ""


def _attributes(model: nn.Module) -> list[tuple[Any, Any]]:
    """The attributes of every module, and the lists and dicts among them, each with a copy of what is in it."""
    found: list[tuple[Any, Any]] = []
    for module in model.modules():
        held = [value for value in module.__dict__.values() if type(value) in (list, dict)]
        found += [(value, value.copy()) for value in (module.__dict__, *held)]
    return found


def _put_back(attributes: list[tuple[Any, Any]]) -> None:
    """Takes out again what a traced forward has put there: tensors without data, with which no later call would run."""
    for container, content in attributes:
        if isinstance(container, list):
            container[:] = content
        elif container.keys() != content.keys() or any(container[key] is not value for key, value in content.items()):
            container.clear()
            container.update(content)


def capture_for(model: nn.Module, call: Call, dtype: torch.dtype, any_size: bool = True) -> Captured:
    """The graph of ``model`` as it is in ``dtype``, where its code may ask for that: ``x.to(self.weight.dtype)``.

    A network whose code does not run so is captured as it is: made in ``dtype``, it may run nevertheless.
    """
    if dtype_of(model) is not dtype:
        with contextlib.suppress(CaptureError):
            cast_to = sharing_copy(model).to(dtype)
            return capture(cast_to, call.like(cast_to), any_size)
    return capture(model, call.like(model), any_size)


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of the first floating parameter or buffer, or torch's default."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def batch_of(tensors: Iterable[Tensor]) -> int:
    """The first size of the first floating tensor, or of the first one where none is; 0 for numbers alone."""
    sized = [t for t in tensors if t.ndim]
    return next((len(t) for t in [*(t for t in sized if t.is_floating_point()), *sized]), 0)


def _at_least_two(t: Tensor, batch: int) -> Tensor:
    if not t.ndim or len(t) != batch or batch >= 2:
        return t.detach().clone()
    return torch.zeros((2, *t.shape[1:]), dtype=t.dtype, device=t.device) if batch == 0 else torch.cat([t, t]).detach()


def _refuse_hooks(model: nn.Module) -> None:
    if has_global_hooks():
        raise CaptureError("hooks on every module are set (register_module_forward_hook)")
    for name, module in model.named_modules():
        if not is_bare(module):
            raise CaptureError(f"{name or 'the model'} has hooks or a forward patched on the instance")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own warnings: what goes wrong is raised, and put into the report."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.export", "torch._export", "torch.fx", "torch.fx.experimental", "torch._subclasses")
    ]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # export prints the graph of a failure
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


def _lifted(program: Any) -> set[str]:
    """The names of the placeholders that stand for the source's tensors."""
    specs = program.graph_signature.input_specs
    return {spec.arg.name for spec in specs if spec.kind is not InputKind.USER_INPUT}


def _read(program: Any, call: Call, batch: int, questions: tuple[str, ...], written: bool) -> Captured:
    """The exported program as a `Captured`; `written`: it wrote to an input, which `functionalize` has undone."""
    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            raise CaptureError(f"its forward writes to {spec.target}")
        if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION):
            raise CaptureError(f"an output of kind {spec.kind.name}")
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[tuple[Dims, torch.dtype]] = []
    notes: list[str] = []
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                if not node.users:
                    continue
                name = spec.target
                if spec.kind is InputKind.CONSTANT_TENSOR:
                    name = _constant_name(program.constants[spec.target])
                    constants[name] = program.constants[spec.target]
                values[node] = graph.create_node("get_attr", name)
            elif spec.kind is not InputKind.USER_INPUT:
                raise CaptureError(f"an input of kind {spec.kind.name}")
            elif isinstance(spec.arg, ConstantArgument):
                values[node] = spec.arg.value
                continue
            else:
                values[node] = graph.placeholder(node.name)
                inputs.append((_dims(node.meta["val"]), node.meta["val"].dtype))
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise CaptureError(f"its forward has a {node.target.name()} region")
            values[node] = graph.node_copy(node, values.__getitem__)
        elif node.op == "output":
            kept = [
                value
                for value, spec in zip(node.args[0], signature.output_specs, strict=True)
                if spec.kind is OutputKind.USER_OUTPUT
            ]
            if written or len(kept) < len(node.args[0]):
                notes.append(WRITES_TO_INPUT)
            graph.output(tuple(values[value] if isinstance(value, fx.Node) else value for value in kept))
            continue
        else:
            raise CaptureError(f"a {node.op} node")
        if isinstance(values[node], fx.Node):
            values[node].meta = _meta(node)
    fixed = batch if all(isinstance(dim, int) for dims, _ in inputs for dim in dims) else None
    if fixed is not None and inputs:
        notes.append(f"the network fixes its batch: captured for {fixed}, other sizes are captured on their first call")
    tree = program.call_spec.out_spec
    tree = tree_flatten(_mutable(tree_unflatten(list(range(tree.num_leaves)), tree)))[1]
    return Captured(graph, inputs, tree, call.tree, call.plain, constants, batch, notes, questions)


def _mutable(value: Any) -> Any:
    """The structure with dicts and lists for torch.fx's immutable ones, which a GraphModule itself does not return."""
    if isinstance(value, immutable_dict):
        return {key: _mutable(item) for key, item in value.items()}
    if isinstance(value, immutable_list):
        return [_mutable(item) for item in value]
    return tuple(map(_mutable, value)) if type(value) is tuple else value


def _constant_name(t: Tensor) -> str:
    """A name that follows from what is in the tensor: captures of one source share steps by the names of tensors."""
    digest = hashlib.sha256(f"{t.dtype} {tuple(t.shape)} {t.device}".encode())
    digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"constant_{digest.hexdigest()[:16]}"


def _dims(value: Any) -> Dims:
    return tuple(size if isinstance(size, int) else _size(size) for size in value.shape)


def _size(size: Any) -> int | str:
    """A number, also of a symbol that has turned out to be one; or the symbol's name."""
    return int(size.node.expr) if size.node.expr.is_number else str(size)


def _meta(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        meta["shape"], meta["dtype"] = _dims(value), value.dtype
        sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
        if None not in sizes:  # as what nonzero() gives has it
            meta["size"] = tuple(int(size) for size in sizes)
    elif isinstance(value, torch.SymInt):
        meta["value"] = _size(value)
    stack = node.meta.get("nn_module_stack")
    if stack:
        meta["where"] = list(stack.values())[-1][0]
    return meta
