"""FrozenModel: a snapshot of a network for inference.

Longer than 400 lines: one public class, whose methods have their documentation and examples here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from fastres.graph.captured import Captured
from fastres.graph.recipe import Recipe, quantizes_inputs
from fastres.graph.rewrite import Rewritten
from fastres.graph.rows import FreezeRow
from fastres.graph.signature import Call, Signature
from fastres.graph.steps import Graph
from fastres.inference.cuda_graphs import Graphs
from fastres.inference.executor import Executor, is_traced
from fastres.inference.fallback import swapped_copy
from fastres.inference.file.document import Stored
from fastres.inference.file.likeness import likeness_to_json
from fastres.inference.file.store import write
from fastres.inference.file.values import FrozenFileError
from fastres.inference.gradients import wants_gradients, without_gradient
from fastres.inference.network import Holder, Network, Variants, fold, release
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport
from fastres.inference.source import LikeItsSource, Source, source_tensors
from fastres.nn.steps import has_global_hooks, is_bare
from fastres.verify.runs import call, map_tensors, named_tensors

logger = logging.getLogger("fastres")

_REFRESHED = "refreshed: int8 with the ranges of the first weights' calibration; the gate has not judged the new ones"


class FrozenModel(nn.Module):
    """The result of ``fastres.freeze``: the source's call signature and outputs, its weights folded, for inference.

    Call it as the source, with any batch size. Floating inputs are cast to the frozen dtype, outputs come in it, as
    after ``model.to(dtype)``; everything runs without gradients and outside autocast.

    It is a snapshot: plain tensors, which ``state_dict()``, ``deepcopy`` and ``.to(device)`` handle as usual, and a
    weak reference to the source, so that freezing keeps no training model alive. ``train()`` raises. ``is_stale()``
    says whether the source's weights have changed since, ``refresh()`` folds them again. It has no submodules to hook
    or to replace: it runs a list of steps, ``graph``.

    Attributes:
        report: what was folded and fused, the plan, times and the referee's verdict.
        dtype: what it computes in.
        plan: the layout, how many images of a batch run at a time, and the way to run each step.
        weights: the tensors of its steps, by their names in the source.
    """

    def __init__(
        self,
        made: Rewritten | nn.Module,
        source: nn.Module | None,
        signature: Signature,
        report: FreezeReport,
        dtype: torch.dtype,
        captured: Captured | None = None,
        plan: Plan | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        self.report, self.dtype, self.plan = report, dtype, plan or Plan()
        self.training = False
        self._network: Network | None = None
        if isinstance(made, nn.Module):  # without a graph
            self.fallback = made
        else:
            assert captured is not None
            self.weights = Holder().hold(made.constants)
            self._network = Network(captured, Executor(made.graph, self.plan), recipe)
        self._quantizes_inputs = not isinstance(made, nn.Module) and quantizes_inputs(made.graph)
        self._signature = signature
        self._source = Source(source)
        self._variants = Variants()  # for calls unlike the example
        self._cuda_graphs = Graphs()
        self._likeness: tuple[str, ...] = ()  # the attributes that it has of its source
        self._hub_class = ""  # its source's class, if that is transformers'
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]
        self._pass_nan()

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(
                "a FrozenModel has no attribute 'module': it runs a list of steps (.graph) on its .weights; hooks and "
                "other modules go into the source, before it is frozen"
            )
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cuda_graphs": Graphs()}

    def _replicate_for_data_parallel(self) -> FrozenModel:
        replica: FrozenModel = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__.update(self.__getstate__(), _modules=replica._modules, _buffers=replica._buffers)
        if self._network is not None:
            replica._network = self._network.apart()
            replica._variants = Variants(network.apart() for network in self._variants)
        return replica

    def _pass_nan(self) -> None:
        """Pass NaN on as eager does where the weights may make it of finite inputs; oneDNN's ReLU does not."""
        if self._network is None:
            return
        refused = any(row.reason in ("BAD_VARIANCE", "OVERFLOW") for row in self.report.rows)
        tensors = [t for t in self.weights.buffers() if t.is_floating_point() and not t.is_meta and t.numel()]
        if refused or not all(math.isfinite(float(end)) for t in tensors for end in t.detach().aminmax()):
            for network in self._networks:
                network.executor.exact = True
            note = "some of its numbers are not finite, or too large to fold: no step that could hide a NaN is taken"
            if note not in self.report.notes:
                self.report.notes.append(note)

    @property
    def is_quantized(self) -> bool:
        """True where it runs layers on 8-bit integers."""
        return self._network is not None and self._network.executor.quantized

    # ---- calls -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_traced() and is_bare(self) and not has_global_hooks():
            return self._forward(*args, **kwargs)  # Module.__call__ may be an exporter's, in another thread
        return super().__call__(*args, **kwargs)

    forward = LikeItsSource()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        network = self._network
        if network is None:
            return self._run_fallback(args, kwargs)
        given = self._signature.take(args, kwargs)
        if not network.captured.takes(given):
            network = self._other(given)
        inputs = [self._prepare("", t) for t in given.tensors]
        if wants_gradients(given.tensors):
            return self._run_with_gradients(network, inputs)
        if is_traced(*inputs):
            outputs = network.executor.trace(inputs, network.constants(self.weights))
        elif self._goes_in_parts(inputs):
            parts = zip(*(self._run(network, [part]) for part in self._parts(inputs[0])), strict=True)
            outputs = [torch.cat(leaves) for leaves in parts]
        else:
            outputs = self._run(network, inputs)
        return tree_unflatten(outputs, network.captured.outputs)

    def _run(self, network: Network, inputs: Sequence[Tensor]) -> list[Any]:
        if len(self._cuda_graphs):
            replayed, outputs = self._cuda_graphs.replay(inputs)
            if replayed:
                return outputs  # type: ignore[no-any-return]
        if torch._C._is_any_autocast_enabled():
            with torch._C._DisableAutocast():
                return network.executor.run(inputs, network.constants(self.weights))
        return network.executor.run(inputs, network.constants(self.weights))

    def _run_fallback(self, args: Any, kwargs: Any) -> Any:
        wants = wants_gradients(named_tensors((args, kwargs), "").values())
        args, kwargs = map_tensors((args, kwargs), self._prepare, "")
        with torch.set_grad_enabled(wants and self.plan.differentiable):
            outputs = self.fallback(*args, **kwargs)
        return outputs if not wants or self.plan.differentiable else map_tensors(outputs, without_gradient, "")

    def _run_with_gradients(self, network: Network, inputs: Sequence[Tensor]) -> Any:
        """By PyTorch's operators, which autograd follows; or an answer whose backward pass says how to get that."""
        if self.plan.differentiable:
            with torch._C._DisableAutocast():
                outputs = network.executor.trace(inputs, network.constants(self.weights))
        else:
            outputs = [without_gradient("", t) for t in self._run(network, [t.detach() for t in inputs])]
        return tree_unflatten(outputs, network.captured.outputs)

    def _prepare(self, _: str, t: Tensor) -> Tensor:
        if t.is_floating_point() and t.dtype != self.dtype:
            t = t.to(self.dtype)
        if (
            self.plan.channels_last
            and t.ndim == 4
            and not self._quantizes_inputs
            and not torch._C._are_functorch_transforms_active()
        ):
            t = t.contiguous(memory_format=torch.channels_last)
        return t

    def _goes_in_parts(self, inputs: Sequence[Tensor]) -> bool:
        count = self.plan.images_at_a_time
        return bool(count) and len(inputs) == 1 and inputs[0].ndim == 4 and len(inputs[0]) > (count or 0)

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """A few images at a time: activations stay in cache, and below the size that malloc maps anew."""
        parts: tuple[Tensor, ...] = images.detach().split(self.plan.images_at_a_time or len(images))
        return parts

    # ---- other calls than the example's -----------------------------------------------------------------------------

    def capture(self, example_inputs: Any) -> None:
        """Capture the source for calls like this one, ahead of time: another image size, or other arguments.

        A call that is unlike every captured one does it by itself, once, and says so in the log at level INFO. Captures
        are copied, pickled and saved with the model.

        Args:
            example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments, as for ``freeze``.

        Raises:
            RuntimeError: there is no source to capture it from, or it has changed since.
            ValueError: it cannot be captured.

        Example:
            >>> import torch, fastres
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
            >>> frozen = fastres.freeze(net, torch.randn(2, 3, 8, 8), tune=False)
            >>> frozen.capture(torch.randn(2, 3, 16, 16))
            >>> frozen(torch.randn(5, 3, 16, 16)).shape
            torch.Size([5, 4, 14, 14])
        """
        if self._network is None:
            return  # its own code takes any call
        args, kwargs = call(lambda *args, **kwargs: (args, kwargs), example_inputs)
        given = self._signature.take(args, kwargs)
        if not self._network.captured.takes(given):
            self._other(given)

    def _other(self, given: Call) -> Network:
        """The network for a call unlike the example, captured on the first one."""
        network = self._network
        assert network is not None
        found = self._variants.find(given)
        if found is None:
            how = self._source, self.dtype, self.plan, self.weights, self.report.model
            found = self._variants.capture(given, network, *how)
        return found

    def _device(self) -> torch.device | None:
        return next((t.device for t in source_tensors(self).values()), None)

    # ---- the plan ----------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph | None:
        """The steps that it runs for calls like the example; None without a graph. Print it to see them."""
        return None if self._network is None else self._network.executor.graph

    @property
    def device(self) -> torch.device:
        """The device of its tensors; the CPU if it has none."""
        return self._device() or torch.device("cpu")

    def use_channels_last(self, channels_last: bool = True) -> None:
        """Run in channels_last from now on, or in NCHW again: weights and 4-dimensional inputs."""
        self.plan.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for part in self.children():
            part.to(memory_format=layout)  # type: ignore[call-overload]
        self.forget()

    def choose(self, choices: dict[str, str]) -> None:
        """Run steps these ways, by the keys of their choices; see `Plan.choices`."""
        self.plan.choices = dict(choices)
        self.forget()

    def forget(self) -> None:
        """Let go of what calls have left behind: packed weights, CUDA graphs."""
        self._cuda_graphs = Graphs()
        for network in self._networks:
            network.executor.forget()

    def drop_captures(self) -> None:
        """Keep no graph but the example's."""
        dropped, self._variants = self._variants, Variants()
        release(dropped, self.weights)

    def adopt(self, networks: Iterable[Network], tensors: Mapping[str, Tensor]) -> None:
        """Answer other calls by these networks, whose own constants are `tensors`."""
        self.weights.hold(tensors, persistent=False)
        self._variants = Variants(networks)
        self._pass_nan()

    @property
    def _networks(self) -> list[Network]:
        return [] if self._network is None else [self._network, *self._variants]

    def prepared(self, example_inputs: Any) -> tuple[Executor, list[Tensor], tuple[Tensor, ...]] | None:
        """The executor of calls like this one, and what it takes: inputs and constants. None without a graph."""
        if self._network is None:
            return None
        args, kwargs = call(lambda *args, **kwargs: (args, kwargs), example_inputs)
        given = self._signature.take(args, kwargs)
        network = self._network if self._network.captured.takes(given) else self._other(given)
        return network.executor, [self._prepare("", t) for t in given.tensors], network.constants(self.weights)

    def record_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a CUDA graph for inputs of these shapes; other shapes run eagerly.

        Raises:
            RuntimeError: the model was frozen without a graph of its own.
        """
        if self._network is None:
            raise RuntimeError("record_graph: the model was frozen without a graph: its own Python code runs it")
        inputs = [self._prepare("", t) for t in self._signature.take(args, kwargs).tensors]
        network = self._network
        self._cuda_graphs.record(lambda *given: network.executor.run(given, network.constants(self.weights)), inputs)

    def drop_graphs(self) -> None:
        """Forget the recorded CUDA graphs; every shape runs eagerly."""
        self._cuda_graphs = Graphs()

    # ---- a snapshot --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> FrozenModel:
        """Only ``train(False)``: a frozen model has no batch statistics to train with.

        Raises:
            RuntimeError: for ``mode=True``.
        """
        if mode:
            raise RuntimeError("a frozen model is a snapshot for inference: train the source, then call refresh()")
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the state of a frozen network, as any module's; the source's goes into the source.

        Raises:
            RuntimeError: the names or shapes are not those of its steps.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            cure = "load the source's state_dict into the source, then call refresh(), or freeze it again"
            raise RuntimeError(f"a frozen network's state is its folded weights: {cure}. {error}") from error

    def is_stale(self) -> bool:
        """Tell whether a parameter or buffer of the source was replaced or written to since the snapshot was taken.

        Or an attribute that is a number, a string, or a list of those was set. By identity and version counter, so a
        write through ``.data`` is not seen; False once the source is gone.
        """
        return self._source.moved()

    def like(self, source: nn.Module) -> FrozenModel:
        """The same network and plan with the tensors of another model of the same structure."""
        made, _ = self._refold(source)
        captured = None if self._network is None else self._network.captured
        recipe = None if self._network is None else self._network.recipe
        model = FrozenModel(
            made, source, self._signature, self.report, self.dtype, captured, replace(self.plan), recipe
        )
        if self.plan.channels_last:
            model.use_channels_last()
        return model

    def _refold(self, source: nn.Module) -> tuple[Rewritten | nn.Module, list[FreezeRow]]:
        """Return what it is made of, and its rows, with the tensors of ``source`` as they are now."""
        if self._network is None:
            parts = {n: m for n, m in self.fallback.named_modules() if n and isinstance(m, FrozenModel)}
            for name, part in parts.items():
                if attribute := part._source.other_attribute():
                    raise RuntimeError(f"{name}.{attribute}")
            parts = {n: m.like(source.get_submodule(n)) for n, m in parts.items()}
            return swapped_copy(source, self.dtype, self.device, parts)
        recipe = self._network.recipe
        made = fold(self._network.captured, source, self.dtype, device=self._device(), recipe=recipe)
        return made, made.rows

    def refresh(self) -> None:
        """Fold the source's current weights and statistics again, into the same tensors.

        An int8 network is quantized again with the ranges that its calibration found; the gate is not asked again,
        since the calibration images are not kept: the report says so.

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
        attribute = self._source.other_attribute()
        if attribute and self._network is not None:
            raise RuntimeError(f"refresh: the source has changed, freeze it again: {attribute}")
        try:
            made, rows = self._refold(source)
            for network in self._variants:  # before anything is written: that they can be folded
                fold(network.captured, source, self.dtype, device=self._device())
        except (AttributeError, KeyError, RuntimeError) as error:
            raise RuntimeError(f"refresh: the source's structure has changed, freeze it again: {error}") from error
        if isinstance(made, nn.Module):
            mine, fresh = source_tensors(self.fallback), source_tensors(made)
        else:
            mine, fresh = self.weights.state_dict(), made.constants
        if {name: t.shape for name, t in fresh.items()} != {name: t.shape for name, t in mine.items()}:
            changed = [f"{row.name}: {row.message}" for row in rows if row not in self.report.rows]
            raise RuntimeError(
                f"refresh: the source has changed, freeze it again: {'; '.join(changed) or 'its tensors'}"
            )
        with torch.no_grad():
            for name, t in mine.items():
                t.copy_(fresh[name])
        if self._network is not None:
            captured = [network.captured for network in self._variants]
            self.drop_captures()
            self._variants = Variants(
                self._network.another(c, source, self.dtype, self.plan, self.weights) for c in captured
            )
        self._pass_nan()
        if self.is_quantized and _REFRESHED not in self.report.notes:
            self.report.notes.append(_REFRESHED)
        self._source = Source(source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file, which ``fastres.load`` reads: safetensors and JSON, no pickle, no code.

        Args:
            path: where to; a file there is replaced once the new one is whole, and stays if saving fails.

        Raises:
            FrozenFileError: (a ValueError) it holds something that no file can, such as a network without a graph; the
                message says what.
            OSError: there is no such folder, it is full, ...
        """
        network = self._network
        if network is None:
            raise FrozenFileError(
                f"path: {os.fspath(path)!r} is not written: {self.report.model} was frozen without a graph, so that "
                f"its own Python code runs it, which no file holds ({self.report.capture_reason}); save the source's "
                "state_dict and freeze it again"
            )
        calls = [(n.executor.graph, n.captured) for n in self._networks]
        tensors = dict(self.weights.named_buffers(remove_duplicate=False))
        likeness = likeness_to_json(self._likeness, self, self._hub_class)
        how = self._signature.parameters, self.dtype, self.plan, self.device, self.report, likeness
        write(path, Stored(calls, tensors, *how))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModel:
        probe = fn(torch.empty(0, dtype=self.dtype))
        if self.is_quantized and probe.dtype is not self.dtype:
            raise TypeError(
                f"a network in int8 has scales in {self.dtype}, got {probe.dtype}: freeze it again for that"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.forget()
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        return (
            f"dtype={self.report.dtype if self.is_quantized else self.dtype}, channels_last={self.plan.channels_last}"
        )


def _forget(frozen: FrozenModel, _: Any) -> None:
    """After load_state_dict, which may have put other tensors in place, but not those of other captures alone."""
    frozen.forget()
    if own := [network for network in frozen._variants if network.root]:
        frozen._variants = Variants(network for network in frozen._variants if not network.root)
        release(own, frozen.weights)
