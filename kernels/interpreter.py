"""A repair of Triton 3.6's interpreter, applied under TRITON_INTERPRET=1 alone.

It holds scalars as arrays of one element and turns a loop's bound into an int by `int(array)`, which NumPy 2.4 refuses.
Loops with a bound known only at run time then raise; `array.item()` is what it means. To be dropped with the Triton
version that needs it.
"""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor_with_item(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def repair() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor_with_item
