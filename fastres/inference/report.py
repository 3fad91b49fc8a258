"""The report of a freeze: what each convolution became and why not more, the plan, the times, the referee's verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastres.graph.rows import ACTS, FreezeRow
from fastres.inference.quantization import Quantization
from fastres.verify import Verification


@dataclass
class FreezeReport:
    """Rows, plan, milliseconds a call on the example, notes, verdict; ``str()`` is a table, ``to_dict()`` is data."""

    model: str
    dtype: str
    device: str
    rows: list[FreezeRow]
    capture: str = "modules"  # "graph": torch.export; "modules": what the fallback rewrites
    capture_reason: str = ""  # why there is no graph
    memory_format: str = "contiguous"
    memory_format_reason: str = ""
    cuda_graph: str = "off"
    packed: int = 0  # convolutions whose weight is reordered for the example's shape (oneDNN)
    winograd: dict[str, int] = field(default_factory=dict)  # convolutions by Winograd's tiles: "2x2", "4x4"
    held: int = 0  # bytes of packed and transformed weights for the example, beside the weights
    images_at_a_time: int | None = None  # a larger batch runs in parts of so many images; None: whole
    steps: int = 0  # operator calls in all; 0 without a graph
    milliseconds: dict[str, float] = field(default_factory=dict)
    batch: int = 1  # of the example
    bandwidth: float = 0.0  # bytes/s, measured with the plan; 0: not
    rate: float = 0.0  # flop/s likewise
    notes: list[str] = field(default_factory=list)
    verification: Verification | None = None
    quantization: Quantization | None = None  # of a network in int8, or of one that the gate did not pass

    @property
    def folded(self) -> int:
        """The number of BN that were folded."""
        return self.counts["folded"]

    @property
    def counts(self) -> dict[str, int]:
        """The number of convolutions, and of those with their BN folded, residuals added, activations taken in; BN that
        stayed, of those fused with what follows; sums and heads that are one step; blocks of the fallback."""
        kinds = {kind: [row for row in self.rows if row.kind == kind] for kind in ("conv", "norm", "add", "block")}
        return {
            "convs": len(kinds["conv"]),
            "folded": sum("bn" in row.took for row in kinds["conv"]),
            "adds": sum("add" in row.took for row in kinds["conv"]),
            "acts": sum(bool(row.took) and row.took[-1] in ACTS for row in kinds["conv"]),
            "norms_left": len(kinds["norm"]),
            "bn_act": sum("relu" in row.took for row in kinds["norm"]),
            "add_relu": len(kinds["add"]),
            "pool_linear": sum(row.kind == "pool_linear" for row in self.rows),
            "blocks": len(kinds["block"]),
        }

    @property
    def speedup(self) -> float | None:
        """Eager's time over the frozen model's on the example; None where nothing was timed."""
        eager, frozen = self.milliseconds.get("eager"), self.milliseconds.get("frozen")
        return eager / frozen if eager and frozen else None

    @property
    def flops(self) -> int:
        """The flops of a call on the example; a multiply-add is two. 0 where the modules were rewritten."""
        return self.batch * sum(row.products for row in self.rows)

    @property
    def bytes(self) -> int:
        """That a call on the example must move at the least, each step reading and writing once."""
        return self.batch * sum(row.bytes for row in self.rows) + sum(row.weights for row in self.rows)

    @property
    def bound(self) -> float | None:
        """Milliseconds that the steps take at the least, one after another, at the measured rates; None without."""
        if not self.bandwidth or not self.rate:
            return None
        seconds = sum(
            max((self.batch * row.bytes + row.weights) / self.bandwidth, self.batch * row.products / self.rate)
            for row in self.rows
        )
        return seconds * 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "capture": self.capture,
            "capture_reason": self.capture_reason,
            "counts": self.counts,
            "memory_format": self.memory_format,
            "memory_format_reason": self.memory_format_reason,
            "cuda_graph": self.cuda_graph,
            "packed": self.packed,
            "winograd": dict(self.winograd),
            "held": self.held,
            "images_at_a_time": self.images_at_a_time,
            "steps": self.steps,
            "folded": self.folded,
            "speedup": self.speedup,
            "milliseconds": dict(self.milliseconds),
            "batch": self.batch,
            "flops": self.flops,
            "bytes": self.bytes,
            "bandwidth": self.bandwidth,
            "rate": self.rate,
            "bound": self.bound,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
            "verification": None if self.verification is None else self.verification.to_dict(),
            "quantization": None if self.quantization is None else asdict(self.quantization),
        }

    def table(self) -> str:
        """A line for every step: its name, what it became, flops and bytes on the example, why it did not take more.

        Example:
            >>> import torch, fastres
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
            >>> print(fastres.freeze(net, torch.randn(1, 3, 9, 9), tune=False).report.table())
            name  became              MFLOP   kB
            0     conv + bias + relu   0.02  3.4  1 folded
        """
        head = ("name", "became", "MFLOP", "kB", "")
        cells = [
            (
                row.name,
                row.became,
                f"{self.batch * row.products / 1e6:.2f}" if row.flops else "",
                f"{(self.batch * row.bytes + row.weights) / 1e3:.1f}" if row.bytes or row.weights else "",
                (f"{row.reason}: {row.message}" if row.reason else row.message)
                + (f"; F({row.tile}x{row.tile}, 3x3)" if row.tile else ""),
            )
            for row in self.rows
        ]
        wide = [max(len(row[i]) for row in [head, *cells]) for i in range(4)]
        lines = [
            f"{name:<{wide[0]}}  {became:<{wide[1]}}  {flops:>{wide[2]}}  {size:>{wide[3]}}  {why}".rstrip()
            for name, became, flops, size, why in [head, *cells]
        ]
        return "\n".join(lines)

    def _tiles(self) -> str:
        counts = ", ".join(f"{count} F({tile}, 3x3)" for tile, count in sorted(self.winograd.items()))
        return f"Winograd: {counts} ({self.held / 1e6:.3g} MB beside the weights); " if counts else ""

    def _share(self) -> str:
        bound, ms = self.bound, self.milliseconds.get("frozen")
        if bound is None or not ms:
            return ""
        rates = f"{self.bandwidth / 1e9:.3g} GB/s and {self.rate / 1e12:.3g} TFLOP/s"
        return f"; at {rates} {bound:.3g} ms at the least: {bound / ms:.0%} of the bound"

    def __str__(self) -> str:
        n = self.counts
        others = ", ".join(f"{row.name} {row.became.split()[0]}" for row in self.rows if row.kind == "other")
        lines = [
            f"{self.model}: {n['folded']} of {n['convs']} convolutions took their BN in, {n['adds']} a residual, "
            f"{n['acts']} an activation; {n['norms_left']} BN stay; {self.dtype} on {self.device}",
            f"  layout: {self.memory_format} ({self.memory_format_reason}); packed weights: {self.packed}; "
            f"{self._tiles()}"
            f"images at a time: {self.images_at_a_time or 'all'}; steps: {self.steps or 'no graph'}; "
            f"CUDA graph: {self.cuda_graph}",
        ]
        if self.capture == "graph":
            lines.append(f"  graph: {n['add_relu']} add + relu, {n['bn_act']} BN + relu, {n['pool_linear']} pool + fc")
            lines[-1] += f" as one step; operators that stay: {others or 'none'}"
        if self.milliseconds:
            times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.milliseconds.items())
            ratio = f"; {self.speedup:.2f}x eager" if self.speedup is not None else ""
            lines.append(f"  on the example: {times}{ratio}")
        if self.flops:
            lines.append(f"  predicted: {self.flops / 1e9:.4g} GFLOP, {self.bytes / 1e6:.4g} MB{self._share()}")
        alike: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            if row.reason:
                alike.setdefault((row.became, row.reason, row.message), []).append(row.name)
        names = [f"{n[0]} and {len(n) - 1} more" if len(n) > 1 else n[0] for n in alike.values()]
        width = max(map(len, names), default=0)
        for name, (became, reason, message) in zip(names, alike, strict=True):
            lines.append(f"  {name:<{width}}  stays {became:<10}  {reason}: {message}")
        lines += [f"  note: {note}" for note in self.notes]
        if self.quantization is not None:
            lines += ["  " + line for line in str(self.quantization).splitlines()]
        if self.quantization is not None and self.quantization.holds:
            lines.append("  not verified by the referee: the gate judges int8")
        elif self.verification is None:
            lines.append("  not verified")
        else:
            lines += ["  " + line for line in self.verification.table(limit=4).splitlines()]
        return "\n".join(lines)
