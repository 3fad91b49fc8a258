"""The checks of freeze: what it refuses before it begins, and what it says where the model does not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastres.verify.runs import call, map_tensors, named_tensors

_QUANTISED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.quantized",
    "torch.nn.intrinsic.quantized",
)


def check_model(model: nn.Module) -> None:
    """Refuses what has no plain weights to fold, before anything runs.

    Raises:
        TypeError: a TorchScript module, a quantized one, weights of a tensor subclass (DTensor, torchao's).
        ValueError: weights on the meta device, or of a lazy module that has not run yet.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: got a {type(model).__name__}, expected the nn.Module that it was made of")
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            what = f"{name or 'it'} is a quantized {type(module).__name__} ({type(module).__module__})"
            raise TypeError(f"model: {what}, expected float weights: freeze the model that was quantized")
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, t in named:
        if is_lazy(t):
            raise ValueError(f"model: {name} has no shape yet: run the model once before freezing it")
        if t.is_quantized or is_traceable_wrapper_subclass(t):
            raise TypeError(f"model: {name} is a {t.dtype if t.is_quantized else type(t).__name__}, expected a tensor")
    if any(t.is_meta for _, t in named):
        raise ValueError("model: it is on the meta device and has no weights to fold")


def check_example(inputs: Any, name: str = "example_inputs") -> None:
    """Refuses an example that nothing can be run or measured on.

    Raises:
        TypeError: no tensor, tuple, list or mapping.
        ValueError: no tensor in it, a tensor without data, no tensor with an element.
    """
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise TypeError(f"{name}: got {type(inputs).__name__}, expected a tensor, a tuple or a mapping")
    tensors = named_tensors(inputs, name)
    if not tensors:
        raise ValueError(f"{name}: no tensor in it, expected an example of one call")
    for its_name, t in tensors.items():
        if t.is_meta:
            raise ValueError(f"{its_name}: got a tensor on the meta device, expected one with data")
    if not any(t.numel() for t in tensors.values()):
        raise ValueError(f"{name}: got {shapes(inputs)} without an element, expected one image or more")


def own_example(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copies of the example's tensors on ``device``, floating ones in ``dtype``; a tensor given twice stays one."""
    done: dict[int, Tensor] = {}

    def copied(_: str, t: Tensor) -> Tensor:
        if id(t) not in done:
            done[id(t)] = t.detach().to(device, dtype if t.is_floating_point() else t.dtype, copy=True)
        return done[id(t)]

    return map_tensors(inputs, copied, "example_inputs")


def without_writing(function: Callable[[Any], Any], inputs: Any) -> Callable[[], Any]:
    """``function(inputs)`` as often as one likes: on copies, if it writes to its input, as one try tells."""
    tried = copies(inputs)
    versions = [t._version for t in named_tensors(tried, "").values()]
    function(tried)
    if [t._version for t in named_tensors(tried, "").values()] == versions:
        return lambda: function(inputs)
    return lambda: function(copies(inputs))


@contextmanager
def names_the_example(inputs: Any, name: str = "example_inputs") -> Iterator[None]:
    """Around a run of the source on the example.

    Raises:
        ValueError: it does not run; the message holds the example's shapes and what the model said.
    """
    try:
        yield
    except Exception as error:  # whatever the model's code raises for inputs that are not its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        said = f"{type(error).__name__}: {lines[0].strip()}"
        raise ValueError(f"{name}: the model does not run on {shapes(inputs)}: {said}") from error


def shapes(inputs: Any) -> str:
    """`float32 [2, 3, 8, 8], int64 [2]`, as messages name an example."""
    tensors = named_tensors(inputs, "").values()
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)


def copies(inputs: Any) -> Any:
    """The example again, in memory of its own."""
    return map_tensors(inputs, lambda _, t: t.clone(), "")


def put_back(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[str]:
    """Gives tensors that a forward wrote to their values back; the names of those that it had to."""
    moved = [name for name, t in tensors.items() if not _same_bits(t, values[name].to(t.device))]
    with torch.no_grad():
        for name in moved:
            tensors[name].copy_(values[name])
    return moved


def _same_bits(t: Tensor, value: Tensor) -> bool:
    return torch.equal(t, value) or bool(((t == value) | ((t != t) & (value != value))).all())


def run_once(model: nn.Module, given: Any) -> Any:
    """The model's answer to a copy of an example; networks that draw numbers draw the same in every run."""
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        return call(model, copies(given))
