"""The activations and convolutions of ResNet-18 and ResNet-50 at 224x224: two tables, shared by benchmarks and tests.

A row of ACTIVATIONS is one unique (channels, height, width, role); its counts say how many batch normalisations of a
network see it. A row of CONVS is one unique convolution with what follows it once BN is folded in.

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


@dataclass(frozen=True)
class Conv:
    """One unique convolution: [N, inputs, size, size] -> [N, outputs, out, out], with kernel // 2 of padding."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int  # height and width of the input
    role: str
    resnet18: int  # how many there are in a ResNet-18
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


def with_role(role: str) -> tuple[Activation, ...]:
    """The rows of one role, largest activation first."""
    return tuple(a for a in ACTIVATIONS if a.role == role)


def distinct() -> tuple[Activation, ...]:
    """One row for each (channels, height, width): its block end where a network has one there, else its inner one."""
    ends = with_role(BLOCK_END)
    sizes = {a.size for a in ends}
    return ends + tuple(a for a in with_role(INNER) if a.size not in sizes)
