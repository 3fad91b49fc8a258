"""The shape of a result file: `validate` holds data to it, `load` reads a file that holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA_NAME, SCHEMA_VERSION = "fastres.benchmarks", 2  # 2: flops and the roofline

_RATIO = {"median": float, "low": float, "high": float, "n": int, "coverage": float}
_VERDICT = {"passed": bool, "error_ratio": (float, None), "message": str}
_PEER = {
    "samples": [float],  # seconds of `iterations` calls, round by round
    "median": float,  # seconds of one call
    "q1": float,
    "q3": float,
    "bytes_per_s": (float, None),  # the bytes the fused kernels have to move, over the median
    "of_bandwidth": (float, None),
    "flops_per_s": (float, None),
    "of_bound": (float, None),  # the roofline's bound over the median
    "images_per_s": (float, None),
    "peak_bytes": (int, None),
    "verdict": (_VERDICT, None),  # None for a baseline, which is the yardstick
    "speedup": {str: _RATIO},  # over every peer that is not fastres; entry `baseline` is the headline
}
_CASE = {
    "id": str,
    "what": str,
    "mode": str,
    "layout": (str, None),
    "dtype": (str, None),
    "backend": (str, None),
    "threads": int,
    "iterations": int,
    "rounds": int,
    "bytes_moved": (float, None),
    "flops": (float, None),
    "bound_s": (float, None),  # the roofline's, at the rates of this session
    "baseline": str,
    "ours": [str],
    "peers": {str: _PEER},
    "left_out": {str: str},
}
_BAR = {"name": str, "aim": str, "measured": str, "value": float, "n": int}
SCHEMA = {
    "schema": str,
    "schema_version": int,
    "environment": dict,
    "settings": {
        "budget_s": float,
        "rounds": int,
        "peers": str,
        "bandwidth_bytes_per_s": float,
        "flops_per_s": {str: float},  # by dtype
    },
    "cases": [_CASE],
    "bars": [_BAR],
}


def validate(data: Any, schema: Any = SCHEMA, where: str = "result") -> None:
    """Raises ValueError naming the place where `data` is not what `schema` says; it may hold more keys."""
    if isinstance(schema, tuple):  # (schema, None): may be null
        if data is not None:
            validate(data, schema[0], where)
    elif isinstance(schema, list):
        _expect(isinstance(data, list), where, "a list", data)
        for i, entry in enumerate(data):
            validate(entry, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict) and str in schema:
        _expect(isinstance(data, dict), where, "an object", data)
        for key, entry in data.items():
            validate(entry, schema[str], f"{where}[{key!r}]")
    elif isinstance(schema, dict):
        _expect(isinstance(data, dict), where, "an object", data)
        for key, entry in schema.items():
            _expect(key in data, where, f"the key {key!r}", sorted(data))
            validate(data[key], entry, f"{where}.{key}")
    else:
        allowed = (int, float) if schema is float else schema
        right = isinstance(data, allowed) and not (isinstance(data, bool) and schema is not bool)
        _expect(right, where, f"{schema.__name__}", data)


def _expect(right: bool, where: str, expected: str, got: Any) -> None:
    if not right:
        raise ValueError(f"{where}: got {got!r}, expected {expected}")


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises OSError where it cannot be read, ValueError saying what is wrong with what it holds."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's are both
        raise ValueError(f"not a JSON file: {error}") from error
    return check(data)


def check(data: Any) -> dict[str, Any]:
    """The data, if they are a result; raises ValueError saying what is wrong with them."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA_NAME:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"not a result of these benchmarks: got the schema {got!r}, expected the key 'schema' to say "
            f"{SCHEMA_NAME!r}"
        )
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version: got {data.get('schema_version')!r}, expected {SCHEMA_VERSION}: it was written "
            "by another version of the benchmarks, whose own scripts read it"
        )
    validate(data)
    return data
