"""The command line in odd surroundings: closed or full streams, settings that nothing has, a bench without a choice."""

from __future__ import annotations

import shlex
import subprocess

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("rich")

import fastres  # noqa: E402
from cli_cases import FASTRES, one_line  # noqa: E402
from fastres import cli  # noqa: E402


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("info >&-", 0, ""),
        ("freeze no-such-network >&- 2>&-", 2, ""),
        ("info >/dev/full", 2, "fastres: standard output: No space left on device"),
    ],
)
def test_closed_and_full_streams_are_no_traceback(command, code, said):
    line = f"{shlex.join(FASTRES)} {command}"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == code and done.stderr.startswith(said), done.stderr
    assert done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FASTRES_BACKEND": "xyz"}, "FASTRES_BACKEND: got 'xyz', expected one of ['auto', 'cpu', "),
        ({"FASTRES_BACKEND": "CPU"}, "FASTRES_BACKEND: got 'CPU', expected one of ['auto', 'cpu', "),
        ({"FASTRES_DISABLE": "junk"}, "FASTRES_DISABLE: got 'junk', expected some of ['all', 'cpu', "),
        ({"FASTRES_DISABLE": "cpu, reference,junk"}, "FASTRES_DISABLE: got 'junk', 'reference', expected some of ["),
    ],
    ids=str,
)
def test_settings_that_nothing_has_are_refused_at_first_use(settings, capsys, variables, message):
    settings(**{"FASTRES_BACKEND": None, "FASTRES_DISABLE": None, **variables})
    x, block = torch.randn(2, 3, 4, 4), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    for use in (
        lambda: fastres.functional.bn_act(x, torch.zeros(3), torch.ones(3)),
        lambda: fastres.functional.add_relu(x, x, backend="reference"),
        lambda: fastres.functional.conv_act(x, torch.randn(3, 3, 1, 1)),
        lambda: fastres.nn.BNReLU(3)(x),
        lambda: fastres.explain("bn_act", x),
        lambda: fastres.swap(block),
    ):
        with pytest.raises(ValueError) as raised:
            use()
        assert str(raised.value).startswith(message) and "'triton'" in str(raised.value)
    assert type(block) is nn.Sequential
    assert any(fix.startswith(message) for fix in fastres.info()["fixes"])
    assert cli.main(["train"]) == 2 and one_line(capsys).startswith(f"fastres: {message}")
    settings(FASTRES_BACKEND="auto", FASTRES_DISABLE="ext, all,")
    fastres.functional.add_relu(x, x)


def test_bench_says_what_it_starts(monkeypatch, tmp_path, capsys):
    pytest.importorskip("pytest_benchmark")
    started = []
    monkeypatch.setattr(cli, "_benchmarks", lambda: tmp_path)
    monkeypatch.setattr(cli.subprocess, "run", lambda *a, **k: started.append(a) or subprocess.CompletedProcess(a, 0))
    assert cli.main(["bench"]) == 0 and len(started) == 1
    said = capsys.readouterr().err
    assert all(part in said for part in (str(tmp_path), "15 to 20 minutes", "-k", "--budget tiny"))
    assert cli.main(["bench", "-q"]) == 0 and "minutes" not in capsys.readouterr().err


def test_dir_lists_what_there_is_and_nothing_else():
    names = set(dir(fastres))
    assert {"freeze", "load", "info", "models", "FrozenModel", "swap", "__version__"} <= names
    assert names == set(fastres.__all__) | {"__version__"} and all(hasattr(fastres, name) for name in names)
