"""The training loops of examples/: blocks are swapped, the loss falls, the state_dict is a stock model's.

Its services: tests/predict/test_serving.py.
"""

import importlib
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not here", allow_module_level=True)
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
FILES = sorted(EXAMPLES.glob("train_*.py"))


@pytest.fixture
def example(monkeypatch):
    """`example("train_plain")` imports the file; the packages it needs must be there."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name, *packages):
        for package in packages:
            pytest.importorskip(package)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def fell(losses, last=4):
    return all(map(math.isfinite, losses)) and statistics.fmean(losses[-last:]) < 0.8 * losses[0]


def is_stock_resnet18(state, blocks):
    stock = torchvision.models.resnet18(num_classes=10)
    assert not stock.load_state_dict(state).missing_keys
    assert blocks == 12  # the stem, eight residual blocks, three projections
    assert int(stock.bn1.num_batches_tracked) > 0 and stock.bn1.running_mean.abs().max() > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_says_how_it_is_run(path):
    text = path.read_text()
    head = compile(text, str(path), "exec").co_consts[0]
    assert path.name in head and len(text.splitlines()) <= 80
    assert text.index("fastres.swap(") < re.search(r"SGD\(|TrainingArguments\(", text).start()


def test_plain(example, capsys):
    model, report, losses = example("train_plain").main(steps=16)
    assert len(losses) == 16 and fell(losses)
    is_stock_resnet18(model.state_dict(), len(report.swapped))
    assert "12 of 12 blocks swapped" in capsys.readouterr().out


@pytest.mark.full  # by default test_swap_training.py has DDP in two processes
def test_ddp(tmp_path):
    """Two processes of torchrun, as a user starts them; DDP itself compares the parameters' shapes."""
    saved = tmp_path / "model.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "train_ddp.py"), "--steps", "8", "--save", str(saved)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = re.search(r"2 processes; (\d+) of (\d+) blocks swapped; loss ([\d.]+) -> ([\d.]+)", ran.stdout)
    assert found, ran.stdout
    swapped, blocks, first, last = (float(group) for group in found.groups())
    assert swapped == blocks and last < first
    is_stock_resnet18(torch.load(saved, weights_only=True), swapped)


@pytest.mark.full
def test_accelerate(example):
    model, report, losses = example("train_accelerate", "accelerate").main(steps=32)
    assert fell(losses)
    is_stock_resnet18(model.state_dict(), len(report.swapped))
    assert int(model.bn1.num_batches_tracked) == 32  # each batch, though two make a step


@pytest.mark.full
def test_trainer(example, tmp_path):
    from transformers import ResNetForImageClassification

    module = example("train_trainer", "transformers", "accelerate")
    model, report, losses = module.main(steps=30, folder=str(tmp_path))
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert len(report.swapped) == len(report.rows) > 0
    stock = ResNetForImageClassification.from_pretrained(tmp_path)
    assert "fastres" not in {type(m).__module__.split(".")[0] for m in stock.modules()}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(stock.state_dict()[name], value.cpu(), rtol=0, atol=0)


@pytest.mark.full
def test_lightning(example):
    model, report, losses = example("train_lightning", "lightning").main(steps=16)
    assert len(losses) == 16 and fell(losses)
    is_stock_resnet18(model.state_dict(), len(report.swapped))
