"""The README's Python runs as it stands: every block, in order, in one namespace."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
if not README.exists():
    pytest.skip("the tests lie outside a source tree", allow_module_level=True)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)


def run(blocks):
    """What the blocks leave behind."""
    for package in ("PIL", "sklearn", "torchvision", "transformers"):
        if any(re.search(rf"^(from|import) .*\b{package}\b", block, re.M) for block in blocks):
            pytest.importorskip(package)
    scope = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    return scope


def test_blocks_import_what_they_use():
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        compile(block, str(README), "exec")
        assert max(map(len, block.splitlines())) <= 120


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


@pytest.mark.full
def test_all_of_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it saves a file
    scope = run(BLOCKS)
    assert scope["logits"].shape == (8, 1000) and scope["fast"].report.verification
    assert "verify: passed" in capsys.readouterr().out
