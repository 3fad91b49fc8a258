"""fastres.load: a frozen model from the file that `FrozenModel.save` wrote (fastres/inference/file)."""

from __future__ import annotations

import os

import torch

from fastres.graph.rewrite import Rewritten
from fastres.graph.signature import Signature
from fastres.inference.executor import Executor
from fastres.inference.file.document import Stored
from fastres.inference.file.store import naming, read
from fastres.inference.frozen import FrozenModel
from fastres.inference.hub import give_likeness
from fastres.inference.network import Network


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> FrozenModel:
    """The frozen model that ``FrozenModel.save`` wrote: the same outputs, bit for bit on the same machine.

    Nothing in the file is code: it may come from anywhere. It has no source: ``refresh()`` raises, and so do calls
    unlike every one that was captured before it was saved (``freeze(..., examples=...)``, ``FrozenModel.capture``). A
    CUDA graph is not in it: ``record_graph`` records one again.

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
    where = None if device is None else torch.device(device)
    with naming(path):
        return _model(read(path, where))


def _model(stored: Stored) -> FrozenModel:
    report = stored.report
    report.device = str(stored.device)
    if report.cuda_graph.startswith("on"):
        report.cuda_graph = "off: loaded from a file, record_graph() records it again"
    (graph, captured), *others = stored.calls
    made = Rewritten(graph, {name: stored.tensors[name] for name in graph.constants}, report.rows)
    frozen = FrozenModel(made, None, Signature(stored.signature), report, stored.dtype, captured, stored.plan)
    networks = [Network(captured, Executor(graph, stored.plan)) for graph, captured in others]
    frozen.adopt(networks, {name: t for name, t in stored.tensors.items() if name not in made.constants})
    if stored.plan.channels_last:
        frozen.use_channels_last()
    return give_likeness(frozen, stored.likeness)
