"""FrozenModel: a snapshot of a network for inference."""

from __future__ import annotations

import inspect
import logging
import math
import os
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastres.inference.blocks import own_residuals
from fastres.inference.capture import CaptureError, capture_for, sharing_copy
from fastres.inference.conv import Packs, frozen_convs, is_traced
from fastres.inference.engine import Engine, Variant, Variants
from fastres.inference.gate import Running, capturing
from fastres.inference.nans import pass_nan
from fastres.inference.plan import Plan, choose_packs
from fastres.inference.recipe import GraphRecipe, Recipe, source_tensors
from fastres.inference.report import FreezeReport
from fastres.inference.signature import Call, Signature
from fastres.ops._autograd import is_plain_eager
from fastres.verify.runs import call, map_tensors

logger = logging.getLogger("fastres")


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


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


class LikeItsSource:
    """`FrozenModel.forward`: a method with the signature of the source's, by which exporters name inputs and sizes."""

    def __get__(self, frozen: FrozenModel | None, owner: type[FrozenModel]) -> Any:
        if frozen is None:
            return self
        if torch.compiler.is_dynamo_compiling():  # which follows methods of classes alone
            return frozen._forward

        def forward(self: FrozenModel, *args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        forward.__signature__ = frozen._signature  # type: ignore[attr-defined]
        return MethodType(forward, frozen)


def _method_signature(forward: Signature) -> inspect.Signature:
    """With `self`, which a bound method's signature leaves out."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    taken = {name for name, _, _ in forward.parameters}
    own = own if "self" not in taken else own.replace(name="_self")
    rest = [inspect.Parameter(name, kind, default=default) for name, kind, default in forward.parameters]
    return inspect.Signature([own, *rest])


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
        plan: the layout, and how many images of a batch run at a time.
        module: the rewritten network.
    """

    def __init__(
        self, module: nn.Module, source: nn.Module | None, recipe: Recipe, report: FreezeReport, dtype: torch.dtype
    ):
        super().__init__()
        self.module = module
        self.report = report
        self.dtype = dtype
        self.plan = Plan()
        self._overwrites = False
        self.training = False
        self._recipe = recipe
        own = recipe.signature if isinstance(recipe, GraphRecipe) else Signature.of(module.forward)
        self._signature = _method_signature(own)
        self._source = Source(source)
        self._engine = Engine()
        self._variants = Variants()
        self._likeness: tuple[str, ...] = ()  # the attributes that it has of its source
        self._passes_nan = False  # everywhere
        self._pass_nan()

    def _pass_nan(self) -> None:
        """A network that makes NaN of finite inputs runs on steps that pass them on, as eager's do; oneDNN's do not."""
        refused = any(row.reason in ("BAD_VARIANCE", "OVERFLOW") for row in self.report.rows)
        tensors = [t for t in source_tensors(self.module).values() if t.is_floating_point() and not t.is_meta]
        if refused or not all(math.isfinite(float(t.detach().sum(dtype=torch.float64))) for t in tensors):
            self._passes_nan = True
            note = "some of its numbers are not finite, or too large to fold: no step that could hide a NaN is taken"
            if note not in self.report.notes:
                self.report.notes.append(note)
        pass_nan(self.module, self._passes_nan)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return super().__call__(*args, **kwargs)
        with Running():
            return super().__call__(*args, **kwargs)

    forward = LikeItsSource()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._recipe, GraphRecipe):
            given = self._recipe.signature.take(args, kwargs)
            return self._call(given, self._recipe)
        if self._goes_in_parts(args, kwargs):
            return self._in_parts(lambda part: self._run((part,), {}), args[0])
        return self._run(args, kwargs)

    def _call(self, given: Call, recipe: GraphRecipe) -> Any:
        """A call of the network that was captured for its like."""
        captured, module, engine = recipe.captured, self.module, self._engine
        if not captured.takes(given):
            variant = self._variant(given, recipe)
            captured, module, engine = variant.captured, variant.module, variant.engine
        if is_traced():
            outputs = module(*(self._prepare("", t) for t in given.tensors))
        elif given.plain == recipe.captured.plain and self._goes_in_parts(given.tensors, {}):
            outputs = self._in_parts(lambda part: engine.run(module, (self._prepare("", part),), {}), given.tensors[0])
        else:
            outputs = engine.run(module, tuple(self._prepare("", t) for t in given.tensors), {})
        return tree_unflatten(outputs, captured.outputs)

    def _variant(self, given: Call, recipe: GraphRecipe) -> Variant:
        """The network for a call unlike the example, captured on the first one.

        Raises:
            RuntimeError: there is no source to capture it from, or the source has changed since.
            ValueError: it cannot be captured.
        """
        for variant in reversed(self._variants.found):
            if variant.captured.takes(given):
                return variant
        if is_traced():
            raise RuntimeError(
                f"input: got {_describe(given)}; this network was captured for {recipe.captured.describe()}: "
                "call it on such an input once before it is exported or compiled"
            )
        with capturing(), torch.inference_mode(False):
            for variant in self._variants.found:
                if variant.captured.takes(given):
                    return variant
            source, what = self._source.model, _describe(given)
            if source is None:
                raise RuntimeError(
                    f"input: got {what}; this network was captured for {recipe.captured.describe()}, and its source, "
                    "which another capture needs, is gone: freeze the model with an example of that kind"
                )
            if self.is_stale():
                raise RuntimeError(
                    f"input: got {what}; this network was captured for {recipe.captured.describe()}, and its source "
                    "has changed since: refresh() first"
                )
            try:
                captured = capture_for(sharing_copy(source).eval(), given, self.dtype)
            except CaptureError as error:
                raise ValueError(
                    f"input: got {what}; this network was captured for {recipe.captured.describe()}, and it cannot be "
                    f"for this: {error}"
                ) from error
            fresh = GraphRecipe(captured, recipe.signature)
            module, _ = fresh.make(source, self.dtype, self.module, self._device())
            if self.plan.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            pass_nan(module, self._passes_nan)
            logger.info("freeze: %s captured again for %s", self.report.model, what)
            variant = Variant(captured, module)
            self._variants.add(variant)
            return variant

    def _device(self) -> torch.device | None:
        return next((t.device for t in source_tensors(self.module).values()), None)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = map_tensors((args, kwargs), self._prepare, "")
        if is_traced():
            return self.module(*args, **kwargs)
        if self._overwrites and (kwargs or not all(isinstance(arg, Tensor) for arg in args)):
            self.overwrite_residuals(False)  # a call unlike the example may keep what the example did not
        return self._engine.run(self.module, args, kwargs)

    def _goes_in_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        count = self.plan.images_at_a_time
        if not count or kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 4:
            return False
        return len(args[0]) > count and is_plain_eager(args[0])

    def _in_parts(self, run: Callable[[Tensor], Any], images: Tensor) -> Any:
        """A few images at a time: inputs and activations stay in cache, and below the size that malloc maps anew."""
        size = self.plan.images_at_a_time or len(images)
        parts = [tree_flatten(run(part)) for part in images.detach().split(size)]
        joined = [torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in parts), strict=True)]
        return tree_unflatten(joined, parts[0][1])

    def _prepare(self, _: str, t: Tensor) -> Tensor:
        if t.is_floating_point() and t.dtype != self.dtype:
            t = t.to(self.dtype)
        if self.plan.channels_last and t.ndim == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        return t

    @property
    def channels_last(self) -> bool:
        """Whether it runs in channels_last; see :meth:`use_channels_last`."""
        return self.plan.channels_last

    @property
    def images_at_a_time(self) -> int | None:
        """How many images of a larger batch run at a time; None: all."""
        return self.plan.images_at_a_time

    @images_at_a_time.setter
    def images_at_a_time(self, count: int | None) -> None:
        self.plan.images_at_a_time = count

    def use_channels_last(self, channels_last: bool = True) -> None:
        """Run in channels_last from now on, or in NCHW again: weights and 4-dimensional inputs."""
        self.plan.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.module.to(memory_format=layout)  # type: ignore[call-overload]

    def overwrite_residuals(self, allowed: bool) -> None:
        """Let blocks write over the output of the block before, which must be nobody else's."""
        own_residuals(self.module, allowed)
        self._engine = Engine()
        self._overwrites = allowed

    def choose_packs(self, inputs: Any) -> int:
        """Keep, for each convolution of a call on these inputs, the packed or the plain weight; how many are packed."""
        self._forget_programs()  # they hold the weights of before, and hide the convolutions
        packed = choose_packs(frozen_convs(self.module), lambda: call(self, inputs))
        self._forget_programs()
        return packed

    def forget(self) -> None:
        """Let go of what calls have left behind: packed weights, programs, CUDA graphs. The next ones make it again."""
        self._engine = Engine()
        for conv in frozen_convs(self.module):
            conv.packs = Packs()

    def _forget_programs(self) -> None:
        graphs = self._engine.graphs
        self._engine = Engine()
        self._engine.graphs = graphs

    @property
    def device(self) -> torch.device:
        """Where its tensors are; the CPU if it has none."""
        return next((t.device for t in source_tensors(self.module).values()), torch.device("cpu"))

    @property
    def program(self) -> str:
        """How many operator calls the last signature's program holds, or why there is none."""
        return self._engine.programs.describe()

    def record_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a CUDA graph for inputs of these shapes; other shapes run eagerly."""
        if isinstance(self._recipe, GraphRecipe):
            args, kwargs = self._recipe.signature.take(args, kwargs).tensors, {}
        self._engine.graphs.record(self.module, map_tensors((args, kwargs), self._prepare, ""))

    def drop_graphs(self) -> None:
        """Forget the recorded CUDA graphs; every shape runs eagerly."""
        self._engine = Engine()

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
        mine = source_tensors(self.module)
        try:
            fresh_module, rows = self._recipe.make(source, self.dtype, device=self._device())
        except (AttributeError, KeyError, RuntimeError) as error:
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
        self._pass_nan()
        self._variants = Variants()
        self._source = Source(source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file, which ``fastres.load`` reads: safetensors and JSON, no pickle, no code.

        Args:
            path: where to; a file there is replaced once the new one is whole, and stays if saving fails.

        Raises:
            FrozenFileError: (a ValueError) it holds something that no file can, such as a module of the fallback
                without a graph; the message says what.
            OSError: there is no such folder, it is full, ...
        """
        from fastres.inference.saved import save

        save(self, path)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._engine = Engine()
        self._variants = Variants()
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, channels_last={self.channels_last}"


def _describe(given: Call) -> str:
    shapes = ", ".join(str(list(t.shape)) for t in given.tensors)
    return f"{shapes} with {[value for _, value in given.plain]}" if given.plain else shapes
