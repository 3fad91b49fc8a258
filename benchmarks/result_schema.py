"""The schema of a result file: `validate` checks data against it, `load` reads a file and checks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA_NAME, SCHEMA_VERSION = "fastres.benchmarks", 2  # 2: flops and the roofline

_RATIO = {"median": float, "low": float, "high": float, "n": int, "coverage": float}
_VERDICT = {"passed": bool, "error_ratio": (float, None), "message": str}
_PEER = {
    "samples": [float],  # seconds of `iterations` calls, round by round
    **dict.fromkeys(("median", "q1", "q3"), float),  # seconds of one call
    # of the bytes that the fused kernels must move, over the median; `of_bound` is of the roofline's bound
    **dict.fromkeys(("bytes_per_s", "of_bandwidth", "flops_per_s", "of_bound", "images_per_s"), (float, None)),
    "peak_bytes": (int, None),
    "verdict": (_VERDICT, None),  # None for a baseline
    "speedup": {str: _RATIO},  # over every peer that is not ours; the entry of the baseline is the headline
}
_CASE = {
    **dict.fromkeys(("id", "what", "mode", "baseline"), str),
    **dict.fromkeys(("layout", "dtype", "backend"), (str, None)),
    **dict.fromkeys(("threads", "iterations", "rounds"), int),
    **dict.fromkeys(("bytes_moved", "flops", "bound_s"), (float, None)),  # the roofline's, at this session's rates
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
    """Check data against a schema; more keys are allowed. Raises ValueError naming the place that does not conform."""
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
    """Read a result file. Raises OSError if it cannot be read, ValueError if it is not a valid result."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's are both
        raise ValueError(f"not a JSON file: {error}") from error
    return check(data)


def check(data: Any) -> dict[str, Any]:
    """Return the data of a result. Raises ValueError saying what is wrong with them."""
    got = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if got != SCHEMA_NAME:
        wanted = f"expected the key 'schema' to be {SCHEMA_NAME!r}"
        raise ValueError(f"not a result of these benchmarks: got the schema {got!r}, {wanted}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version: got {data.get('schema_version')!r}, expected {SCHEMA_VERSION}: the file was written by "
            "another version of the benchmarks; read it with the scripts of that version"
        )
    validate(data)
    return data
