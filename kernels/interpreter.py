"""A fix for Triton 3.6's interpreter, applied only under TRITON_INTERPRET=1.

The interpreter represents scalars as arrays of one element and converts a loop bound with `int(array)`, which NumPy 2.4
refuses, so loops whose bound is known only at run time raise. `array.item()` is the right conversion. Remove this with
the Triton version that needs it.
"""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor_with_item(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def repair() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor_with_item
