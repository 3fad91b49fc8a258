"""Triton kernels of fastres: plain tensors in, preallocated tensors out; no autograd, no dispatch.

One operator is one module of the operator's name. `element` has the math of one element, `configs` the tile sizes,
`launch` what every launch needs. Importing this package imports torch and triton, and queries no device.
"""

if __name__ == "fastres.kernels":
    import triton

    if triton.knobs.runtime.interpret:
        from .interpreter import repair

        repair()
else:
    # Another package on PyPI is called "kernels", and with a checkout on the path this folder is found by that name.
    # transformers looks for that package, and raising here would break its import: be empty, and raise when used.
    def __getattr__(name: str) -> object:
        raise AttributeError(f"this is fastres.kernels, found as {__name__!r}: it has no {name!r} under that name")
