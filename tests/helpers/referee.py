"""The two-level tolerance of one operator's test: at most 2x eager's error in RMS, 4x in maximum, above a floor.

The floor is 4 units in the last place of the same formula evaluated on absolute values: two sound implementations can
differ by it in any order of summation.
"""

import torch

INTERPRETER_DTYPES = (torch.float32, torch.float16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_as_good(ours, eager, exact, magnitude, what=""):
    """`exact`: fp64; `magnitude`: the formula on absolute values, fp64, broadcastable to `exact`."""
    assert ours.shape == exact.shape == eager.shape, f"{what}: {ours.shape} {eager.shape} {exact.shape}"
    assert ours.dtype == eager.dtype, f"{what}: {ours.dtype}, eager {eager.dtype}"
    if not exact.numel():
        return
    floor = 4 * torch.finfo(ours.dtype).eps * magnitude.expand_as(exact)
    error, eager_error = (ours.double() - exact).abs(), (eager.double() - exact).abs()
    assert error.isfinite().all(), f"{what}: not finite"
    worst = (error - floor).amax() - 4 * eager_error.amax()
    assert worst <= 0, f"{what}: max error {error.amax():.3e}, eager {eager_error.amax():.3e}, floor {floor.amax():.3e}"
    rms, eager_rms, floor_rms = (t.square().mean().sqrt() for t in (error, eager_error, floor))
    assert rms <= 2 * eager_rms + floor_rms, f"{what}: RMS error {rms:.3e}, eager {eager_rms:.3e}"


def layout(x, kind):
    """`x`'s values in another layout: nchw, channels_last, every second channel, transposed, offset by one element."""
    if kind == "nchw":
        return x.contiguous()
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "every_second":
        wide = x.new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])
        wide[:, ::2] = x
        return wide[:, ::2]
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "offset":
        flat = x.new_zeros(x.numel() + 1)
        view = flat[1:].view(x.shape)
        view.copy_(x)
        return view
    raise ValueError(kind)


LAYOUTS = ("nchw", "channels_last", "every_second", "transposed", "offset")
