"""Whether a network answers each image of a batch by itself, so that a large batch may run in parts.

The steps say whether they do. Of the operators known here, each image of a batch is computed from that image alone, or
the batch is summed, sorted or indexed. Behind an operator that is not known here, images are replaced by noise: the
answers to the others must not change by a bit. Outputs that agree on the example show nothing: its images may be
alike. A network that computes with the number of images, which parts change, is no candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastres._dispatch import operator_of
from fastres.graph.steps import Graph, Slot, Step, filled, slots_in
from fastres.inference.executor import stock_of
from fastres.inference.frozen import FrozenModel
from fastres.verify.runs import call

_ELEMENTWISE = frozenset(
    """
    abs add celu clamp clamp_max clamp_min clone contiguous cos detach div dropout elu eq erf exp exp2 ge gelu
    gt hardsigmoid hardswish hardtanh le leaky_relu log log1p logical_and logical_not logical_or lt maximum minimum mish
    mul ne neg pow prelu reciprocal relu relu6 round rsqrt rsub selu sigmoid sign silu sin softplus sqrt square sub tanh
    threshold to type_as where _to_copy
    """.split()
)
_IMAGES_ONLY = frozenset(  # the first argument's images one by one, by parameters in the others
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d channel_shuffle conv1d
    conv2d conv3d conv_transpose2d group_norm linear max_pool1d max_pool2d max_pool2d_with_indices
    pixel_shuffle pixel_unshuffle upsample_bicubic2d upsample_bilinear2d upsample_nearest1d upsample_nearest2d
    """.split()
)
_ALONG = frozenset(  # along the dimensions that the second argument names
    """
    all amax amin any argmax argmin argsort chunk cumsum flatten log_softmax max mean min narrow select slice
    softmax sort split split_with_sizes squeeze std sum topk unbind unflatten unsqueeze var
    """.split()
)


def answers_each_alone(frozen: FrozenModel, images: Tensor) -> bool:
    """Tell whether every output has one row an image, which depends on that image alone."""
    found = frozen.prepared(images)
    leaves = tree_flatten(call(frozen, images))[0]
    if found is None or not all(isinstance(t, Tensor) and t.ndim and len(t) == len(images) for t in leaves):
        return False
    executor, (images,), constants = found
    if _computes_with_the_count(executor.graph):
        return False
    mixes = _mixes(executor.graph, images, constants)
    return _unmoved_by_noise(frozen, images) if mixes is None else not mixes


def _computes_with_the_count(graph: Graph) -> bool:
    """Tell whether the number of images goes anywhere but into shapes."""
    counts: set[int] = set()
    for step in graph.steps:
        name = _name(step)
        if name == "sym_numel" or (name == "sym_size" and step.args[1] == 0):
            counts.add(step.writes)
        elif counts.intersection(step.reads) and name not in ("reshape", "view", "expand"):
            if not all(slot in counts for slot in step.reads):
                return True
            counts.add(step.writes)
    return bool(counts.intersection(slot.index for slot in slots_in(graph.outputs)))


def _mixes(graph: Graph, images: Tensor, constants: Sequence[Tensor]) -> bool | None:
    """Tell whether an image's answer may depend on another one; None where an operator is not known here."""
    values: list[Any] = [images, *constants, *[None] * len(graph.steps)]
    alone = {0}  # slots that hold a row for every image
    for step in graph.steps:
        with torch.no_grad():
            values[step.writes] = stock_of(step.operator)(*filled(step.args, values), **filled(step.kwargs, values))
        if not alone.intersection(step.reads) or _name(step).startswith("sym_"):
            continue  # made of constants and sizes
        verdict = _rows_alone(step, values, alone, len(images))
        if verdict is not True:
            return verdict if verdict is None else True
        alone.add(step.writes)
        for slot in step.frees:
            values[slot] = None
    return not {slot.index for slot in slots_in(graph.outputs)} <= alone


def _name(step: Step) -> str:
    schema = getattr(step.operator, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else step.operator.__name__


def _rows_alone(step: Step, values: Sequence[Any], alone: set[int], count: int) -> bool | None:
    """Tell whether the step computes the rows of its output from those of its inputs one by one; None: unknown."""
    name, args = _name(step), step.args
    rows = [slot.index for slot in slots_in((args, step.kwargs)) if slot.index in alone]
    others = [slot.index for slot in slots_in((args, step.kwargs)) if slot.index not in alone]
    first: Any = values[args[0].index] if args and isinstance(args[0], Slot) else None
    out = values[step.writes]
    heads = out if isinstance(out, tuple | list) else [out]
    if name == "getitem":
        return True
    if not all(isinstance(t, Tensor) and t.ndim and len(t) == count for t in heads):
        return False
    ndim = max(values[slot].ndim for slot in rows if isinstance(values[slot], Tensor))
    if name in _ELEMENTWISE:
        mine = [values[slot] for slot in others if isinstance(values[slot], Tensor)]
        fits = all(t.ndim < ndim or (t.ndim == ndim and len(t) == 1) for t in mine)
        return fits and all(values[slot].ndim == ndim for slot in rows)
    ours = operator_of(step.operator)
    if ours is not None or name in _IMAGES_ONLY:
        given = {i for i, a in enumerate(args) if isinstance(a, Slot) and a.index in alone}
        places = (0,) if ours is None else ours.images(*args, **step.kwargs)
        least = {"linear": 2, "group_norm": 3, "conv3d": 5}.get(name, 3 if name.endswith("1d") else 4)
        return None if not {0} <= given <= set(places) else first.ndim >= least  # without a batch, channels come first
    if name == "batch_norm":
        return rows == [getattr(args[0], "index", -1)] and args[5] is False
    if name in _ALONG and isinstance(first, Tensor) and len(rows) == 1:
        dims = args[1] if len(args) > 1 else step.kwargs.get("dim")
        if name in ("chunk", "split", "split_with_sizes", "topk"):
            dims = args[2] if len(args) > 2 else step.kwargs.get("dim", -1 if name == "topk" else 0)
        if name == "flatten" and len(args) < 2:
            dims = 0
        dims = dims if isinstance(dims, tuple | list) else [dims]
        size = first.ndim + (name == "unsqueeze")
        return bool(dims) and all(isinstance(d, int) and d % size != 0 for d in dims)
    if name in ("reshape", "view"):
        return isinstance(first, Tensor) and len(rows) == 1  # images follow one another in both
    if name in ("permute", "transpose"):
        moved = args[1][:1] if name == "permute" else args[1:3]
        return all((d % ndim == 0) == (name == "permute") for d in moved)
    if name in ("cat", "stack"):
        dim = args[1] if len(args) > 1 else step.kwargs.get("dim", 0)
        return not others and isinstance(dim, int) and dim % out.ndim != 0
    if name in ("pad", "constant_pad_nd"):
        return len(args[1]) < 2 * ndim and isinstance(args[0], Slot) and not others
    if name in ("bmm", "matmul", "scaled_dot_product_attention"):
        return not others and ndim >= 3 and all(values[slot].ndim == ndim for slot in rows)
    return None


def _unmoved_by_noise(frozen: FrozenModel, images: Tensor) -> bool:
    """Tell whether the answers to all images but one stay the same, bit by bit, when noise takes that one's place."""
    for batch in (images, torch.randn_like(images)):  # an example may be of zeros, which hide products
        want = tree_flatten(call(frozen, batch))[0]
        for place, size in ((0, 1.0), (len(batch) // 2, 100.0), (len(batch) - 1, 0.01)):
            noisy = batch.clone()
            noisy[place].normal_(std=size)
            kept = [i for i in range(len(batch)) if i != place]
            got = tree_flatten(call(frozen, noisy))[0]
            if not all(g.shape == w.shape and torch.equal(g[kept], w[kept]) for g, w in zip(got, want, strict=True)):
                return False
    return True
