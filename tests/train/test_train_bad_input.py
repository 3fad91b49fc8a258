"""Bad input to swapped blocks in training: PyTorch's own behavior or a clear error, statistics never half moved.

A stock BatchNorm2d counts a batch before it finds fault with it (`num_batches_tracked` moves, the statistics do not);
a fused one moves nothing. So after an error every BN's buffers are the stock ones, its counter the stock one or less.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres._dispatch import BackendError
from swap_cases import assert_same, projection, step
from train_cases import TOLERANCES, assert_bitwise, block_input, block_twins, every, outcome, run, state, twins, vision


def assert_not_half_moved(block, stock, before):
    """Each BN of the swapped block, after an error: all of its buffers as before, or all as the stock block's now."""
    ours, theirs = state(block), state(stock)
    for name, module in block.named_modules():
        if not isinstance(module, nn.BatchNorm2d):
            continue
        names = [f"{name}.{buffer}" for buffer, _ in module.named_buffers()]
        statistics = [n for n in names if "running" in n]
        unmoved = all(torch.equal(ours[n], before[n]) for n in names)
        moved = all(torch.allclose(ours[n], theirs[n], rtol=1e-5, atol=1e-6, equal_nan=True) for n in names)
        assert unmoved or moved, f"{name}: half moved"
        stock_moved = not all(torch.equal(theirs[n], before[n]) for n in statistics)
        assert moved if stock_moved else unmoved, f"{name}: {'not ' * stock_moved}moved, unlike the stock block's"


def assert_fails_as_stock(block, stock, x, expected=Exception):
    """Both raise, and what has moved in the swapped block is what has moved in the stock one. Returns both errors."""
    before = state(stock)
    ours, theirs = outcome(lambda: block(x)), outcome(lambda: stock(x))
    assert isinstance(theirs, Exception), "the stock block takes it"
    assert isinstance(ours, expected), repr(ours)
    assert_not_half_moved(block, stock, before)
    return ours, theirs


class Raises(nn.Module):
    def forward(self, x):
        raise LookupError("planted")


# ---- batches ---------------------------------------------------------------------------------------------------------


@every("option", "precision", "block")
def test_row4_one_value_per_channel_raises_and_moves_nothing(options, dtype, name):
    block, stock = block_twins(name, dtype, options)
    before = state(block)
    ours, theirs = assert_fails_as_stock(block, stock, block_input(dtype, 1, 1), ValueError)
    assert "more than 1 value per channel when training" in str(ours) and type(theirs) is ValueError
    assert_bitwise(state(block), before)
    assert block.eval()(block_input(dtype, 1, 1)).isfinite().all()


@every("option", "precision")
def test_row4_a_later_norm_that_raises_leaves_the_earlier_ones_moved_as_in_eager(options, dtype):
    """2 x 2 pixels pass bn1; behind the stride of 2 one pixel is left, and bn2 raises."""
    block, stock = twins(lambda: vision.Bottleneck(8, 4, 2, projection(8, 16, 2)), dtype, options)
    before = state(block)
    assert_fails_as_stock(block, stock, block_input(dtype, 1, 2), ValueError)
    now, wanted = state(block), state(stock)
    assert int(now["bn1.num_batches_tracked"]) == 1
    assert_same(*({n: t[n] for n in t if n.startswith("bn1.")} for t in (now, wanted)), TOLERANCES[dtype])
    assert_bitwise(*({n: t[n] for n in t if not n.startswith("bn1.")} for t in (now, before)))


@every("option", "precision", "block")
def test_row3_empty_batch_moves_nothing_and_gives_zero_gradients(options, dtype, name):
    block, stock = block_twins(name, dtype, options)
    before, x = state(block), block_input(dtype, 0)
    found = run(block, x)
    assert found["y"].shape == stock(x).shape and found["y"].dtype is dtype and found["dx"].shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
    assert_bitwise(state(block), before)


@every("option", "precision", "block")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_go_where_eager_sends_them(options, dtype, name, value):
    """One bad pixel in one image: NaN in y, in every gradient and in the statistics exactly where the stock block has
    it. Never a finite number where a NaN belongs: a ReLU that drops NaN would give 0."""
    block, stock = block_twins(name, dtype, options)
    x = block_input(dtype)
    x[1, 3, 2, 2] = value
    ours, theirs = run(block, x), run(stock, x)
    assert theirs["y"].isnan().any()
    for key, wanted in theirs.items():
        assert torch.equal(ours[key].isnan(), wanted.isnan()), key


# ---- inputs that are not activations ---------------------------------------------------------------------------------

BAD = {
    "3 dimensions": lambda x: x[0],
    "5 dimensions": lambda x: x[None],
    "2 dimensions": lambda x: x[0, 0],
    "other channels": lambda x: x[:, :5],
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.cfloat(),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "meta": lambda x: x.to("meta"),
    "a list": lambda x: [x],
    "None": lambda x: None,
    "sparse": lambda x: x.to_sparse(),
}


@every("option", "block")
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("train", [True, False])
def test_row50_bad_x(options, name, kind, train):
    """The stock block's own error where its first convolution raises it; three dimensions and a meta tensor pass that,
    and the operator names what is wrong."""
    block, stock = block_twins(name, torch.float32, options)
    x = BAD[kind](block_input())
    ours, theirs = assert_fails_as_stock(block.train(train), stock.train(train), x)
    if isinstance(ours, ValueError):
        assert kind in ("3 dimensions", "meta") and any(words in str(ours) for words in ("3 dimensions", "device meta"))
    else:
        assert type(ours) is type(theirs) and str(ours)[:60] == str(theirs)[:60]


@every("option")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row20_half_networks_have_eagers_dtypes_and_refuse_float32(options, dtype):
    block, stock = block_twins("basic", torch.float32, options)
    block, stock = block.to(dtype), stock.to(dtype)
    x = block_input(dtype, n=4)
    ours, theirs = step(copy.deepcopy(block), x), step(copy.deepcopy(stock), x)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert_fails_as_stock(block, stock, block_input(torch.float32), RuntimeError)


@every("option")
@pytest.mark.parametrize("bad", ["bn1", "bn2"])
@pytest.mark.parametrize("off", [-1, 1])
def test_row5_a_norm_of_other_channels_raises_where_eager_does(options, bad, off):
    block, stock = block_twins("basic", torch.float32, options)
    for model in (block, stock):
        torch.manual_seed(5)
        setattr(model, bad, nn.BatchNorm2d(8 + off))
    ours, _ = assert_fails_as_stock(block, stock, block_input(), (RuntimeError, ValueError))
    assert f"[{8 + off}]" in str(ours) and "[8]" in str(ours)
    assert int(block.bn1.num_batches_tracked) == (bad == "bn2")


@every("option", "precision")
@pytest.mark.parametrize("train", [True, False])
def test_a_residual_of_the_wrong_shape(options, dtype, train):
    """A stride without its projection: the addition raises in both, after every BN has seen the batch."""
    block, stock = twins(lambda: vision.BasicBlock(8, 8, 2), dtype, options)
    ours, theirs = assert_fails_as_stock(block.train(train), stock.train(train), block_input(dtype), RuntimeError)
    assert type(ours) is type(theirs)
    assert int(block.bn2.num_batches_tracked) == train


@every("option")
@pytest.mark.parametrize("child", ["conv2", "downsample"])
def test_a_child_that_raises_leaves_what_ran_before_it_moved(options, child):
    """The shortcut runs before the last BN here and after it in the stock block: that BN alone is not compared."""
    block, stock = block_twins("bottleneck", torch.float32, options)
    for model in (block, stock):
        setattr(model, child, Raises())
    before, x = state(block), block_input()
    for model in (block, stock):
        with pytest.raises(LookupError, match="planted"):
            model(x)
    now, wanted = state(block), state(stock)
    earlier = [n for n in now if not n.startswith("bn3.")]
    assert_same({n: now[n] for n in earlier}, {n: wanted[n] for n in earlier}, TOLERANCES[torch.float32])
    assert int(block.bn1.num_batches_tracked) == 1
    assert all(torch.equal(now[n], before[n]) for n in now if n.startswith("bn3."))


# ---- backends that refuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "dtype", "cast"),
    [("cpu", torch.float64, None), ("triton", torch.float64, None), ("cuda", torch.float64, None)]
    + [("cuda", torch.float32, cast) for cast in (torch.bfloat16, torch.float16)],
)
def test_a_backend_that_refuses_says_why_and_moves_nothing(named, dtype, cast):
    """float64 is the reference's alone: the block says so at its first BN, before anything has moved."""
    block, _ = twins(lambda: vision.BasicBlock(8, 8), dtype, {"backend": named})
    before = state(block)
    autocast = torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None)
    with autocast, pytest.raises(BackendError, match=f"bn_act: backend '{named}' refuses"):
        block(block_input(dtype))
    assert_bitwise(state(block), before)
    block.fastres_backend = "auto"
    with autocast:
        assert block(block_input(dtype)).dtype is (cast or dtype)


@every("option")
def test_a_broken_forward_is_seen_by_the_buffer_check(options):
    """A BN that has moved where the stock one has not is called out."""
    block, stock = block_twins("basic", torch.float32, options)
    before = state(block)
    F.batch_norm(block_input(), block.bn2.running_mean, block.bn2.running_var, training=True)
    with pytest.raises(AssertionError, match="bn2: half moved"):
        assert_not_half_moved(block, stock, before)
