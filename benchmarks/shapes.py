"""The activations that ResNet-18 and ResNet-50 normalise at 224x224: one table, shared by benchmarks and tests.

A row is one unique (channels, height, width, role); its counts say how many batch normalisations of a network see it.

    inner        act(bn(conv(x)))                  the stem's and a block's first ones, all but its last
    block end    relu(bn(conv(x)) + residual)      a block's last one
    projection   bn(conv(x))                       on the shortcut, where the block changes the shape
"""

from __future__ import annotations

from dataclasses import dataclass

BATCH = 8
INNER, BLOCK_END, PROJECTION = "inner", "block end", "projection"


@dataclass(frozen=True)
class Activation:
    """One unique activation: its shape is [batch, channels, height, width]."""

    channels: int
    height: int
    width: int
    role: str
    resnet18: int  # how many there are in a ResNet-18
    resnet50: int

    @property
    def size(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    @property
    def counts(self) -> dict[str, int]:
        return {"resnet18": self.resnet18, "resnet50": self.resnet50}

    def shape(self, batch: int = BATCH) -> tuple[int, int, int, int]:
        return batch, self.channels, self.height, self.width


ACTIVATIONS = (
    Activation(64, 112, 112, INNER, 1, 1),  # the stem
    Activation(64, 56, 56, INNER, 2, 6),
    Activation(128, 56, 56, INNER, 0, 1),
    Activation(128, 28, 28, INNER, 2, 7),
    Activation(256, 28, 28, INNER, 0, 1),
    Activation(256, 14, 14, INNER, 2, 11),
    Activation(512, 14, 14, INNER, 0, 1),
    Activation(512, 7, 7, INNER, 2, 5),
    Activation(64, 56, 56, BLOCK_END, 2, 0),
    Activation(256, 56, 56, BLOCK_END, 0, 3),
    Activation(128, 28, 28, BLOCK_END, 2, 0),
    Activation(512, 28, 28, BLOCK_END, 0, 4),
    Activation(256, 14, 14, BLOCK_END, 2, 0),
    Activation(1024, 14, 14, BLOCK_END, 0, 6),
    Activation(512, 7, 7, BLOCK_END, 2, 0),
    Activation(2048, 7, 7, BLOCK_END, 0, 3),
    Activation(256, 56, 56, PROJECTION, 0, 1),
    Activation(128, 28, 28, PROJECTION, 1, 0),
    Activation(512, 28, 28, PROJECTION, 0, 1),
    Activation(256, 14, 14, PROJECTION, 1, 0),
    Activation(1024, 14, 14, PROJECTION, 0, 1),
    Activation(512, 7, 7, PROJECTION, 1, 0),
    Activation(2048, 7, 7, PROJECTION, 0, 1),
)


def with_role(role: str) -> tuple[Activation, ...]:
    """The rows of one role, largest activation first."""
    return tuple(a for a in ACTIVATIONS if a.role == role)


def distinct() -> tuple[Activation, ...]:
    """One row for each (channels, height, width): its block end where a network has one there, else its inner one."""
    ends = with_role(BLOCK_END)
    sizes = {a.size for a in ends}
    return ends + tuple(a for a in with_role(INNER) if a.size not in sizes)
