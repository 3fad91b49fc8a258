"""FrozenModel: a snapshot of a network for inference."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastres.inference.blocks import own_residuals
from fastres.inference.capture import Capture
from fastres.inference.conv import frozen_convs
from fastres.inference.graphs import Graphs
from fastres.inference.plan import choose_packs
from fastres.inference.program import Programs
from fastres.inference.report import FreezeReport
from fastres.inference.rewrite import rewrite
from fastres.ops._autograd import goes_straight
from fastres.verify.runs import call, map_tensors, named_tensors, private


def source_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those with two names, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


class Source:
    """Where a snapshot came from: a weak reference, and what its tensors were. Copies share it, pickles drop it."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._tensors: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        if model is not None:
            self._tensors = {name: (weakref.ref(t), _version(t)) for name, t in source_tensors(model).items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __reduce__(self) -> tuple[type[Source], tuple[()]]:
        return Source, ()

    @property
    def model(self) -> nn.Module | None:
        """The source, while somebody else keeps it."""
        return None if self._model is None else self._model()

    def moved(self) -> bool:
        """Whether a tensor of the source was replaced, added, removed or written to since."""
        if self.model is None:
            return False
        now = source_tensors(self.model)
        if now.keys() != self._tensors.keys():
            return True
        return any(
            reference() is not now[name] or version != _version(now[name])
            for name, (reference, version) in self._tensors.items()
        )


class Exact:
    """What runs where an input on a CPU holds NaN or infinity, which oneDNN's ReLU would hide: a twin of the network
    that shares its tensors, made when it is first needed. A deep copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self._twin: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Exact:
        return Exact()

    def __reduce__(self) -> tuple[type[Exact], tuple[()]]:
        return Exact, ()

    def wanted(self, inputs: Any) -> bool:
        """Whether a tensor is not finite: then its sum is not (nor is, rarely, that of a finite one: no harm)."""
        return any(
            t.is_floating_point() and t.device.type == "cpu" and not math.isfinite(float(t.detach().sum()))
            for t in named_tensors(inputs, "").values()
            if goes_straight(t)
        )

    def twin(self, module: nn.Module) -> nn.Module:
        tensors = source_tensors(module)
        if self._twin is None or any(t is not tensors[name] for name, t in source_tensors(self._twin).items()):
            twin = copy.deepcopy(module, {id(t): t for t in tensors.values()})
            for conv in frozen_convs(twin):
                conv.exact = True
            self._twin = twin
        return self._twin


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


class FrozenModel(nn.Module):
    """What ``fastres.freeze`` returns: the source's call signature and outputs, its weights folded, for inference only.

    Call it as the source, with any batch size. Floating inputs are cast to the frozen dtype, outputs come in it, as
    after ``model.to(dtype)``; everything runs without gradients.

    It is a snapshot: plain tensors, which ``state_dict()``, ``deepcopy`` and ``.to(device)`` handle as usual, and a
    weak reference to the source, so that freezing keeps no training model alive. ``train()`` raises. ``is_stale()``
    says whether the source's weights have changed since, ``refresh()`` folds them again.

    Attributes:
        report: what was folded and fused, the plan, times and the referee's verdict.
        dtype: what it computes in.
        images_at_a_time: larger batches run in parts of so many images; None: whole.
        module: the rewritten network.
    """

    def __init__(self, module: nn.Module, source: nn.Module, found: Capture, report: FreezeReport, dtype: torch.dtype):
        super().__init__()
        self.module = module
        self.report = report
        self.dtype = dtype
        self.channels_last = False
        self.images_at_a_time: int | None = None
        self._overwrites = False
        self.training = False
        self._found = found
        self._source = Source(source)
        self._graphs = Graphs()
        self._programs = Programs()
        self._exact = Exact()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.images_at_a_time and len(args) == 1 and not kwargs:
            images = args[0]
            if isinstance(images, Tensor) and images.ndim == 4 and len(images) > self.images_at_a_time:
                if goes_straight(images):
                    return self._in_parts(images, self.images_at_a_time)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = map_tensors((args, kwargs), self._prepare, "")
        if self._overwrites and (kwargs or not all(isinstance(arg, Tensor) for arg in args)):
            self.overwrite_residuals(False)  # a call unlike the example may keep what the example did not
        if self._exact.wanted((args, kwargs)):
            with torch.no_grad():
                return self._exact.twin(self.module)(*args, **kwargs)
        if len(self._graphs):
            replayed, output = self._graphs.replay((args, kwargs))
            if replayed:
                return output
        with torch.no_grad():
            return self._programs.run(self.module, args, kwargs)

    def _in_parts(self, images: Tensor, count: int) -> Any:
        """A few images at a time: inputs and activations stay in cache, and below the size that malloc maps anew."""
        parts = [tree_flatten(self._run((part,), {})) for part in images.detach().split(count)]
        joined = [torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in parts), strict=True)]
        return tree_unflatten(joined, parts[0][1])

    def _prepare(self, _: str, t: Tensor) -> Tensor:
        if t.is_floating_point() and t.dtype != self.dtype:
            t = t.to(self.dtype)
        if self.channels_last and t.ndim == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        return t

    def use_channels_last(self, channels_last: bool = True) -> None:
        """Run in channels_last from now on, or in NCHW again: weights and 4-dimensional inputs."""
        self.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.module.to(memory_format=layout)  # type: ignore[call-overload]

    def overwrite_residuals(self, allowed: bool) -> None:
        """Let blocks write over the output of the block before, which must be nobody else's."""
        own_residuals(self.module, allowed)
        self._programs = Programs()
        self._overwrites = allowed

    def choose_packs(self, inputs: Any) -> int:
        """Keep, for each convolution of a call on these inputs, the packed or the plain weight; how many are packed."""
        self._programs = Programs()  # they hold the weights of before, and hide the convolutions
        packed = choose_packs(frozen_convs(self.module), lambda: call(self, inputs))
        self._programs = Programs()
        return packed

    @property
    def device(self) -> torch.device:
        """Where its tensors are; the CPU if it has none."""
        return next((t.device for t in source_tensors(self.module).values()), torch.device("cpu"))

    @property
    def program(self) -> str:
        """How many operator calls the last signature's program holds, or why there is none."""
        return self._programs.describe()

    def record_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a CUDA graph for inputs of these shapes; other shapes run eagerly."""
        self._graphs.record(self.module, map_tensors((args, kwargs), self._prepare, ""))

    def drop_graphs(self) -> None:
        """Forget the recorded CUDA graphs; every shape runs eagerly."""
        self._graphs = Graphs()

    def train(self, mode: bool = True) -> FrozenModel:
        """Only ``train(False)``: a frozen model has no batch statistics to train with.

        Raises:
            RuntimeError: for ``mode=True``.
        """
        if mode:
            raise RuntimeError("a frozen model is a snapshot for inference: train the source, then call refresh()")
        return self

    def is_stale(self) -> bool:
        """Whether a parameter or buffer of the source was replaced or written to since the snapshot was taken.

        By identity and version counter, so a write through ``.data`` is not seen; False once the source is gone.
        """
        return self._source.moved()

    def refresh(self) -> None:
        """Fold the source's current weights and statistics again, into the same tensors.

        Raises:
            RuntimeError: the source is gone, its structure has changed, or a BN that was folded no longer can be (or
                the other way round); nothing has changed then, and a new ``freeze`` is what is needed.

        Example:
            >>> import torch, fastres
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
            >>> frozen = fastres.freeze(net, torch.randn(2, 3, 8, 8), tune=False)
            >>> with torch.no_grad():
            ...     _ = net[1].bias.add_(1)
            >>> frozen.is_stale(), frozen.refresh(), frozen.is_stale()
            (True, None, False)
        """
        source = self._source.model
        if source is None:
            raise RuntimeError("refresh: the source is gone; freeze the model you have")
        fresh_module = private("source", source).eval()
        mine = source_tensors(self.module)
        try:
            rows = rewrite(fresh_module, self._found, self.dtype)
        except (AttributeError, RuntimeError) as error:
            raise RuntimeError(f"refresh: the source's structure has changed, freeze it again: {error}") from error
        fresh = source_tensors(fresh_module)
        shapes = {name: t.shape for name, t in mine.items()}
        if {name: t.shape for name, t in fresh.items()} != shapes:
            changed = [f"{row.name}: {row.message}" for row in rows if row not in self.report.rows]
            raise RuntimeError(
                f"refresh: the source has changed, freeze it again: {'; '.join(changed) or 'its tensors'}"
            )
        with torch.no_grad():
            for name, t in mine.items():
                t.copy_(fresh[name])
        self._source = Source(source)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._graphs = Graphs()
        self._programs = Programs()
        self._exact = Exact()
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, channels_last={self.channels_last}"
