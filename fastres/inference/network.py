"""The captured calls of a frozen model, ready to run, and the tree of weights that holds their constants.

The network of the example has its constants in the tree under their names in the source: the model's state. What
another call's network has beside is under `#1.`, `#2.`, ..., moves with the model and is no part of its state.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastres.graph import export
from fastres.graph.captured import Captured
from fastres.graph.export import CaptureError, capture_for, sharing_copy
from fastres.graph.quantize import quantize
from fastres.graph.recipe import Recipe
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
    recipe: Recipe | None = None,
) -> Rewritten:
    """The network of a captured call on `source`'s tensors as they are now; on integers where a recipe says how.

    A graph with other steps than the recipe's stays in float32.
    """
    tensors: Mapping[str, Tensor] = source_tensors(source) | captured.constants
    if device is not None:
        tensors = {name: t.to(device) for name, t in tensors.items()}
    made = rewrite(captured, tensors, dtype, shared)
    if recipe is None:
        return made
    if not recipe.fits(made.graph):
        logger.warning("freeze: a call with other steps than the example's runs in float32: it was not calibrated")
        return made
    made = quantize(made, recipe).made
    known = shared or {}
    shares = {name: known.get(made.graph.made_of[name], t) for name, t in made.constants.items()}
    return made._replace(constants=shares)


class Network:
    """A captured call and the executor of its graph, whose constants a tree of weights has under their names."""

    def __init__(self, captured: Captured, executor: Executor, recipe: Recipe | None = None) -> None:
        self.captured, self.executor, self.recipe = captured, executor, recipe
        self.used = 0  # in the order of use
        self._places: Places | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": None}

    @property
    def root(self) -> str:
        """The part of the tree that is this network's alone; empty where it has none."""
        return next((n.partition(".")[0] for n in self.executor.graph.constants if n.startswith("#")), "")

    def constants(self, weights: nn.Module) -> tuple[Tensor, ...]:
        """Its tensors, as they are now in the tree of its model."""
        if torch.compiler.is_dynamo_compiling():
            buffers = dict(weights.named_buffers(remove_duplicate=False))
            return tuple(buffers[name] for name in self.executor.graph.constants)
        if self._places is None:
            self._places = Places(weights, self.executor.graph.constants)
        return self._places.read()

    def apart(self) -> Network:
        """The same network for another tree, with an executor of its own."""
        executor = Executor(self.executor.graph, self.executor.plan, self.executor.exact)
        return Network(self.captured, executor, self.recipe)

    def another(
        self, captured: Captured, source: nn.Module, dtype: torch.dtype, plan: Plan, weights: Holder
    ) -> Network:
        """The network of another call of the same source; what is equal of this one's constants is shared."""
        own = dict(zip(self.executor.graph.constants, self.constants(weights), strict=True))
        shared = {self.executor.graph.made_of[name]: t for name, t in own.items()}
        made = fold(captured, source, dtype, shared, next((t.device for t in own.values()), None), self.recipe)
        known, root = {id(t): name for name, t in own.items()}, _unused(weights)
        names, fresh = {}, {}
        for name, t in made.constants.items():
            if plan.channels_last and t.ndim == 4:
                t = t.contiguous(memory_format=torch.channels_last)
            names[name] = known.get(id(t), f"{root}.{name}")
            if id(t) not in known:
                fresh[names[name]] = t
        weights.hold(fresh, persistent=False)
        made_of = {names[name]: line for name, line in made.graph.made_of.items()}
        graph = replace(made.graph, constants=tuple(names.values()), made_of=made_of)
        return Network(captured, Executor(graph, plan, self.executor.exact), self.recipe)


class Variants:
    """The networks of calls unlike the example; those used last are kept."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self.networks = list(networks)
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
        source: Source,
        dtype: torch.dtype,
        plan: Plan,
        weights: Holder,
        name: str,
    ) -> Network:
        """A new network for such calls, unless another thread has made it meanwhile.

        Args:
            own: the network of the example; weights: the model's tree.
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
                    f"{what}, and its source, which another capture needs, is gone: freeze the model with such a call "
                    "among its examples"
                )
            if source.moved():
                raise RuntimeError(f"{what}, and its source has changed since: refresh() first")
            try:
                _try(model, given)
                captured = capture_for(sharing_copy(model).eval(), given, dtype)
                found = own.another(captured, model, dtype, plan, weights)
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
            release(kept[: 1 - VARIANTS], weights)
            return found


def release(networks: Iterable[Network], weights: nn.Module) -> None:
    """Take what these networks alone have out of the tree; a call that runs one keeps its tensors."""
    for network in networks:
        weights._modules.pop(network.root, None)


class Holder(nn.Module):
    """A part of a tree of tensors with dotted names; runs nothing."""

    def hold(self, tensors: Mapping[str, Tensor], persistent: bool = True) -> Holder:
        """Have these tensors as buffers under their dotted names; `persistent`: in the state_dict."""
        for name, t in tensors.items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, Holder())
                parent = parent._modules[part]  # type: ignore[assignment]
            parent.register_buffer(leaf, t, persistent)
        return self.eval()


def _unused(weights: Holder) -> str:
    return next(name for n in itertools.count(1) if (name := f"#{n}") not in weights._modules)


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
