"""int8's calibration: the ways to give images, what is refused before anything runs, ranges of nothing."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres.inference.calibration import MOST, read_images
from fastres.inference.gate import snr
from freeze_cases import cifar
from int8_cases import HOSTILE, frozen_int8, images


@pytest.fixture(scope="module")
def net():
    return cifar()


@pytest.fixture(scope="module")
def frozen(net):
    return frozen_int8(net, images(32))


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["tensor", "list", "single images", "loader", "labels", "mapping", "generator"])
def test_calibration_images_come_in_many_ways(given, net):
    x = images(12)
    dataset = torch.utils.data.TensorDataset(x, torch.zeros(12))
    calibrate = {
        "tensor": x,
        "list": [x[:5], x[5:]],
        "single images": list(x),
        "loader": torch.utils.data.DataLoader(dataset, batch_size=5),
        "labels": [(x[:7], torch.zeros(7)), (x[7:], torch.zeros(5))],
        "mapping": [{"pixel_values": x, "labels": torch.zeros(12)}],
        "generator": (part for part in x.split(4)),
    }[given]
    assert torch.equal(torch.cat(read_images(calibrate, x[:1])), x)


def test_at_most_so_many_images_are_read():
    def endless():
        while True:
            yield torch.zeros(100, 1, 2, 2)

    assert sum(map(len, read_images(endless(), torch.zeros(1, 1, 2, 2)))) == MOST


NAN = images(4)
NAN[2, 1, 3, 3] = float("nan")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, r"calibrate: got None, expected images like the example's, float32 \[2, 3, 16, 16\]"),
        ({"calibrate": []}, ValueError, "calibrate: got no image"),
        ({"calibrate": images(0)}, ValueError, "calibrate: got no image"),
        ({"calibrate": 5}, TypeError, "calibrate: got int, expected a tensor of images"),
        ({"calibrate": "folder"}, TypeError, "calibrate: got str"),
        ({"calibrate": [3, 4]}, TypeError, "calibrate: batch 0: got int"),
        ({"calibrate": images(4).to(torch.uint8)}, TypeError, "calibrate: got torch.uint8, expected floating images"),
        ({"calibrate": NAN}, ValueError, "calibrate: got NaN or infinity, expected finite images"),
        ({"calibrate": [images(4), NAN / 0]}, ValueError, "calibrate: batch 1: got NaN or infinity"),
        ({"calibrate": images(4, channels=1)}, ValueError, r"calibrate: got float32 \[4, 1, 16, 16\]"),
        ({"calibrate": torch.randn(4, 3)}, ValueError, r"calibrate: got float32 \[4, 3\]"),
        ({"calibrate": images(4), "gate": 3}, TypeError, "gate: got int"),
        ({"calibrate": images(4), "max_drop": "1"}, TypeError, "max_drop: got str"),
        ({"calibrate": images(4), "max_drop": -1}, ValueError, "max_drop: got -1"),
        ({"calibrate": images(4), "observer": "max"}, ValueError, "observer: got 'max', expected 'minmax'"),
        ({"calibrate": images(4), "differentiable": True}, ValueError, "differentiable: got True"),
        ({"calibrate": images(4), "dtype": "fp32"}, ValueError, "calibrate: got Tensor with dtype='fp32'"),
        ({"gate": float, "dtype": None}, ValueError, "gate: got type with dtype=None, expected dtype='int8'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(given, error, words, net, monkeypatch):
    monkeypatch.setattr(import_module("fastres.inference.freeze"), "_capture", None)  # what would be called next
    with pytest.raises(error, match=words):
        fastres.freeze(net, images(2), **{"dtype": "int8", **given})


def test_a_network_that_int8_is_not_for(net, frozen):
    class NoGraph(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ValueError, match="no graph|has none"):
        frozen_int8(NoGraph().eval(), images(4))
    with pytest.raises(TypeError, match="model: got a FrozenModel"):
        frozen_int8(frozen, images(4))
    with pytest.raises(TypeError, match="quantized"):
        frozen_int8(nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 3)), images(4))
    with pytest.raises(ValueError, match="example_inputs: got .* expected one tensor of images"):
        fastres.freeze(net, (images(2), images(2)), dtype="int8", calibrate=images(4))
    with pytest.raises(ValueError, match="calibrate"):
        fastres.freeze(
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 4)).eval(),
            images(2),
            dtype="int8",
            calibrate=images(4, size=8),
        )


def test_a_network_without_layers_stays_in_float(net):
    frozen = frozen_int8(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)).eval(), images(20))
    assert not frozen.is_quantized and torch.equal(frozen(images(2)), F.max_pool2d(F.relu(images(2)), 2))


@pytest.mark.parametrize("value", [0.0, 1e-35, 1e30])
def test_constant_images_and_ranges_of_nothing(value, net):
    given = torch.full((4, 3, 16, 16), value)
    frozen = frozen_int8(net, given, **HOSTILE)
    assert torch.isfinite(frozen(images(2))).all()
    assert snr(net(given), frozen(given)) > 10 or torch.allclose(
        net(given), frozen(given), atol=0.05 * float(net(given).abs().max())
    )


def test_zero_weights():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
        net[2].weight[1] = 1e-38
    frozen = frozen_int8(net, images(16), **HOSTILE)
    torch.testing.assert_close(frozen(images(2)), net(images(2)), rtol=1e-3, atol=1e-3)
