"""The convolutions and activations of ResNet-18 and ResNet-50 at 224x224, shared by benchmarks and tests.

A row of CONVS is one unique convolution and the role of its output once BN is folded in. Every convolution is followed
by one batch normalization, so ACTIVATIONS follows from CONVS: one row for each unique (channels, height, width, role).

    inner        act(bn(conv(x)))                  the stem and every convolution of a block except its last
    block end    relu(bn(conv(x)) + residual)      the last convolution of a block
    projection   bn(conv(x))                       on the shortcut, where a block changes the shape
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

BATCH = 8
INNER, BLOCK_END, PROJECTION = "inner", "block end", "projection"
ROLES = (INNER, BLOCK_END, PROJECTION)


@dataclass(frozen=True)
class Conv:
    """One unique convolution: [N, inputs, size, size] -> [N, outputs, out, out], padded by kernel // 2."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int  # height and width of the input
    role: str
    resnet18: int  # how many a ResNet-18 has
    resnet50: int

    @property
    def id(self) -> str:
        role = {INNER: "relu", BLOCK_END: "residual-relu", PROJECTION: "none"}[self.role]
        return f"{self.kernel}x{self.kernel}s{self.stride}-{self.inputs}-{self.outputs}-at{self.size}-{role}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def residual(self) -> bool:
        return self.role == BLOCK_END

    @property
    def act(self) -> str:
        return "none" if self.role == PROJECTION else "relu"

    @property
    def counts(self) -> dict[str, int]:
        return {"resnet18": self.resnet18, "resnet50": self.resnet50}


CONVS = (
    Conv(3, 64, 7, 2, 224, INNER, 1, 1),  # the stem
    Conv(64, 64, 1, 1, 56, INNER, 0, 1),
    Conv(64, 64, 3, 1, 56, INNER, 2, 3),
    Conv(64, 64, 3, 1, 56, BLOCK_END, 2, 0),
    Conv(64, 128, 1, 2, 56, PROJECTION, 1, 0),
    Conv(64, 128, 3, 2, 56, INNER, 1, 0),
    Conv(64, 256, 1, 1, 56, PROJECTION, 0, 1),
    Conv(64, 256, 1, 1, 56, BLOCK_END, 0, 3),
    Conv(128, 128, 3, 2, 56, INNER, 0, 1),
    Conv(256, 64, 1, 1, 56, INNER, 0, 2),
    Conv(256, 128, 1, 1, 56, INNER, 0, 1),
    Conv(256, 512, 1, 2, 56, PROJECTION, 0, 1),
    Conv(128, 128, 3, 1, 28, INNER, 1, 3),
    Conv(128, 128, 3, 1, 28, BLOCK_END, 2, 0),
    Conv(128, 256, 1, 2, 28, PROJECTION, 1, 0),
    Conv(128, 256, 3, 2, 28, INNER, 1, 0),
    Conv(128, 512, 1, 1, 28, BLOCK_END, 0, 4),
    Conv(256, 256, 3, 2, 28, INNER, 0, 1),
    Conv(512, 128, 1, 1, 28, INNER, 0, 3),
    Conv(512, 256, 1, 1, 28, INNER, 0, 1),
    Conv(512, 1024, 1, 2, 28, PROJECTION, 0, 1),
    Conv(256, 256, 3, 1, 14, INNER, 1, 5),
    Conv(256, 256, 3, 1, 14, BLOCK_END, 2, 0),
    Conv(256, 512, 1, 2, 14, PROJECTION, 1, 0),
    Conv(256, 512, 3, 2, 14, INNER, 1, 0),
    Conv(256, 1024, 1, 1, 14, BLOCK_END, 0, 6),
    Conv(512, 512, 3, 2, 14, INNER, 0, 1),
    Conv(1024, 256, 1, 1, 14, INNER, 0, 5),
    Conv(1024, 512, 1, 1, 14, INNER, 0, 1),
    Conv(1024, 2048, 1, 2, 14, PROJECTION, 0, 1),
    Conv(512, 512, 3, 1, 7, INNER, 1, 2),
    Conv(512, 512, 3, 1, 7, BLOCK_END, 2, 0),
    Conv(512, 2048, 1, 1, 7, BLOCK_END, 0, 3),
    Conv(2048, 512, 1, 1, 7, INNER, 0, 2),
)


@dataclass(frozen=True)
class Activation:
    """One unique activation: [batch, channels, height, width]."""

    channels: int
    height: int
    width: int
    role: str
    resnet18: int  # how many a ResNet-18 has
    resnet50: int

    @property
    def size(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    @property
    def counts(self) -> dict[str, int]:
        return {"resnet18": self.resnet18, "resnet50": self.resnet50}

    def shape(self, batch: int = BATCH) -> tuple[int, int, int, int]:
        return batch, self.channels, self.height, self.width


def _activations() -> tuple[Activation, ...]:
    """The outputs of CONVS, by role, the largest images first."""
    found: dict[tuple[int, int, int], list[Conv]] = defaultdict(list)
    for c in CONVS:
        found[ROLES.index(c.role), -c.out, c.outputs].append(c)
    return tuple(
        Activation(channels, -size, -size, ROLES[role], sum(c.resnet18 for c in same), sum(c.resnet50 for c in same))
        for (role, size, channels), same in sorted(found.items())
    )


ACTIVATIONS = _activations()


def with_role(role: str) -> tuple[Activation, ...]:
    """The activations of one role, the largest images first."""
    return tuple(a for a in ACTIVATIONS if a.role == role)


def distinct() -> tuple[Activation, ...]:
    """One activation for each (channels, height, width): the block end where there is one, else the inner one."""
    ends = with_role(BLOCK_END)
    sizes = {a.size for a in ends}
    return ends + tuple(a for a in with_role(INNER) if a.size not in sizes)
