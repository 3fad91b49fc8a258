"""The gate of int8: is a quantized network as good as the float32 one on the calibration images?

    logits     one output [N, classes]: the images whose likeliest class is the same, of those whose float32 margin
               exceeds noise, must be 99 %, and the signal 10 dB above the error
    other      maps, lists, several tensors, and logits without a margin above noise: the signal must be 20 dB above the
               error in each
    metric     a function of the network, given by the caller: it may drop by max_drop at the most, nothing else counts

    SNR        10 log10(variance of the float32 output / mean square error), over all images
    margin     the distance of the two largest logits. Noise is that of an error 30 dB below the logits' deviation
               within an image, twice: a margin below it is no decision of the network's

Where a network does not pass, its layers go back to floating point, the most damaging first, until it does. The damage
is the error at the network's output when that layer alone is quantized. The number of layers that go back is found by
doubling it and then halving the step, so that few networks are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

AGREEMENT = 0.99
LEAST_SNR, LEAST_SNR_OTHER = 10.0, 20.0
NOISE = 10 ** (-30 / 20)
_LIMIT = 300.0
WEAK = 16  # images: with fewer, the gate says little
Network = TypeVar("Network")


@dataclass(frozen=True)
class Score:
    """A comparison of a network's answers with the float32 network's.

    Attributes:
        snr: in dB; of the worst output where there are several.
        agreement: the share of the counted images with the same likeliest class; None where outputs are no logits.
        counted: the images whose margin exceeds noise.
        metric: of the caller's function; None without.
        fault: why it does not pass; empty where it does.
    """

    snr: float
    agreement: float | None = None
    counted: int = 0
    metric: float | None = None
    fault: str = ""

    @property
    def holds(self) -> bool:
        """True where the network passes."""
        return not self.fault


def snr(want: Tensor, got: Tensor) -> float:
    """Signal to noise in dB, from -300, where a number is not finite, to 300, where nothing differs."""
    want, got = want.detach().double(), got.detach().double()
    if want.shape != got.shape or not bool(torch.isfinite(got).all()):
        return -_LIMIT
    noise = float((got - want).square().mean()) if want.numel() else 0.0
    signal = float((want - want.mean()).square().mean()) if want.numel() else 0.0
    if noise == 0 or not signal > 0:
        return _LIMIT if noise == 0 else -_LIMIT
    return max(-_LIMIT, min(_LIMIT, 10 * math.log10(signal / noise)))


class Gate:
    """The float32 network's answers, and what a quantized one's must be like.

    Args:
        outputs: of each batch, the leaves of the float32 network's output.
        metric: the caller's function of a network, or None.
        max_drop: what the metric may lose.
        baseline: the metric of the float32 network.
    """

    def __init__(
        self,
        outputs: Sequence[Sequence[Any]],
        metric: Callable[[Any], float] | None = None,
        max_drop: float = 0.01,
        baseline: float | None = None,
    ) -> None:
        self.metric, self.max_drop, self.baseline = metric, max_drop, baseline
        places = [i for i, leaf in enumerate(outputs[0]) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not places and metric is None:
            raise ValueError(
                "gate: got None for a network without a floating output, expected a function of the network that gives "
                "a number: there is no error to measure"
            )
        self._places = places
        self.wants = [[batch[i] for i in places] for batch in outputs]
        self.is_logits = len(places) == 1 and self.wants[0][0].ndim == 2 and self.wants[0][0].shape[1] > 1
        tensors = [[leaf for leaf in batch if isinstance(leaf, Tensor)] for batch in outputs]
        self.images = sum(len(batch[0]) if batch and batch[0].ndim else 1 for batch in tensors)

    def describe(self) -> str:
        """Say what it asks for, in a line."""
        if self.metric is not None:
            return (
                f"the gate is the caller's metric, {_number(self.baseline)} in float32: at most {self.max_drop:g} less"
            )
        if self.is_logits and int(self._counted(torch.cat([batch[0] for batch in self.wants])).sum()) == 0:
            return f"the gate: SNR {LEAST_SNR_OTHER:g} dB: no image has a margin above noise, none is counted"
        if self.is_logits:
            return f"the gate: {AGREEMENT:.0%} top-1 agreement where the margin exceeds noise, SNR {LEAST_SNR:g} dB"
        return f"the gate: SNR {LEAST_SNR_OTHER:g} dB in every output: they are no logits, nothing is counted"

    def weakness(self) -> str:
        """Say why the gate is weak; empty where it is not."""
        reasons = []
        if self.images < WEAK:
            reasons.append(f"{self.images} calibration image{'s' if self.images > 1 else ''}")
        elif self.wants[0] and all(self._is_like_the_first(batch[0]) for batch in self.wants):
            reasons.append("all calibration images are answered alike")
        if self.is_logits and self.metric is None and not reasons:
            counted = int(self._counted(torch.cat([batch[0] for batch in self.wants])).sum())
            if counted < WEAK:
                reasons.append(f"only {counted} images have a margin above noise")
        return f"the gate is weak: {', '.join(reasons)}" if reasons else ""

    def _is_like_the_first(self, answers: Tensor) -> bool:
        first = self.wants[0][0][:1] if self.wants[0][0].ndim else self.wants[0][0]
        return answers.shape[1:] == first.shape[1:] and bool((answers == first).all())

    def score(self, outputs: Sequence[Sequence[Any]], network: Any = None) -> Score:
        """Judge a network by its outputs for the same batches, and by the caller's metric."""
        gots = [[batch[i] for i in self._places] for batch in outputs]
        worst = _LIMIT
        for place in range(len(self._places)):
            want, got = (torch.cat([batch[place].reshape(-1) for batch in all_]) for all_ in (self.wants, gots))
            worst = min(worst, snr(want, got))
        agreement, counted = self._agreement(gots) if self.is_logits else (None, 0)
        if self.metric is not None:
            value = checked_metric(self.metric(network))
            drop = (self.baseline or 0.0) - value
            fault = "" if drop <= self.max_drop else f"the metric drops by {drop:.4g}, more than {self.max_drop:g}"
            return Score(worst, agreement, counted, value, fault)
        least = LEAST_SNR_OTHER if agreement is None else LEAST_SNR
        fault = "" if worst >= least else f"SNR {worst:.3g} dB, below {least:g}"
        if agreement is not None and agreement < AGREEMENT:
            fault = f"top-1 agreement {agreement:.2%} on {counted} images, below {AGREEMENT:.0%}"
        return Score(worst, agreement, counted, None, fault)

    def _agreement(self, gots: Sequence[Sequence[Tensor]]) -> tuple[float | None, int]:
        want, got = (torch.cat([batch[0] for batch in all_]).double() for all_ in (self.wants, gots))
        counted = self._counted(want)
        count = int(counted.sum())
        if not count:
            return None, 0
        same = want.argmax(1) == got.argmax(1)
        return float(same[counted].double().mean()), count

    @staticmethod
    def _counted(logits: Tensor) -> Tensor:
        """Mark the images whose margin exceeds noise: bool [N]."""
        first, second = logits.double().topk(2, 1).values.unbind(1)  # [N] each
        return first - second > 2 * NOISE * logits.double().std(1)


def checked_metric(value: Any) -> float:
    """The caller's metric as a number.

    Raises:
        TypeError: it is none.
        ValueError: it is NaN.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not hasattr(value, "__float__"):  # NumPy's numbers have it
        raise TypeError(f"gate: returned {type(value).__name__}, expected a number: the higher, the better")
    number = float(value)
    if math.isnan(number):
        raise ValueError("gate: returned NaN, expected a number: the higher, the better")
    return number


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


# ---- moving layers back ----------------------------------------------------------------------------------------------


@dataclass
class Settled(Generic[Network]):
    """The network that passed, or none.

    Attributes:
        network: None where no choice of layers passes.
        back: the layers that went back, the most damaging first.
        score: of the network; of the one with every layer quantized where there is none.
        first: of the network with every layer quantized.
        damage: by layer, the SNR in dB of the network's output with that layer alone quantized; empty where the first
            network passed.
    """

    network: Network | None
    back: list[int]
    score: Score
    first: Score
    damage: dict[int, float]


def settle(
    layers: Sequence[int],
    make: Callable[[Sequence[int]], Network],
    score: Callable[[Network], Score],
    damage: Callable[[int], float],
) -> Settled[Network]:
    """The network with the fewest layers in floating point that passes.

    Args:
        layers: what may go back.
        make: the network with these layers in floating point.
        score: the gate.
        damage: the SNR in dB of the output with one layer alone quantized.
    """
    network = make([])
    first = score(network)
    if first.holds or not layers:
        return Settled(network if first.holds else None, [], first, first, {})
    found = {layer: damage(layer) for layer in layers}
    order = sorted(layers, key=lambda layer: found[layer])

    tried: dict[int, tuple[Network, Score]] = {}

    def passes(count: int) -> bool:
        made = make(order[:count])
        tried[count] = made, score(made)
        return tried[count][1].holds

    low, high = 0, 1  # the fewest that pass are in (low, high]
    while high < len(order) and not passes(high):
        low, high = high, min(2 * high, len(order))
    if high == len(order):  # no layer would be left on integers
        high = len(order) - 1
        if high <= low or not (high in tried and tried[high][1].holds or passes(high)):
            return Settled(None, order, first, first, found)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    network, verdict = tried[high]
    return Settled(network, order[:high], verdict, first, found)
