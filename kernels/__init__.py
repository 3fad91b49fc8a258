"""Triton kernels of fastres: plain tensors in, preallocated tensors out; no autograd, no dispatch.

One operator is one module of the operator's name. `element` holds the maths of one element, `configs` the tile sizes,
`launch` what every launch needs. Importing this package imports torch and triton, and queries no device.
"""

if __name__ == "fastres.kernels":
    import triton

    if triton.knobs.runtime.interpret:
        from .interpreter import repair

        repair()
else:
    # Another package on PyPI is called "kernels", and this folder is found by that name where a checkout is on the
    # path. Raising would end the import of transformers, which looks for that package: be empty, and say so when used.
    def __getattr__(name: str) -> object:
        raise AttributeError(f"this is fastres.kernels, found as {__name__!r}: it has no {name!r} under that name")
