"""A frozen model to a file and back: `FrozenModel.save` and `fastres.load`. What a file is made of: store.py."""

from __future__ import annotations

import os

import torch
from torch import fx

from fastres.graph.export import Captured
from fastres.inference.frozen import FrozenModel
from fastres.inference.file.document import Stored
from fastres.inference.file.values import FrozenFileError
from fastres.inference.hub import give_likeness, likeness_to_json
from fastres.inference.recipe import GraphRecipe, source_tensors
from fastres.graph.signature import Signature
from fastres.inference.file.store import read, write


def save(frozen: FrozenModel, path: str | os.PathLike[str]) -> None:
    """See `FrozenModel.save`."""
    recipe = frozen._recipe
    if not isinstance(recipe, GraphRecipe) or not isinstance(frozen.module, fx.GraphModule):
        raise FrozenFileError(
            f"path: {os.fspath(path)!r} is not written: {frozen.report.model} was frozen without a graph, so that its "
            f"own Python code runs it, which no file holds ({frozen.report.capture_reason or 'no reason given'}); save "
            "the source's state_dict and freeze it again"
        )
    captured = recipe.captured
    device = next((t.device for t in source_tensors(frozen.module).values()), torch.device("cpu"))
    stored = Stored(
        module=frozen.module,
        signature=recipe.signature.parameters,
        tree=captured.tree,
        plain=captured.plain,
        inputs=captured.inputs,
        outputs=captured.outputs,
        batch=captured.batch,
        dtype=frozen.dtype,
        plan=frozen.plan,
        device=device,
        report=frozen.report,
        likeness=likeness_to_json(frozen),
    )
    write(path, stored)


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> FrozenModel:
    """The frozen model that ``FrozenModel.save`` wrote: the same outputs, bit for bit on the same machine.

    Nothing in the file is code: it may come from anywhere. It has no source: ``refresh()`` and calls of another image
    size than it was captured for raise. A CUDA graph is not in it: ``record_graph`` records one again.

    Args:
        path: the file.
        device: where the model goes; None: where it was saved.

    Raises:
        FrozenFileError: (a ValueError) not such a file, or a damaged, tampered or newer one; or it needs a package or a
            device that is missing here. The message names the file and what was wrong.
        FileNotFoundError: there is no such file.

    Example:
        >>> import os, tempfile, torch, fastres
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> frozen, x = fastres.freeze(net, torch.randn(2, 3, 16, 16), tune=False), torch.randn(5, 3, 16, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     frozen.save(os.path.join(folder, "net.fastres"))
        ...     loaded = fastres.load(os.path.join(folder, "net.fastres"))
        >>> torch.equal(loaded(x), frozen(x))
        True
    """
    stored = read(path, device)
    captured = Captured(
        graph=fx.Graph(),
        inputs=stored.inputs,
        outputs=stored.outputs,
        tree=stored.tree,
        plain=stored.plain,
        constants={},
        batch=stored.batch,
    )
    report = stored.report
    report.device = str(stored.device)
    if report.cuda_graph.startswith("on"):
        report.cuda_graph = "off: loaded from a file, record_graph() records it again"
    recipe = GraphRecipe(captured, Signature(stored.signature))
    frozen = FrozenModel(stored.module, None, recipe, report, stored.dtype)
    frozen.plan = stored.plan
    return give_likeness(frozen, stored.likeness) if stored.likeness else frozen
