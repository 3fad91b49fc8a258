"""verify: runs the reference in float64, eager in the working dtype, and the candidate on the same inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import calibrate, uncalibrated
from .floor import FEW, ULPS, WIDTH, FindGates, HoldGates, NearestGates, Relus
from .runs import Function, Run, devices_of, evaluate, map_tensors, named_tensors, private
from .verdict import Reference, Verification, compare

_WORKING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def verify(
    reference: Function,
    candidate: Function,
    inputs: Any,
    *,
    backward: bool = True,
    training: bool | None = None,
    dtype: torch.dtype | None = None,
    calibrate_bn: bool = True,
    floor_ulps: float = ULPS,
    seed: int = 0,
) -> Verification:
    """Judge the accuracy of ``candidate`` against eager PyTorch's, with float64 as the truth.

    The reference is evaluated in float64, in the working dtype ("eager"), and the candidate in the working dtype:
    outputs, the gradients of inputs and parameters for one fixed random cotangent, and every buffer (running
    statistics) that a call moves. A tensor passes when the candidate's RMS error is at most 2x eager's plus the
    floor's, its largest error at most 4x eager's plus the floor's, and its NaN and infinities are where eager's are.
    See ``fastres/verify/floor.py`` for the floor. Integer and boolean tensors must be equal to eager's.

    Everything runs on copies: the caller's parameters, buffers, flags, gradients, inputs and random state stay as they
    are. Dropout draws from the same seed in every run.

    Args:
        reference: an ``nn.Module``, or a function of tensors that also works in float64.
        candidate: the module or function to judge; parameters and outputs are matched by name.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments. Gradients are compared for the inputs
            with ``requires_grad``, or for all floating ones if none has it.
        backward: compare gradients too.
        training: run both in training or in eval mode; None leaves both as they are.
        dtype: working dtype; None takes the candidate's. Copies are cast to it as ``model.to`` does, and the inputs are
            rounded to it first, so that all three see the same numbers.
        calibrate_bn: first give BN layers with initial statistics, with which a network explodes in eval mode, the
            statistics of ``inputs``, in both copies. ``.notes`` says whether that was done.
        floor_ulps: 4 by design; 0 demands errors within 2x and 4x of eager's without a floor, for results that should
            be exact.
        seed: for the cotangent, the perturbations and dropout.

    Returns:
        A :class:`Verification`: truthy if everything passed; ``print`` shows a table, ``to_dict()`` gives data.

    Raises:
        TypeError: an argument of the wrong kind, or a module that cannot be copied.
        ValueError: no tensor in ``inputs``; an output without tensors; a flag that does not fit.
        RuntimeError: an error in one of the three runs, naming the run.

    Source: FlashAttention's tests (error at most 2x PyTorch's against a better reference); Higham, "Accuracy and
    Stability of Numerical Algorithms", section 1.5 (a result as good as exact data perturbed by rounding).

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from fastres.functional import add_relu
        >>> bool(verify(lambda x, r: torch.relu(x + r), add_relu, (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))))
        True
        >>> bool(verify(lambda x, r: torch.relu(x + r), torch.add, (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))))
        False
    """
    _check(reference, candidate, inputs, training, dtype, floor_ulps)
    tensors = named_tensors(inputs, "input")
    notes: list[str] = []
    devices = devices_of(inputs, *(m for m in (reference, candidate) if isinstance(m, nn.Module)))
    with torch.random.fork_rng(devices), torch.inference_mode(False):
        theirs, ours = (_copy(name, f, training) for name, f in (("reference", reference), ("candidate", candidate)))
        if isinstance(theirs, nn.Module) and isinstance(ours, nn.Module) and theirs.training != ours.training:
            flags = f"reference.training is {theirs.training}, candidate.training {ours.training}"
            raise ValueError(f"training: {flags}; pass training=True or training=False")
        if isinstance(theirs, nn.Module) and calibrate_bn:
            notes += _calibrate(theirs, ours, inputs)
        marked = _wanted(tensors) if backward else None
        if dtype is not None and isinstance(ours, nn.Module):
            ours = ours.to(dtype)
        own = _dtype_of(theirs)
        working = dtype or _dtype_of(ours) or own
        cast = working if working is not None and own is not None and working != own else None
        if cast is not None:
            notes.append(f"eager is the reference cast from {_name(own)} to {_name(cast)}")
            inputs = _rounded(inputs, cast)
        run = functools.partial(evaluate, inputs=inputs, wanted=marked, seed=seed)
        model = _copy("reference", theirs)
        eager = _attempt("eager reference", run, model if cast is None else model.to(cast))
        del model  # each copy is freed after its run
        if not eager.outputs:
            raise ValueError("reference: its output holds no tensor")
        mine = _attempt("candidate", run, ours, cotangents=eager.cotangents)
        del ours
        run = functools.partial(run, cast=torch.float64, cotangents=eager.cotangents)
        exact = _reference(theirs, run, _epsilons(theirs, working, tensors, eager), floor_ulps, backward)
    rows = compare(exact, eager, mine, floor_ulps)
    mode = theirs.training if isinstance(theirs, nn.Module) else training
    shown = working or max((t.dtype for t in eager.outputs.values() if t.is_floating_point()), key=_eps, default=None)
    return Verification(tuple(rows), _name(shown), mode, backward, tuple(notes))


def _check(
    reference: Any, candidate: Any, inputs: Any, training: bool | None, dtype: torch.dtype | None, floor_ulps: float
) -> None:
    for name, function in (("reference", reference), ("candidate", candidate)):
        if not callable(function):
            raise TypeError(f"{name}: got {type(function).__name__}, expected an nn.Module or a function")
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a tensor, a tuple or a mapping of arguments")
    if not named_tensors(inputs, "input"):
        raise ValueError(f"inputs: no tensor in {type(inputs).__name__} of {len(inputs)}, expected at least one")
    complex_ = [name for name, t in named_tensors(inputs, "input").items() if t.is_complex()]
    if complex_:
        raise TypeError(f"inputs: {complex_[0]} is complex, expected real tensors")
    if training is not None and not isinstance(training, bool):
        raise TypeError(f"training: got {training!r}, expected True, False or None")
    if dtype is not None and dtype not in _WORKING:
        raise TypeError(f"dtype: got {dtype!r}, expected one of {', '.join(_name(d) for d in _WORKING)}")
    if isinstance(floor_ulps, bool) or not isinstance(floor_ulps, int | float):
        raise TypeError(f"floor_ulps: got {floor_ulps!r}, expected a number")
    if not 0 <= floor_ulps <= ULPS:
        raise ValueError(f"floor_ulps: got {floor_ulps}, expected 0 to {ULPS:g}")


def _copy(argument: str, function: Function, training: bool | None = None) -> Any:
    """A private copy of a module, in the mode asked for; a function as it is."""
    if not isinstance(function, nn.Module):
        return function
    model = private(argument, function)
    if training is not None:
        model.train(training)
    return model


def _reference(theirs: Any, run: Any, epsilons: list[float], ulps: float, backward: bool) -> Reference:
    """The float64 run, and the runs that measure the floor."""

    def attempt(**options: Any) -> Run:
        exact = _copy("reference", theirs)
        return _attempt(
            "reference in float64", run, exact.double() if isinstance(exact, nn.Module) else exact, **options
        )

    if not ulps:
        return Reference(attempt())
    if not backward:  # gates only matter to gradients
        exact = attempt()
        return Reference(exact, perturbed={e: [attempt(mode=Relus(ulps * e), amplitude=ulps * e)] for e in epsilons})
    find = FindGates(WIDTH * ulps * max(epsilons))
    reference = Reference(attempt(mode=find))
    few = find.count <= FEW
    if few:
        reference.switched = [attempt(mode=HoldGates(find, gate)) for gate in find.found]
    for eps in epsilons:
        size = ulps * eps
        reference.perturbed[eps] = []
        for noise, sign in ((1, 1), (2, -1)):
            shift = sign * size
            mode = HoldGates(find, shift=shift) if few else NearestGates(WIDTH * size, sign > 0, shift)
            reference.perturbed[eps].append(attempt(mode=mode, amplitude=size, noise=noise))
    return reference


def _rounded(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with the floating ones cast to ``dtype``; a tensor given twice stays one tensor."""
    done: dict[int, Tensor] = {}

    def cast(_: str, t: Tensor) -> Tensor:
        return done.setdefault(id(t), t.detach().to(dtype)) if t.is_floating_point() else t

    return map_tensors(inputs, cast, "input")


def _attempt(what: str, run: Any, function: Function, **options: Any) -> Run:
    try:
        result: Run = run(function, **options)
    except Exception as error:
        raise RuntimeError(f"verify: the {what} raised {type(error).__name__}: {error}") from error
    return result


def _calibrate(theirs: nn.Module, ours: Any, inputs: Any) -> list[str]:
    """Calibrate both copies; return the notes about it."""
    names = uncalibrated(theirs)
    if not names:
        return []
    layers = f"{len(names)} BN layer{'s' if len(names) > 1 else ''} had initial statistics"
    others = set(uncalibrated(ours)) if isinstance(ours, nn.Module) else set()
    if not set(names) <= others:
        return [f"{layers}; the candidate has no such layers to calibrate, so the network is compared as it is"]
    try:
        calibrate(theirs, inputs)
    except Exception as error:
        return [f"{layers} and could not be calibrated on these inputs: {error}"]
    for name in names:
        source, target = theirs.get_submodule(name), ours.get_submodule(name)
        for buffer, value in source.named_buffers(recurse=False):
            target.get_buffer(buffer).copy_(value)
    return [f"{layers}; copies of both were given the statistics of the inputs"]


def _wanted(tensors: dict[str, Tensor]) -> frozenset[str]:
    marked = {name for name, t in tensors.items() if t.requires_grad}
    return frozenset(marked or {name for name, t in tensors.items() if t.is_floating_point()})


def _dtype_of(function: Any) -> torch.dtype | None:
    """The dtype of most of a module's floating parameters (buffers where it has none); None for a function."""
    if not isinstance(function, nn.Module):
        return None
    for tensors in (function.parameters(), function.buffers()):
        counts: dict[torch.dtype, int] = {}
        for t in tensors:
            if t.is_floating_point():
                counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
        if counts:
            return max(counts, key=lambda d: counts[d])
    return None


def _epsilons(theirs: Any, working: torch.dtype | None, tensors: dict[str, Tensor], eager: Run) -> list[float]:
    """The eps to allow for: the coarsest in a network; for a function, each of its results'."""
    results = [t for _, _, t in eager.tensors() if t is not None and t.is_floating_point()]
    if not isinstance(theirs, nn.Module):
        return sorted({_eps(t.dtype) for t in results})
    dtypes = {t.dtype for t in [*tensors.values(), *results] if t.is_floating_point()}
    if working is not None:
        dtypes.add(working)
    for device in {t.device.type for t in tensors.values()}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return [max(map(_eps, dtypes))]


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
