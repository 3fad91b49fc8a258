"""Which functions a saved network may call, and under which name: an allow-list, for a file is not to be trusted.

A file names an operator as ``aten.relu.default``. It is looked up under ``torch.ops`` in three namespaces (aten,
torchvision, fastres), and only if its schema shows that it computes values from values:

* it is one of the dispatcher's operators, not one of the hundreds that exist for TorchScript alone (``aten::save``);
* it writes to none of its arguments;
* its arguments and results are tensors, numbers, devices, dtypes and the like: no stream, storage or object (no file
  can hold a generator, and it may be left out);
* it takes no string but under a few names, such as ``rounding_mode``: no path (``aten::from_file``), no message to
  print (``aten::_print``);
* it is public, or one of the private ones that captured networks hold: the others hand their arguments to libraries
  that check them less.

Python functions come from a fixed table, with the number of arguments each takes. Saving applies the same rules.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from fastres.inference.file.values import FrozenFileError, short

NAMESPACES = ("aten", "torchvision", "fastres")
_TARGET = re.compile(rf"({'|'.join(NAMESPACES)})\.([A-Za-z_]\w{{0,99}})\.([A-Za-z_]\w{{0,99}})", re.ASCII)
_TYPE = re.compile(r"(?:Optional|List)\[(.+)\]")
_TYPES = frozenset(["Tensor", "int", "float", "bool", "number", "str", "Device", "Generator"])  # a dtype is an int here
_STRINGS = frozenset(
    [
        *("rounding_mode", "approximate", "reduce", "mode", "padding", "equation", "ord", "side", "indexing"),
        *("interpolation", "norm", "UPLO", "driver", "pad_mode", "assert_msg"),
        *("act", "backend"),  # fastres' own
    ]
)
_PRIVATE = frozenset(
    f"aten::_{name}"
    for name in (
        *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "addmm_activation", "assert_async", "assert_scalar"),
        *("assert_tensor_metadata", "cdist_forward", "conj", "conj_physical", "convolution", "convolution_mode"),
        *(
            "embedding_bag",
            "embedding_bag_forward_only",
            "euclidean_dist",
            "fft_c2c",
            "fft_c2r",
            "fft_r2c",
            "functional_assert_async",
        ),
        *("functional_assert_scalar", "functional_sym_constrain_range", "functional_sym_constrain_range_for_size"),
        *("fused_rms_norm", "fused_sdp_choice", "is_all_true", "linalg_det", "linalg_eigh", "linalg_slogdet"),
        *("linalg_solve_ex", "linalg_svd", "local_scalar_dense", "log_softmax", "logcumsumexp", "lu_with_info"),
        *("native_batch_norm_legit", "native_batch_norm_legit_no_training", "native_multi_head_attention"),
        *("neg_view", "pad_circular", "pad_enum", "pdist_forward", "prelu_kernel", "reshape_alias", "reshape_copy"),
        *("safe_softmax", "scaled_dot_product_attention_math", "scaled_dot_product_cudnn_attention"),
        *("scaled_dot_product_efficient_attention", "scaled_dot_product_flash_attention"),
        *("scaled_dot_product_flash_attention_for_cpu", "shape_as_tensor", "softmax", "stack", "to_copy"),
        *("transformer_encoder_layer_fwd", "trilinear", "unique2", "unsafe_index", "unsafe_masked_index"),
        *("unsafe_view", "upsample_bicubic2d_aa", "upsample_bilinear2d_aa", "upsample_nearest_exact1d"),
        *("upsample_nearest_exact2d", "weight_norm", "weight_norm_interface"),
        *("_and__", "_or__", "_xor__", "_lshift__", "_rshift__"),
    )
)

PYTHON: dict[str, tuple[Callable[..., Any], int]] = {
    **{f"operator.{f.__name__}": (f, 2) for f in (operator.add, operator.sub, operator.mul, operator.truediv)},
    **{f"operator.{f.__name__}": (f, 2) for f in (operator.floordiv, operator.mod, operator.pow, operator.getitem)},
    **{f"operator.{f.__name__}": (f, 2) for f in (operator.eq, operator.ne, operator.lt, operator.le)},
    **{f"operator.{f.__name__}": (f, 2) for f in (operator.gt, operator.ge, operator.and_, operator.or_)},
    **{f"operator.{f.__name__}": (f, 1) for f in (operator.neg, operator.not_, operator.abs)},
    **{f"math.{f.__name__}": (f, 1) for f in (math.floor, math.ceil, math.trunc, math.sqrt)},
    **{f"torch.{f.__name__}": (f, 1) for f in (torch.sym_int, torch.sym_float, torch.sym_not)},
    **{f"torch.{f.__name__}": (f, 2) for f in (torch.sym_max, torch.sym_min)},
    "torch.sym_ite": (torch.sym_ite, 3),
    "torch.sym_sum": (torch.sym_sum, 1),
}
_NAMES = {function: name for name, (function, _) in PYTHON.items()}


def target_to_json(target: Any) -> str:
    """The name of a function in a file. Raises FrozenFileError for one that no file may call."""
    if isinstance(target, OpOverload):
        name = str(target)
        if _operator(name) is not target:
            raise FrozenFileError(f"{name} is not the operator of that name")
        return name
    try:
        return _NAMES[target]
    except (KeyError, TypeError):
        allowed = f"only operators of {', '.join(NAMESPACES)} can be saved"
        raise FrozenFileError(f"it calls {short(target)}: {allowed}") from None


def target_from_json(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function of a name in a file, if it may be called, and so many arguments of these names fit it.

    Raises:
        FrozenFileError: it may not, or they do not.
    """
    if isinstance(name, str) and name in PYTHON:
        function, count = PYTHON[name]
        if len(args) != count or kwargs:
            raise FrozenFileError(f"{name} takes {count} positional arguments, got {len(args)} and {len(kwargs)} named")
        return function
    found = _operator(name)
    arguments = found._schema.arguments
    positional = sum(not a.kwarg_only for a in arguments)
    rest = arguments[len(args) :]
    needed, names = {a.name for a in rest if not a.has_default_value()}, {a.name for a in rest}
    if len(args) > positional or not needed <= set(kwargs) <= names:
        raise FrozenFileError(f"{name} does not take {len(args)} positional arguments and {short(sorted(kwargs))}")
    return found


def _operator(name: Any) -> OpOverload:
    match = _TARGET.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise FrozenFileError(f"{short(name)} is no operator of {', '.join(NAMESPACES)}, and no function it may call")
    return _looked_up(*match.groups())


@lru_cache(maxsize=1024)
def _looked_up(namespace: str, name: str, overload: str) -> OpOverload:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None and namespace == "torchvision":
        _torchvision(name)
        packet = getattr(torch.ops.torchvision, name, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        raise FrozenFileError(f"this torch ({torch.__version__}) has no operator {namespace}.{name}.{overload}")
    found = getattr(packet, overload)
    reason = why_not(found)
    if reason:
        raise FrozenFileError(f"{found} {reason}: a frozen network's file may not call it")
    return found  # type: ignore[no-any-return]


def why_not(found: OpOverload) -> str:
    """Why a file may not call an operator; empty where it may."""
    schema = found._schema
    name = schema.name + ("." + schema.overload_name if schema.overload_name else "")
    short_name = schema.name.partition("::")[2]
    if not torch._C._dispatch_has_kernel(name):
        return "is not one of the dispatcher's"
    if schema.is_mutable:
        return "writes to its arguments"
    if short_name.startswith("_") and schema.name not in _PRIVATE:
        return "is private"
    for argument in schema.arguments:
        kind = _plain(str(argument.type))
        if kind not in _TYPES:
            return f"takes a {kind}"
        if kind == "str" and argument.name not in _STRINGS:
            return f"takes a string, {argument.name}"
    for result in schema.returns:
        kind = _plain(str(result.type))
        if kind not in _TYPES or kind == "str":
            return f"returns a {kind}"
    return ""


def _plain(kind: str) -> str:
    while match := _TYPE.fullmatch(kind):
        kind = match.group(1)
    return kind


def _torchvision(name: str) -> None:
    """Registers torchvision's operators: the one package that is imported here, by this name and no other."""
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # where torchvision does not fit torch its import raises nearly anything
        raise FrozenFileError(
            f"it calls torchvision.{name}: it needs torchvision, which does not import here: {error}"
        ) from error
