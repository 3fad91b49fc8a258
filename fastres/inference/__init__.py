"""freeze: a network as a snapshot for inference, every convolution with what follows it in one step.

capture       capture.py (torch.export), functional.py (in-place calls undone), signature.py (the call convention)
rewrite       normal.py (one form for each thing), constants.py, regions.py (the region graph), build.py (executor)
steps         conv.py, leaves.py; cost.py (what each costs at the least)
without a graph   watch.py (which BN reads which convolution), modules.py, blocks.py
both          recipe.py, making.py
plan          plan.py, choose.py: what is chosen by measuring
run           frozen.py (FrozenModel), likeness.py, engine.py, program.py, graphs.py (CUDA), gate.py (threads)
file          saved.py (FrozenModel.save, fastres.load), store.py, json_*.py
freeze.py     the public function: these in order; report.py
"""

from fastres.inference.freeze import freeze
from fastres.inference.frozen import FrozenModel
from fastres.inference.json_values import FrozenFileError
from fastres.inference.report import FreezeReport, FreezeRow
from fastres.inference.saved import load

__all__ = ["FreezeReport", "FreezeRow", "FrozenFileError", "FrozenModel", "freeze", "load"]
