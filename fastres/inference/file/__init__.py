"""The file of a frozen network: the list of its steps as JSON, the weights as safetensors. No pickle, no code.

store.py      one file, whole or not at all
document.py   the JSON document: graph, call, plan, report
operators.py  the allow-list of operators; trees.py: signatures and structures; likeness.py: of the source
values.py     plain values
"""
