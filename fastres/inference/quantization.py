"""The report of an int8 network: each layer's precision and why, and the gate's verdict."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerPrecision:
    """One layer: what it computes in, the SNR in dB at its output and why it is not int8.

    ``snr`` compares the layer's output with the float32 network's, errors of the layers before it included. ``alone``
    is the SNR at the network's output with this layer alone quantized; None where the gate did not need to know.
    """

    name: str
    precision: str  # "int8", "bfloat16" or "float32"
    snr: float | None = None
    alone: float | None = None
    reason: str = ""


@dataclass
class Quantization:
    """The way a network was quantized, and how well: ``str()`` is lines for a report.

    Attributes:
        observer: how ranges were found.
        images: how many calibration images there were.
        limit: the largest weight: 127, or 64 where a CPU's products of 8 bits saturate.
        layers: with weights, in the order of the steps.
        gate: what the gate asks for.
        holds: whether the network passed; else it runs in float32.
        snr: at the output, in dB.
        agreement: top-1, of the images that count.
        counted: images that count: those with a margin above noise.
        metric: of the caller's gate, and ``baseline`` the float32 network's.
        first: the verdict on the network with every layer on integers; empty where it passed.
        notes: what weakens the verdict.
    """

    observer: str
    images: int
    limit: int
    layers: list[LayerPrecision]
    gate: str
    holds: bool
    snr: float | None = None
    agreement: float | None = None
    counted: int = 0
    metric: float | None = None
    baseline: float | None = None
    first: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """The number of layers by precision."""
        found: dict[str, int] = {}
        for layer in self.layers:
            found[layer.precision] = found.get(layer.precision, 0) + 1
        return found

    def table(self) -> str:
        """A line for every layer: name, precision, SNR at its output, why it is not int8."""
        wide = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{layer.name:<{wide}}  {layer.precision:<8}  {_db(layer.snr):>8}  {layer.reason}".rstrip()
            for layer in self.layers
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        lines = [f"int8: layers: {counts}; ranges by {self.observer} of {self.images} calibration images"]
        lines.append(self.gate)
        if self.holds:
            found = [f"SNR {_db(self.snr)}"]
            if self.agreement is not None:
                found.append(f"top-1 agreement {self.agreement:.2%} of {self.counted} images")
            if self.metric is not None:
                found.append(f"metric {self.metric:.6g} (float32: {self.baseline:.6g})")
            lines.append(f"passed: {', '.join(found)}")
        else:
            lines.append("not passed, the network runs in float32")
        if self.first:
            lines.append(f"with every layer on integers: {self.first}")
        for layer in self.layers:
            if layer.reason:
                alone = f"; alone it leaves {_db(layer.alone)}" if layer.alone is not None else ""
                lines.append(f"{layer.name} stays {layer.precision}: {layer.reason}{alone}")
        return "\n".join([*lines, *self.notes])


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"
