"""The operators that a saved network may call, and their names: an allow-list, for a file is not to be trusted.

A file names an operator as ``aten.relu.default``. It is looked up under ``torch.ops`` in three namespaces (aten,
torchvision, fastres), and only if its schema shows that it computes values from values:

* it is one of the dispatcher's operators, not one of the hundreds that exist for TorchScript alone (``aten::save``);
* it writes to none of its arguments;
* its arguments and results are tensors, numbers, devices, dtypes and the like: no stream, storage or object (no file
  can hold a generator, and it may be left out);
* it takes no string but under a few names, such as ``rounding_mode``: no path (``aten::from_file``), no message to
  print (``aten::_print``);
* it is public, or one of the private ones that captured networks hold: the others check their arguments less;
* it is no gradient, no library's own entry, and none of a few that no network needs and that end the process for
  arguments which make no sense.

That last list is what random arguments have shown, not all that there is: PyTorch's operators do not check everything.

Python functions come from a fixed table, with the number of arguments each takes. Saving applies the same rules.
"""

from __future__ import annotations

import importlib
import math
import operator as op
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from fastres.graph.steps import operator_name
from fastres.inference.file.values import FrozenFileError, short

NAMESPACES = ("aten", "torchvision", "fastres")
_OPERATOR = re.compile(rf"({'|'.join(NAMESPACES)})\.([A-Za-z_]\w{{0,99}})\.([A-Za-z_]\w{{0,99}})", re.ASCII)
_TYPE = re.compile(r"(?:(?:Optional|List)\[)*([^\[\]]+)\]*")
_ENUMS = {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format}  # unchecked as ints
_TYPES = frozenset(["Tensor", "int", "float", "bool", "number", "str", "Device", "Generator"])  # a dtype is an int here
_STRINGS = frozenset(
    # The last two are fastres' own.
    """
    rounding_mode approximate reduce mode padding equation ord side indexing interpolation norm UPLO driver pad_mode
    assert_msg act backend
    """.split()
)
_PRIVATE = frozenset(
    f"aten::_{name}"
    for name in """
    adaptive_avg_pool2d adaptive_avg_pool3d addmm_activation assert_async assert_scalar assert_tensor_metadata
    cdist_forward conj conj_physical convolution convolution_mode embedding_bag embedding_bag_forward_only
    euclidean_dist functional_assert_async functional_assert_scalar functional_sym_constrain_range
    functional_sym_constrain_range_for_size fused_rms_norm fused_sdp_choice is_all_true linalg_det linalg_eigh
    linalg_slogdet linalg_solve_ex linalg_svd local_scalar_dense log_softmax logcumsumexp lu_with_info
    native_multi_head_attention neg_view pad_circular pad_enum pdist_forward prelu_kernel reshape_copy safe_softmax
    scaled_dot_product_attention_math scaled_dot_product_cudnn_attention scaled_dot_product_efficient_attention
    scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu shape_as_tensor softmax to_copy
    transformer_encoder_layer_fwd trilinear unique2 unsafe_index unsafe_masked_index unsafe_view
    upsample_bicubic2d_aa upsample_bilinear2d_aa upsample_nearest_exact1d upsample_nearest_exact2d weight_norm
    _and__ _or__ _xor__ _lshift__ _rshift__
    """.split()
)
_UNCHECKED = re.compile(
    r"aten::(\w*_backward|(mkldnn|cudnn|miopen|fbgemm|quantized)_\w+|native_batch_norm|batch_norm_update_stats|lu_unpack|"
    r"linalg_ldl_solve|ctc_loss|segment_reduce|align_tensors|promote_types)"
)
_BY_COUNT: dict[int, list[Callable[..., Any]]] = {
    1: [op.neg, op.not_, op.abs, math.floor, math.ceil, math.trunc, math.sqrt, torch.sym_sum],
    2: [op.add, op.sub, op.mul, op.truediv, op.floordiv, op.mod, op.pow, op.getitem, op.and_, op.or_],
    3: [torch.sym_ite],
}
_BY_COUNT[1] += [torch.sym_int, torch.sym_float, torch.sym_not]
_BY_COUNT[2] += [op.eq, op.ne, op.lt, op.le, op.gt, op.ge, torch.sym_max, torch.sym_min]
PYTHON = {operator_name(f): (f, count) for count, functions in _BY_COUNT.items() for f in functions}


def name_of(operator: Any) -> str:
    """The name of an operator in a file. Raises FrozenFileError for one that no file may call."""
    if isinstance(operator, OpOverload):
        if _looked_up(str(operator)) is operator:
            return str(operator)
    elif operator in (function for function, _ in PYTHON.values()):
        return operator_name(operator)
    raise FrozenFileError(f"it calls {short(operator)}: only operators of {', '.join(NAMESPACES)} can be saved")


def operator_for(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The operator of a name in a file, if it may be called, and so many arguments of these names fit it.

    Raises:
        FrozenFileError: it may not, or they do not.
    """
    if not isinstance(name, str):
        raise FrozenFileError(f"{short(name)} is no operator")
    if name in PYTHON:
        function, count = PYTHON[name]
        if len(args) != count or kwargs:
            raise FrozenFileError(f"{name} takes {count} positional arguments, got {len(args)} and {len(kwargs)} named")
        return function
    found = _looked_up(name)
    arguments = found._schema.arguments
    rest = arguments[len(args) :]
    needed, names = {a.name for a in rest if not a.has_default_value()}, {a.name for a in rest}
    if len(args) > sum(not a.kwarg_only for a in arguments) or not needed <= set(kwargs) <= names:
        raise FrozenFileError(f"{name} does not take {len(args)} positional arguments and {short(sorted(kwargs))}")
    for argument, value in zip(arguments, [*args, *(kwargs.get(a.name) for a in rest)], strict=True):
        kind = _ENUMS.get(_plain(argument.real_type))
        if kind is not None and value is not None and type(value) is not kind:
            raise FrozenFileError(f"{name} takes no {short(value)} for its {argument.name}")
    return found


@lru_cache(maxsize=1024)
def _looked_up(name: str) -> OpOverload:
    match = _OPERATOR.fullmatch(name)
    if match is None:
        raise FrozenFileError(f"{short(name)} is no operator of {', '.join(NAMESPACES)}, and no function it may call")
    namespace, operator, overload = match.groups()
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if packet is None and namespace == "torchvision":
        try:
            importlib.import_module("torchvision")  # registers them
        except Exception as error:  # where torchvision does not fit torch its import raises nearly anything
            text = f"it calls {name}: it needs torchvision, which does not import here: {error}"
            raise FrozenFileError(text) from error
        packet = getattr(torch.ops.torchvision, operator, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        raise FrozenFileError(f"this torch ({torch.__version__}) has no operator {name}")
    found: OpOverload = getattr(packet, overload)
    if reason := why_not(found):
        raise FrozenFileError(f"{found} {reason}: a frozen network's file may not call it")
    return found


def why_not(found: OpOverload) -> str:
    """Say why a file may not call an operator; empty where it may."""
    schema = found._schema
    if not torch._C._dispatch_has_kernel(schema.name + ("." if schema.overload_name else "") + schema.overload_name):
        return "is not one of the dispatcher's"
    if schema.is_mutable:
        return "writes to its arguments"
    if schema.name.partition("::")[2].startswith("_") and schema.name not in _PRIVATE:
        return "is private"
    if _UNCHECKED.fullmatch(schema.name):
        return "does not check its arguments"
    for argument in schema.arguments:
        kind = _plain(argument.type)
        if kind not in _TYPES:
            return f"takes a {kind}"
        if kind == "str" and argument.name not in _STRINGS:
            return f"takes a string, {argument.name}"
    results = {_plain(result.type) for result in schema.returns}
    return f"returns a {', '.join(sorted(results - _TYPES))}" if results - _TYPES or "str" in results else ""


def _plain(kind: Any) -> str:
    """The type of the values in a list or an optional."""
    match = _TYPE.fullmatch(str(kind))
    return match.group(1) if match else str(kind)
