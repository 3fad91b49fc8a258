"""Configurations measured on GPUs, which replace those of configs.py: tuned.json, in the folder of this file.

    {"schema": "fastres.tuned", "schema_version": 1, "entries": [
        {"kernel": "add_relu_forward_kernel", "arch": 90, "shape_class": "large",
         "config": {"tile": 4096, "num_warps": 8, "line": 0, "programs": 0}, ...where and how it was measured}]}

`make gpu` measures them and `make gpu-import` writes the file; without a file nothing was measured. An entry replaces
an existing one of the table, field by field, so the tests that compile the table compile what is loaded.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("tuned.json")
SCHEMA, VERSION = "fastres.tuned", 1

Table = dict[tuple[str, int], dict[str, Any]]  # (kernel, architecture) -> shape class -> configuration


def load(path: Path, table: Table) -> int:
    """Put the file's entries into the table and return their number, 0 without a file.

    Raises ValueError naming the entry that is not in the table or has invalid sizes; the table is then unchanged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0
    found = checked(data, table, str(path))
    for (kernel, arch, shape_class), entry in found.items():
        table[kernel, arch][shape_class] = entry
    return len(found)


def checked(data: Any, table: Table, where: str) -> dict[tuple[str, int, str], Any]:
    """Check the data and return the configurations by (kernel, architecture, shape class). Raises ValueError."""
    if not isinstance(data, dict) or (data.get("schema"), data.get("schema_version")) != (SCHEMA, VERSION):
        raise ValueError(f"{where}: expected the schema {SCHEMA!r}, version {VERSION}")
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f"{where}: entries: got {type(entries).__name__}, expected a list")
    found = {}
    for i, entry in enumerate(entries):
        at = f"{where}: entries[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{at}: got {type(entry).__name__}, expected an object")
        key = tuple(entry.get(name) for name in ("kernel", "arch", "shape_class"))
        kernel, arch, shape_class = key
        known = table.get((kernel, arch), {}).get(shape_class) if all(map(_hashable, key)) else None
        if known is None:
            raise ValueError(f"{at}: got {key}, which the table of configurations does not have")
        if key in found:
            raise ValueError(f"{at}: {key} is there twice")
        found[key] = _sized(entry.get("config"), known, at)
    return found


def _hashable(value: Any) -> bool:
    return isinstance(value, (str, int))


def _sized(config: Any, known: Any, at: str) -> Any:
    """Build a configuration of the known one's type. Sizes must be positive, and powers of two where they are."""
    names = asdict(known)
    if not isinstance(config, dict) or set(config) != set(names):
        raise ValueError(f"{at}: config: got {config!r}, expected the keys {sorted(names)}")
    for name, value in config.items():
        # 0 means that the size does not apply; it must stay 0
        right = type(value) is int and (value > 0) == (names[name] > 0) and value >= 0
        if right and name not in ("programs", "num_stages", "group_m"):
            right = value & (value - 1) == 0
        if not right:
            raise ValueError(f"{at}: config: {name}: got {value!r}, expected a size like {names[name]}")
    return type(known)(**config)
