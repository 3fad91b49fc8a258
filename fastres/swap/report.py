"""SwapReport: what became of every block, as rows, as text, as data, and the way back."""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from fastres.swap.adapters import ReasonCode
from fastres.swap.fused import Options, restore

Status = Literal["swapped", "skipped", "rolled_back"]

logger = logging.getLogger("fastres")


@dataclass(frozen=True)
class SwapRow:
    """One block.

    name: fully-qualified, "" for the model itself. pattern: what it was matched as. reason: a code, None when swapped.
    error_ratio: the fused block's error over eager's against float64, with `verify=`; at most 2 passes.
    """

    name: str
    pattern: str
    status: Status
    reason: ReasonCode | None = None
    message: str = ""
    error_ratio: float | None = None


class SwapReport:
    """Record of a swap. `rows` hold one entry per block; `str()` is a table, `to_dict()` is JSON's kind of data.

    Attributes:
        rows: the blocks in the model's order.
        backend, memory, checkpoint_bn: what was asked for.
        dry_run: whether nothing was changed.
        reverted: whether `revert` has run.
    """

    def __init__(self, model: str, rows: list[SwapRow], options: Options, dry_run: bool) -> None:
        self.model = model
        self.rows = rows
        self.backend, self.memory, self.checkpoint_bn = options
        self.dry_run = dry_run
        self.reverted = False
        self._undo: list[tuple[str, weakref.ref[nn.Module], type[nn.Module]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_undo": []}  # a copy or a pickle is a record; `unswap` undoes a copied model

    @property
    def swapped(self) -> list[SwapRow]:
        """The rows that run fused."""
        return [row for row in self.rows if row.status == "swapped"]

    def remember(self, name: str, block: nn.Module, fused: type[nn.Module]) -> None:
        """Notes for `revert` that `block` was given the class `fused`; blocks are held weakly."""
        self._undo.append((name, weakref.ref(block), fused))

    def revert(self) -> None:
        """Gives every block that this swap changed its stock class back: the same objects, nothing copied.

        Blocks that were deleted, replaced or reverted since are passed over, so a second call does nothing. A block
        whose class another tool changed since (`fully_shard` after the swap) keeps it, and a warning names the block.
        """
        for name, reference, fused in self._undo:
            block = reference()
            if block is None:
                continue
            if type(block) is fused:
                restore(block)
            elif isinstance(block, fused):
                logger.warning("revert: %s is a %s now and stays as it is", name or "the model", type(block).__name__)
        self._undo = [entry for entry in self._undo if isinstance(entry[1](), entry[2])]
        self.reverted = not self.dry_run

    def raise_if_none(self) -> SwapReport:
        """Raises ValueError if no block runs fused; returns the report otherwise."""
        if not any(row.status == "swapped" or row.reason == "ALREADY" for row in self.rows):
            raise ValueError(f"model: nothing to swap in {self.model}: {self.summary()}")
        return self

    def summary(self) -> str:
        """One line: how many blocks were swapped, and the reasons for the others."""
        reasons = Counter(row.reason for row in self.rows if row.reason is not None)
        counts = ", ".join(f"{count} {code}" for code, count in reasons.most_common())
        verb = "would be swapped" if self.dry_run else "swapped, since reverted" if self.reverted else "swapped"
        return f"{len(self.swapped)} of {len(self.rows)} blocks {verb}" + (f"; {counts}" if counts else "")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: lists, dicts, strings, numbers, None."""
        return {
            "model": self.model,
            "backend": self.backend,
            "memory": self.memory,
            "checkpoint_bn": self.checkpoint_bn,
            "dry_run": self.dry_run,
            "reverted": self.reverted,
            "swapped": len(self.swapped),
            "rows": [asdict(row) | {"error_ratio": _finite(row.error_ratio)} for row in self.rows],
        }

    def __str__(self) -> str:
        head = ("block", "pattern", "status", "reason", "error ratio", "message")
        table = [head]
        for row in self.rows:
            ratio = "" if row.error_ratio is None else f"{row.error_ratio:.2f}"
            table.append((row.name or "(model)", row.pattern, row.status, row.reason or "", ratio, row.message))
        shown = [i for i in range(len(head)) if i < 3 or any(line[i] for line in table[1:])]
        widths = {i: max(len(line[i]) for line in table) for i in shown}
        lines = ["  ".join(line[i].ljust(widths[i]) for i in shown).rstrip() for line in table]
        return "\n".join(
            [f"{self.model}: {self.summary()}", *lines] if self.rows else [f"{self.model}: no block known"]
        )

    def __repr__(self) -> str:
        return f"SwapReport({self.model}: {self.summary()})"


def _finite(ratio: float | None) -> float | None:
    """JSON has no infinity; the row's message says what happened."""
    return ratio if ratio is not None and math.isfinite(ratio) else None
