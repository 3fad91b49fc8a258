"""`torch.compile(model, backend="fastres")`: convolutions folded and fused in inference graphs, the rest to Inductor.

trace.py     a graph of Dynamo's as functional ATen, its weights as constants
fuse.py      the regions of that graph as calls of fused operators on folded weights
folds.py     the folded weights, made again when the weights that they are made of have changed
cpu.py       on a CPU, the fused graph on packed weights
backend.py   the backend: which graph takes which way

The entry point `torch_dynamo_backends` names it, so it needs no import of fastres. Whoever imports it has Dynamo.
"""

from fastres.compile.rewrite import backend

__all__ = ["backend"]
