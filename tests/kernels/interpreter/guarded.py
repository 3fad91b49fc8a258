"""For the interpreter lanes: tensors between guard bands and small tiles.

The interpreter neither faults nor complains out of bounds, so every tensor lies between two bands of one particular
NaN: a read outside shows in the result, a write outside changes the band. Inputs have another NaN than outputs, because
a NaN that is read out of bounds and written out of bounds keeps its payload.
"""

import torch
from fastres.kernels import configs

GUARD = 2048  # elements on either side: more than a tile with its strides reaches in these tests
BITS = {torch.float32: torch.int32, torch.float16: torch.int16}
INPUT_NAN = {torch.float32: 0x7FC0BEEF, torch.float16: 0x7E55}
OUTPUT_NAN = {torch.float32: 0x7FC0FACE, torch.float16: 0x7E33}
EPS32 = torch.finfo(torch.float32).eps


class Arena:
    """Makes guarded tensors; `check()` asserts that every band and every input is as it was."""

    def __init__(self):
        self.buffers, self.inputs = [], []

    def _place(self, shape, dtype, order, offset, nan):
        """order: channels_last or not, or the dimensions as they lie in memory, the outermost first."""
        numel = torch.Size(shape).numel()
        raw = torch.full((2 * GUARD + numel + offset,), nan, dtype=BITS[dtype])
        start = GUARD + offset  # an odd offset misaligns the tensor
        self.buffers.append((raw, start, start + numel, nan))
        flat = raw.view(dtype)[start : start + numel]
        if order is True:
            order = (0, 2, 3, 1)
        if not order:
            return flat.view(shape)
        return flat.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])

    def input(self, values, channels_last=False, offset=0):
        if values is None:
            return None
        tensor = self._place(values.shape, values.dtype, channels_last, offset, INPUT_NAN[values.dtype])
        tensor.copy_(values)
        self.inputs.append((tensor, tensor.clone()))
        return tensor

    def output(self, shape, dtype, channels_last=False, offset=0):
        # every element is still that NaN: one left unwritten shows
        return self._place(shape, dtype, channels_last, offset, OUTPUT_NAN[dtype])

    def check(self):
        for raw, start, stop, nan in self.buffers:
            assert (raw[:start] == nan).all(), "written before the beginning"
            assert (raw[stop:] == nan).all(), "written past the end"
        for tensor, before in self.inputs:
            bits = BITS[tensor.dtype]
            flat = [t.permute(0, 2, 3, 1).contiguous() if t.dim() == 4 else t for t in (tensor, before)]
            assert torch.equal(flat[0].view(bits), flat[1].view(bits)), "an input was changed"


def small_tiles(monkeypatch, tile=128, line=8, programs=9):
    """Tiles so small that tiny tensors need several programs on each axis. The interpreter takes some 20 ms a program,
    however small: tests choose shapes of few programs."""

    def config(kernel, arch, shape_class):
        if "merge" in kernel:
            return configs.Config(tile=32, num_warps=4, line=8)
        return configs.Config(tile=tile, num_warps=4, line=line, programs=programs)

    monkeypatch.setattr(configs, "config", config)


def small_gemm_tiles(monkeypatch, block_m=16, block_n=16, block_k=16, group_m=2):
    """The same for implicit GEMMs."""
    entry = configs.GemmConfig(block_m, block_n, block_k, num_warps=4, num_stages=3, group_m=group_m)
    monkeypatch.setattr(configs, "config", lambda kernel, arch, shape_class: entry)


def assert_close64(ours, exact, magnitude, what):
    """Half an ulp for the one rounding to the tensor's dtype, and 6 ulp of fp32 of the terms for the arithmetic."""
    error = (ours.double() - exact).abs()
    rounding = 0.51 * torch.finfo(ours.dtype).eps * exact.abs() if ours.dtype != torch.float32 else 0.0
    tiny = 0.5 * torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps  # fp16's subnormals
    bound = rounding + 6 * EPS32 * magnitude + (tiny if ours.dtype != torch.float32 else 0.0)
    worst = (error - bound).amax()
    assert error.isfinite().all() and worst <= 0, f"{what}: error {error.amax():.3e}, {worst:.3e} above its bound"
