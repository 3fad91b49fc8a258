"""The Python of the README and of the pages on training, predicting and int8 runs as it stands: every block, in
order, in one namespace."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
if not README.exists():
    pytest.skip("the tests lie outside a source tree", allow_module_level=True)
TRAINING, PREDICT, INT8 = (README.parent / "docs" / f"{name}.md" for name in ("training", "predict", "quantization"))


def python(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


BLOCKS = python(README)


def run(blocks):
    """What the blocks leave behind."""
    for package in ("PIL", "sklearn", "torchvision", "transformers"):
        if any(re.search(rf"^(from|import) .*\b{package}\b", block, re.M) for block in blocks):
            pytest.importorskip(package)
    scope = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "a page", "exec"), scope)
    return scope


def test_blocks_import_what_they_use():
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        compile(block, str(README), "exec")
        assert max(map(len, block.splitlines())) <= 120


@pytest.mark.full
def test_the_pipeline(capsys):
    (block,) = [block for block in BLOCKS if "pipeline(" in block]
    assert len(block.strip().splitlines()) <= 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = run([block])["frozen"]
    out, err = capsys.readouterr()
    assert "not supported" not in out + err
    assert re.fullmatch(r"\[\[\{'label': 'LABEL_\d+', 'score': [\d.e-]+\}\](, .*)?\]\n", out), out
    assert frozen.report.folded == 20 and frozen.report.verification


def test_training(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it saves a file
    scope = run(python(TRAINING))
    assert len(scope["report"].swapped) == 12
    fused, stock = type(scope["ema"].module), type(scope["plain"])
    assert issubclass(fused, stock) and fused is not stock
    assert (tmp_path / "weights.pt").is_file()


def test_predicting(capsys):
    scope = run(python(PREDICT))
    assert len(capsys.readouterr().out.splitlines()) == scope["rows"].total == 2


def test_links():
    """Files that the pages name are there."""
    for page in (README, TRAINING, PREDICT):
        for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text()):
            path = page.parent / link
            assert path.exists() or "benchmarks/results" in link, f"{page.name}: {link}"  # no results in an sdist


@pytest.mark.full
def test_all_of_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it saves a file
    scope = run(BLOCKS)
    assert scope["logits"].shape == (8, 1000) and scope["fast"].report.verification
    assert "verify: passed" in capsys.readouterr().out


@pytest.mark.full
def test_int8(capsys):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    scope = run(python(INT8))
    found = scope["moved"].report.quantization
    assert scope["fast"].report.quantization.counts == {"int8": 20} and found.counts["int8"] >= 17
    assert [layer.name for layer in found.layers if layer.precision != "int8"][0] == "layer2.1.conv2"
    assert "passed: SNR" in capsys.readouterr().out
