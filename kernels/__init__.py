"""Triton kernels of fastres: plain tensors in, preallocated tensors out; no autograd, no dispatch.

One operator is one module of the operator's name. `element` holds the maths of one element, `configs` the tile sizes,
`launch` what every launch needs. Importing this package imports torch and triton, and queries no device.
"""

if __name__ != "fastres.kernels":  # another package on PyPI is called "kernels": never be taken for it
    raise ImportError(f"this is fastres.kernels and must be imported by that name, not as {__name__!r}")

import triton  # noqa: E402

if triton.knobs.runtime.interpret:
    from .interpreter import repair

    repair()
