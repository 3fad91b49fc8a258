"""A network as a list of steps, however it came in, and the rewrites of it. Runs nothing.

export.py     torch.export's graph of a call; signature.py: the call convention; functionalize.py: in-place calls undone
dynamo.py     a graph of torch.compile's
normalize.py  one form for each pattern
constants.py  constants in float64
fusions/      one fusion a file: what it matches, when it refuses, what it writes
steps.py      Step and Graph: the finished list, which freeze runs and a file holds; cost.py: what steps cost at least
"""
