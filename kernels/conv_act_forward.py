"""Forward kernel of conv_act: a convolution as an implicit GEMM. The formula is in conv_act.py.

    rows     output pixels  m = (n, p, q)            BLOCK_M a program
    columns  output channels k of one group          BLOCK_N a program
    depth    taps and input channels (r, s, c)       BLOCK_K an iteration

The matrix of shifted inputs is never built: every iteration loads the tile of it that it multiplies, from pixels
shifted by one tap, with zeros outside the image. Taps vary fastest: nine iterations of a 3x3 read the same channels of
almost the same pixels, which the L2 cache holds. With fewer channels than a dot needs (16), (r, s, c) is one axis
(FLAT): a 7x7 of 3 channels has a depth of 147, and not of 49 times 16.

Offsets of rows and columns are int64, tile by tile and lane by lane: a tile may reach into the next image, and that may
be 2^31 elements away. Row and tap arithmetic (h, w) is int32.
"""

import triton
import triton.language as tl

from .element import activate


@triton.jit
def output_tile(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """-> tile of pixels, tile of channels, group. GROUP_M tiles of pixels meet all tiles of channels before the next
    GROUP_M do, so that the programs running at any time share both their inputs and their weights in the L2 cache."""
    tiles = tiles_m * tiles_n  # below 2^31, as the grid is
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    band = tl.minimum(tiles_m, GROUP_M) * tiles_n
    first = tile // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % band % height, tile % band // height, group


@triton.jit
def output_pixels(tile, pixels, out_height, out_width, BLOCK_M: tl.constexpr):
    """-> m, image (int64 [BLOCK_M]), pixel of the image, its p and q (int32), valid: the output pixels of a tile.

    One int64 division for the tile and 32-bit ones for the lanes; unsigned, because an image may have 2^31 - 1 pixels
    and the tile ends beyond it.
    """
    plane = tl.cast(out_height, tl.uint32) * tl.cast(out_width, tl.uint32)
    first = tl.cast(tile, tl.int64) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    within = (first % plane.to(tl.int64)).to(tl.uint32) + lane.to(tl.uint32)  # [BLOCK_M]
    image = first // plane.to(tl.int64) + (within // plane).to(tl.int64)
    pixel = within % plane
    p = (pixel // tl.cast(out_width, tl.uint32)).to(tl.int32)
    q = (pixel % tl.cast(out_width, tl.uint32)).to(tl.int32)
    return first + lane, image, pixel.to(tl.int32), p, q, lane < pixels - first


@triton.jit
def image_rows(image, h, w, height, width, channels, CHANNELS_LAST: tl.constexpr):
    """-> int64 [BLOCK_M]: the offset of pixel (h, w) of an image, channel 0; h and w may lie outside it."""
    if CHANNELS_LAST:
        offset = ((image * height + h) * width + w) * channels
    else:
        offset = (image * channels * height + h) * width + w
    return offset


@triton.jit
def channel_step(height, width, CHANNELS_LAST: tl.constexpr):
    """-> int64: from one channel of a pixel to the next."""
    return tl.cast(1, tl.int64) if CHANNELS_LAST else tl.cast(height, tl.int64) * width


@triton.jit
def inside(h, w, height, width):
    """0 <= h < height and 0 <= w < width: as unsigned numbers, negative ones are beyond every height."""
    in_height = h.to(tl.uint32) < tl.cast(height, tl.uint32)
    return in_height & (w.to(tl.uint32) < tl.cast(width, tl.uint32))


@triton.jit(
    do_not_specialize=[
        "height", "width", "channel_units", "groups", "pixels", "out_height", "out_width", "out_channel_units",
        "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w",
        "weight_k", "weight_c", "weight_r", "weight_s", "tiles_m", "tiles_n",
    ]
)  # fmt: skip
def conv_act_forward_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [K, C / groups, R, S]
    bias_ptr,  # [K] or None
    residual_ptr,  # [N, K, P, Q], y's strides, or None
    scale_ptr,  # [K] or None
    y_ptr,  # [N, K, P, Q], written
    height,  # H
    width,  # W
    channel_units,  # C / groups / UNIT
    groups,
    pixels,  # N*P*Q
    out_height,  # P
    out_width,  # Q
    out_channel_units,  # K / groups / OUT_UNIT
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    weight_k,  # strides of weight, read unless WEIGHT_LAST
    weight_c,
    weight_r,
    weight_s,
    tiles_m,
    tiles_n,  # of one group
    R: tl.constexpr,
    S: tl.constexpr,
    POINTWISE: tl.constexpr,  # R = S = 1, stride 1, no padding: m is the input pixel too
    FLAT: tl.constexpr,
    X_LAST: tl.constexpr,  # channels_last, else NCHW; so for the next two
    WEIGHT_LAST: tl.constexpr,  # else any strides
    Y_LAST: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    channels = channel_units * UNIT  # of one group, as all that follow
    out_channels = out_channel_units * OUT_UNIT
    tile_m, tile_n, group = output_tile(tiles_m, tiles_n, GROUP_M)
    m, image, pixel, p, q, row_valid = output_pixels(tile_m, pixels, out_height, out_width, BLOCK_M)
    k = tl.cast(tile_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N], in the group
    column_valid = k < out_channels
    out_k = tl.cast(group, tl.int64) * out_channels + k

    all_channels = tl.cast(channels, tl.int64) * groups
    x_step = channel_step(height, width, X_LAST)
    h = p * stride_h - padding_h  # [BLOCK_M]: where the first tap reads
    w = q * stride_w - padding_w
    if POINTWISE and X_LAST:
        x_rows = m * all_channels
    else:
        x_rows = image_rows(image, h, w, height, width, all_channels, X_LAST)
    x_rows += tl.cast(group, tl.int64) * channels * x_step
    if WEIGHT_LAST:
        w_k, w_c, w_r, w_s = tl.cast(R * S, tl.int64) * channels, 1, S * channels, channels
    else:
        w_k, w_c = tl.cast(weight_k, tl.int64), tl.cast(weight_c, tl.int64)
        w_r, w_s = tl.cast(weight_r, tl.int64), tl.cast(weight_s, tl.int64)
    w_columns = out_k * w_k  # [BLOCK_N]

    lane_k = tl.arange(0, BLOCK_K)
    origin = tl.cast(0, tl.int64)
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FLAT:
        for step in range(0, tl.cdiv(R * S * channels, BLOCK_K)):
            depth = step * BLOCK_K + lane_k  # [BLOCK_K]: (r, s, c)
            r, s, c = depth // channels // S, depth // channels % S, depth % channels
            in_depth = depth < R * S * channels
            shift = image_rows(origin, r * dilation_h, s * dilation_w, height, width, all_channels, X_LAST) + c * x_step
            x_valid = inside(
                h[:, None] + (r * dilation_h)[None, :], w[:, None] + (s * dilation_w)[None, :], height, width
            ) & (row_valid[:, None] & in_depth[None, :])  # [BLOCK_M, BLOCK_K]
            x = tl.load(x_ptr + x_rows[:, None] + shift[None, :], x_valid, other=0.0)  # [BLOCK_M, BLOCK_K]
            w_rows = depth if WEIGHT_LAST else r * w_r + s * w_s + c * w_c
            w_valid = in_depth[:, None] & column_valid[None, :]
            weight = tl.load(weight_ptr + w_columns[None, :] + w_rows[:, None], w_valid, other=0.0)
            z = tl.dot(x, weight, z, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    else:
        for step in range(0, tl.cdiv(channels, BLOCK_K) * (R * S)):
            c = step // (R * S) * BLOCK_K + lane_k  # [BLOCK_K]
            r, s = step % (R * S) // S, step % S
            in_depth = c < channels
            shift, x_valid = origin, row_valid
            if not POINTWISE:
                shift = image_rows(origin, r * dilation_h, s * dilation_w, height, width, all_channels, X_LAST)
                x_valid = row_valid & inside(h + r * dilation_h, w + s * dilation_w, height, width)  # [BLOCK_M]
            x_columns = c if X_LAST else c * x_step
            x = tl.load(
                x_ptr + (x_rows + shift)[:, None] + x_columns[None, :], x_valid[:, None] & in_depth[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_K]
            w_rows = (r * w_r + s * w_s) + (c if WEIGHT_LAST else c * w_c)
            w_valid = in_depth[:, None] & column_valid[None, :]
            weight = tl.load(weight_ptr + w_columns[None, :] + w_rows[:, None], w_valid, other=0.0)
            z = tl.dot(x, weight, z, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

    # epilogue: what the convolution's own kernel can do for free, in fp32 and before the one rounding
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + out_k, column_valid, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + out_k, column_valid, other=0.0).to(tl.float32)[None, :]
    all_out_channels = tl.cast(out_channels, tl.int64) * groups
    y_rows = m * all_out_channels if Y_LAST else image * all_out_channels * (out_height * out_width) + pixel
    y_columns = out_k if Y_LAST else out_k * (out_height * out_width)
    local = y_rows[:, None] + y_columns[None, :]  # [BLOCK_M, BLOCK_N]
    valid = row_valid[:, None] & column_valid[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + local, valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + local, activate(z, ACT).to(y_ptr.dtype.element_ty), valid)
