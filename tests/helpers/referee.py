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


# ---- bn_act in fp64 --------------------------------------------------------------------------------------------------


def per_channel(vector):
    return vector.double().view(1, -1, 1, 1)


def statistics64(x):
    return x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)


def forward64(x, weight, bias, residual, mean, var, eps, act):
    """-> y and the sum of the absolute values of its terms, in fp64."""
    x_hat = (x.double() - per_channel(mean)) / (per_channel(var) + eps).sqrt()
    z = x_hat if weight is None else x_hat * per_channel(weight)
    magnitude = z.abs()
    for term in (None if bias is None else per_channel(bias), None if residual is None else residual.double()):
        if term is not None:
            z, magnitude = z + term, magnitude + term.abs()
    return torch.where(z < 0, 0.0, z) if act == "relu" else z, magnitude


def backward64(dy, x, y, weight, mean, var, training, eps, act):
    """-> {name: (gradient, sum of the absolute values of its terms)}, in fp64."""
    rstd = 1 / (per_channel(var) + eps).sqrt()
    x_hat = (x.double() - per_channel(mean)) * rstd
    g = torch.where(y.double() <= 0, 0.0, dy.double()) if act == "relu" else dy.double()
    scale = rstd if weight is None else rstd * per_channel(weight)
    axes, n = (0, 2, 3), x.numel() // x.shape[1]
    dbias, dweight = g.sum(axes), (g * x_hat).sum(axes)
    dbias_magnitude, dweight_magnitude = g.abs().sum(axes), (g * x_hat).abs().sum(axes)
    dx, dx_magnitude = scale * g, (scale * g).abs()
    if training:
        dx = scale * (g - per_channel(dbias) / n - x_hat * per_channel(dweight) / n)
        spread = per_channel(dbias_magnitude) / n + x_hat.abs() * per_channel(dweight_magnitude) / n
        dx_magnitude = dx_magnitude + scale.abs() * spread
    return {
        "dx": (dx, dx_magnitude),
        "dweight": (dweight, dweight_magnitude),
        "dbias": (dbias, dbias_magnitude),
        "dresidual": (g, torch.zeros_like(g)),  # moved, never computed: exact
    }
