"""One captured call of a frozen model, ready to run; the trees of weights that hold its constants."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.graph import export
from fastres.graph.captured import Captured
from fastres.graph.export import CaptureError, capture_for, sharing_copy
from fastres.graph.rewrite import Rewritten, rewrite
from fastres.graph.signature import Call
from fastres.inference.executor import Executor, is_traced
from fastres.inference.plan import Plan
from fastres.inference.source import Source, source_tensors

logger = logging.getLogger("fastres")

VARIANTS = 32  # other calls that a frozen model keeps a network for; what is equal of their constants is shared


def fold(
    captured: Captured,
    source: nn.Module,
    dtype: torch.dtype,
    shared: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> Rewritten:
    """The network of a captured call on `source`'s tensors as they are now."""
    tensors: Mapping[str, Tensor] = source_tensors(source) | captured.constants
    if device is not None:
        tensors = {name: t.to(device) for name, t in tensors.items()}
    return rewrite(captured, tensors, dtype, shared)


class Network:
    """A captured call and the executor of its graph.

    Attributes:
        constants: its own, in the graph's order; None for the network whose constants are the model's `weights`.
    """

    def __init__(self, captured: Captured, executor: Executor, constants: tuple[Tensor, ...] | None = None) -> None:
        self.captured, self.executor, self.constants = captured, executor, constants
        self.used = 0  # in the order of use

    def captured_again(
        self, source: nn.Module, given: Call, dtype: torch.dtype, plan: Plan, constants: Sequence[Tensor]
    ) -> Network:
        """The network of the same source for another call; what is equal of `constants`, this one's, is shared.

        Raises:
            CaptureError: the source has no graph for that call.
        """
        captured = capture_for(sharing_copy(source).eval(), given, dtype)
        graph = self.executor.graph
        shared = {graph.made_of[name]: t for name, t in zip(graph.constants, constants, strict=True)}
        made = fold(captured, source, dtype, shared, constants[0].device if constants else None)
        tensors = list(made.constants.values())
        if plan.channels_last:
            tensors = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
        return Network(captured, Executor(made.graph, plan.choices, self.executor.exact), tuple(tensors))


class Variants:
    """The networks of calls unlike the example; those used last are kept."""

    def __init__(self) -> None:
        self.networks: list[Network] = []
        self._clock = itertools.count(1)
        self._warned = False
        self._failures: dict[Any, str] = {}  # kinds of calls that cannot be captured, and why

    def __len__(self) -> int:
        return len(self.networks)

    def __iter__(self) -> Iterator[Network]:
        return iter(self.networks)

    def find(self, given: Call) -> Network | None:
        """The network that answers such calls."""
        found = next((n for n in reversed(self.networks) if n.captured.takes(given)), None)
        if found is not None:
            found.used = next(self._clock)
        return found

    def capture(
        self,
        given: Call,
        own: Network,
        constants: Sequence[Tensor],
        source: Source,
        dtype: torch.dtype,
        plan: Plan,
        name: str,
    ) -> Network:
        """A new network for such calls, unless another thread has made it meanwhile.

        Args:
            own: the network of the example; constants: its tensors.
            name: of the model, for the log.
        """
        what = f"input: got {_describe(given)}; this network was captured for {own.captured.describe()}"
        if is_traced():
            raise RuntimeError(f"{what}: capture(example) it before it is exported or compiled")
        failure = self._failures.get(_kind(given))
        if failure is not None:  # at once: no other thread waits for the same to fail again
            raise ValueError(f"{what}, and it cannot be for this: {failure}")
        with export.LOCK, torch.inference_mode(False):
            found = self.find(given)
            if found is not None:
                return found
            model = source.model
            if model is None:
                raise RuntimeError(
                    f"{what}, and its source, which another capture needs, is gone: freeze the model with an example "
                    "of that kind"
                )
            if source.moved():
                raise RuntimeError(f"{what}, and its source has changed since: refresh() first")
            try:
                _try(model, given)
                found = own.captured_again(model, given, dtype, plan, constants)
            except CaptureError as error:
                self._failures = {**dict([*self._failures.items()][-99:]), _kind(given): str(error)}
                raise ValueError(f"{what}, and it cannot be for this: {error}") from error
            logger.info("freeze: %s captured again for %s", name, _describe(given))
            found.used = next(self._clock)
            kept = sorted(self.networks, key=lambda network: network.used)
            if len(kept) >= VARIANTS and not self._warned:
                self._warned = True
                logger.warning(
                    "freeze: more than %d kinds of calls of %s take turns: each is captured again", VARIANTS, name
                )
            self.networks = [*kept[1 - VARIANTS :], found]  # replaced: other threads read it
            return found


class Holder(nn.Module):
    """A part of a tree of tensors with dotted names; runs nothing."""


def hold(tensors: Mapping[str, Tensor]) -> Holder:
    """A tree that has these tensors as buffers under their dotted names."""
    root = Holder()
    for name, t in tensors.items():
        parent: nn.Module = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, Holder())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.register_buffer(leaf, t)
    return root.eval()


def held(root: nn.Module, names: Iterable[str]) -> tuple[Tensor, ...]:
    """The tensors of a tree by their dotted names."""
    buffers = dict(root.named_buffers(remove_duplicate=False))
    return tuple(buffers[name] for name in names)


class Places:
    """Where a tree keeps the tensors of these dotted names. `read` sees those that functional_call, say, puts there.

    An object, since `torch.export` takes the lists and dicts among a module's attributes apart, and leaves copies.
    """

    def __init__(self, root: nn.Module, names: Iterable[str]) -> None:
        split = [name.rpartition(".") for name in names]
        self._found = [(root.get_submodule(path)._buffers, leaf) for path, _, leaf in split]

    def read(self) -> tuple[Tensor, ...]:
        """The tensors, as they are now."""
        return tuple([buffers[leaf] for buffers, leaf in self._found])  # type: ignore[misc]  # none of them is None


def _kind(given: Call) -> Any:
    return str(given.tree), repr(given.plain), tuple((t.dtype, t.shape) for t in given.tensors)


def _try(model: nn.Module, given: Call) -> None:
    """One call of the source: what it does not take is said in its own words, before a capture.

    Raises:
        CaptureError: it does not take it.
    """
    args, kwargs = given.like(model).arguments()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            sharing_copy(model).eval()(*args, **kwargs)
    except Exception as error:  # whatever the model's code raises
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise CaptureError(f"the source raises {type(error).__name__}: {lines[0].strip()}") from error


def _describe(given: Call) -> str:
    shapes = ", ".join(
        ("" if t.is_floating_point() else f"{t.dtype} ".removeprefix("torch.")) + str(list(t.shape))
        for t in given.tensors
    )
    return f"{shapes} with {[value for _, value in given.plain]}" if given.plain else shapes
