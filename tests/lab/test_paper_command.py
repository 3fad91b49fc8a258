"""`fastres paper`: the list, an experiment end to end with its files, stopped and called again, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from cli_cases import FASTRES, one_line, started  # noqa: E402
from fastres import cli  # noqa: E402
from fastres.lab.paper.registry import EXPERIMENTS  # noqa: E402


def shown(capsys, *arguments: str) -> str:
    assert cli.main(["paper", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_list_has_experiments_numbers_and_costs(capsys):
    text = " ".join(shown(capsys, "--list").split())
    for experiment in EXPERIMENTS.values():
        assert f"{experiment.number} {experiment.name}: {experiment.title} ({experiment.source})" in text
    for number in (
        "Table 6: resnet110 A, single view: 6.43 % (best of 5 runs; 6.61 +- 0.16)",
        "Table 3: resnet34 C, 10-crop: 24.19 / 7.40 %",
        "Table 4: resnet152 B, multi-scale: 19.38 / 4.49 %",
        "Table 2: plain18, 10-crop: 27.94 %",
    ):
        assert number in text
    assert re.search("--preset digits: about [0-9]+ min on two CPU cores", text)
    assert re.search("--preset cifar10: about [0-9]+ h on one GPU", text)


def test_experiment_end_to_end_and_again(capsys, tmp_path):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    arguments = ("skips", "--preset", "ci", "--out", str(tmp_path), "--device", "cpu", "--workers", "1")
    first = shown(capsys, *arguments)
    assert "What a shortcut skips" in first and "8 of 8 runs" in first
    for ending in ("json", "md", "png"):
        assert str(tmp_path / f"paper-skips-ci.{ending}") in first
    data = json.loads((tmp_path / "paper-skips-ci.json").read_text())
    assert data["environment"]["command"].startswith("fastres paper skips --preset ci")
    assert data["environment"]["versions"]["torch"]
    start = time.monotonic()
    again = shown(capsys, *arguments)  # every run is there: nothing is trained
    assert time.monotonic() - start < 20 and "runs;" not in again
    assert json.loads((tmp_path / "paper-skips-ci.json").read_text())["tables"] == data["tables"]
    assert str(tmp_path / "report.html") in shown(capsys, "report", "--out", str(tmp_path), "--format", "html")
    assert shown(capsys, "report", "--out", str(tmp_path)).strip() == str(tmp_path / "report.md")
    assert "over one layer" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "experiment: got none, expected degradation, shortcuts"),
        (("degradations",), "experiment: got 'degradations', expected degradation"),
        (("depth", "--preset", "cifar100"), "preset: got 'cifar100', expected ci, digits, cifar10"),
        (("depth", "--device", "tpu"), "device: got 'tpu'"),
        (("depth", "--preset", "cifar10", "--workers", "1"), "data root: got none"),
        (("report", "--out", "/nonexistent"), "out: got /nonexistent, without results"),
        (("imagenet",), "network: got none, expected --network resnet50 --weights FILE"),
        (("imagenet", "--network", "resnet50"), "weights: got none"),
        (("imagenet", "--network", "resnet50", "--weights", "x", "--views", "2-crop"), "views: got 2-crop"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, arguments, message):
    if "--out" not in arguments:
        arguments = (*arguments, "--out", str(tmp_path))
    arguments = (*arguments, *(() if "--device" in arguments else ("--device", "cpu")))
    if "cifar10" in arguments:  # found out by the first run, after the title
        assert cli.main(["paper", *arguments]) == 2
        assert message in capsys.readouterr().err
    else:
        assert cli.main(["paper", *arguments]) == 2 and message in one_line(capsys)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the tests lie outside a source tree")
def test_the_page_runs_and_names_what_there_is():
    text = PAGE.read_text()
    scope = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, str(PAGE), "exec"), scope)
    assert len(scope["stds"]) == 19
    for name in EXPERIMENTS:
        assert f"`fastres paper {name}" in text
    for path in set(re.findall(r"`((?:fastres|tests|docs)/[\w/]+\.\w+)", text)):
        assert (PAGE.parent.parent / path).is_file(), path


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_no_process_and_goes_on(tmp_path, number):
    """One signal to the whole group, as a terminal's Ctrl-C."""
    pytest.importorskip("sklearn")
    command = [*FASTRES, "paper", "degradation", "--preset", "digits", "--device", "cpu", "--workers", "2"]
    with started([*command, "--out", str(tmp_path)], start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(
            log.read_text().count("\n") > 1 for log in tmp_path.glob("runs/*/log.csv")
        ):
            time.sleep(0.5)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -number), err
    assert "Traceback" not in err, err
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _alive(process.pid):
        time.sleep(0.5)
    assert not _alive(process.pid)
    # a signal that comes before a worker's first iteration leaves no checkpoint of it
    assert list(tmp_path.glob("runs/*/checkpoint.pt")) and not list(tmp_path.glob("runs/*/result.json"))


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
