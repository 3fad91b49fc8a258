"""The plan of a frozen network: what tuning chose, and a file keeps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Plan:
    """The way in which a frozen network runs.

    Attributes:
        channels_last: the memory layout of 4-dimensional inputs and weights; else NCHW.
        images_at_a_time: larger batches run in parts of so many images; None: whole.
        winograd: the largest side of Winograd's tiles: 0, 2 or 4; 0: products are direct.
        max_weights: bytes that packed and transformed weights may take beside the weights; None: no bound of its own.
        differentiable: inputs that require a gradient get one.
        choices: the way to run a step, by the key of its choice, where it is not the default (`fastres._dispatch`).
    """

    channels_last: bool = False
    images_at_a_time: int | None = None
    winograd: int = 2
    max_weights: int | None = None
    differentiable: bool = False
    choices: dict[str, str] = field(default_factory=dict)
