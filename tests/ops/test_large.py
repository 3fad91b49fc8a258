"""Row 1: more than 2^31 elements. One fp16 tensor of 4 GB is written, the inputs are untouched zero pages."""

import pytest
import torch

from fastres.functional import add_relu, bn_act

pytestmark = pytest.mark.full
ELEMENTS = 2**31 + 4096


def zeros_but_the_ends() -> torch.Tensor:
    x = torch.zeros(ELEMENTS // 4096, 64, 8, 8, dtype=torch.float16)
    x.view(-1)[0] = x.view(-1)[-1] = 3
    return x


def assert_only_the_ends(y, ends, middle):
    flat = y.view(-1)
    assert flat[0] == ends and flat[-1] == ends
    # by chunks: a comparison of the whole would allocate 2 GB more
    wrong = sum(int((part != middle).sum()) for part in flat[1:-1].split(2**26))
    assert wrong == 0


def test_row1_add_relu_beyond_int32():
    x = zeros_but_the_ends()
    assert_only_the_ends(add_relu(x, x), 6, 0)


def test_row1_bn_act_eval_beyond_int32():
    x = zeros_but_the_ends()
    y = bn_act(x, torch.zeros(64), torch.full((64,), 0.75), bias=torch.ones(64), eps=0.25)
    assert_only_the_ends(y, 4, 1)
