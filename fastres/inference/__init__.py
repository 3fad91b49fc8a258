"""freeze: a network as a snapshot for inference, BN folded into its convolutions.

capture.py   which BN reads which convolution's output, and nothing else does
fold.py      the arithmetic of folding, in float64, and when it is refused
rewrite.py   folds the pairs in a copy and gives known blocks their fused forward
plan.py      the memory layout, measured
graphs.py    CUDA graphs of the shapes asked for
frozen.py    FrozenModel: running, refreshing, staleness
report.py    FreezeReport
store.py     the file of a frozen network, by json_*.py; saved.py: FrozenModel.save and fastres.load
freeze.py    the public function: these steps in order
"""

from fastres.inference.freeze import freeze
from fastres.inference.frozen import FrozenModel
from fastres.inference.json_values import FrozenFileError
from fastres.inference.report import FreezeReport, FreezeRow
from fastres.inference.saved import load

__all__ = ["FreezeReport", "FreezeRow", "FrozenFileError", "FrozenModel", "freeze", "load"]
