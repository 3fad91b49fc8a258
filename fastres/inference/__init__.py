"""freeze: a network as a snapshot for inference, a list of steps, every convolution with what follows it in one.

freeze.py     the public function: capture, fuse (fastres/graph), tune, verify
lower.py      the steps as plain calls, for one input signature
executor.py   the loop over them; network.py: a captured call with its executor; cuda_graphs.py
frozen.py     FrozenModel; hub.py: what it shows of its source
tune.py       what is chosen by measuring
precision.py  layers that the referee moves back to more exact ways
verify.py     the referee's verdict; checks.py: what is refused; compare.py; report.py
fallback.py   a network without a graph
file/         FrozenModel.save; load.py: fastres.load
"""

from fastres.graph.rows import FreezeRow
from fastres.inference.file.values import FrozenFileError
from fastres.inference.freeze import freeze
from fastres.inference.frozen import FrozenModel
from fastres.inference.load import load
from fastres.inference.report import FreezeReport

__all__ = ["FreezeReport", "FreezeRow", "FrozenFileError", "FrozenModel", "freeze", "load"]
