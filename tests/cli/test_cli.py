"""The command line: the demo end to end, its files, every refusal as one line, terminals and pipes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from cli_cases import FASTRES, one_line, png_size, started  # noqa: E402
from fastres import cli  # noqa: E402
from fastres.lab import demo, demo_photographs  # noqa: E402
from fastres.lab.terminal import progress  # noqa: E402

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")  # anything but newline
one_demo = pytest.mark.xdist_group("demo")  # one worker runs it


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    env = {**os.environ, "COLUMNS": "80", **kwargs.pop("env", {})}
    return subprocess.run([*FASTRES, *arguments], capture_output=True, text=True, timeout=600, env=env, **kwargs)


# ---- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`fastres demo --quick`, run once: (the finished process, the output folder)."""
    for package in ("sklearn", "torchvision", "matplotlib"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run("demo", "--quick", "--threads", "1", "--device", "cpu", "--out", str(out)), out


@one_demo
def test_demo_quick_runs_end_to_end(quick):
    done, out = quick
    assert done.returncode == 0, done.stderr
    # nothing but a warning that a tiny network froze to something slower, which a busy machine may measure
    assert all(line.startswith("freeze: ") for line in done.stderr.splitlines()), done.stderr
    for part in ("held-out accuracy", "predictions agree", "eager NCHW", "eager channels_last", "swapped"):
        assert part in done.stdout
    assert not CONTROL.search(done.stdout)  # in a pipe: plain and narrow
    assert max(len(line) for line in done.stdout.splitlines() if str(out) not in line) <= 80
    assert f"{out / 'demo.json'}\n" in done.stdout and f"{out / 'demo.png'}\n" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png"]  # no temporary file stays
    width, height = png_size(out / "demo.png")
    assert width >= 1000 and height >= 500


@one_demo
def test_demo_json(quick):
    _, out = quick
    data = json.loads((out / "demo.json").read_text())
    assert data["schema"] == "fastres.demo/1" and data["quick"] is True
    assert data["command"].startswith("fastres demo --quick") and data["threads"] == 1 and data["device"] == "cpu"
    assert data["cpu"]["model"] and data["versions"]["torch"] and "cudnn.allow_tf32" in data["flags"]

    learned = data["digits"]
    assert learned["steps"] == demo.QUICK.iterations and learned["fused_blocks"] == 9
    assert 0 <= learned["accuracy"] <= 1 and learned["held_out"] == 360
    frozen = learned["frozen"]
    assert frozen["rows"] == 360 and frozen["decided"] == frozen["agreed"] > 300 and frozen["margin"] > 0

    table = data["photographs"]
    assert table["swapped_blocks"] >= 16 and table["size"] == 64 and table["batch"] == 2
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["eager NCHW", "eager channels_last", "swapped", "frozen fp32", "frozen bf16"]
    eager = [rows["eager NCHW"], rows["eager channels_last"]]
    assert rows[table["baseline"]]["ms"] == min(row["ms"] for row in eager)
    for name, row in rows.items():
        assert len(row["samples_ms"]) >= 1 and min(row["samples_ms"]) > 0
        assert row["images_per_s"] == pytest.approx(2000 / row["ms"])
        if name == table["baseline"]:
            assert row["ratio_to_eager"] is None
            continue
        ratio = row["ratio_to_eager"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["n"] == len(row["samples_ms"])
    for name in ("swapped", "frozen fp32", "frozen bf16"):
        assert rows[name]["verdict"]["passed"] is True and rows[name]["verdict"]["error_ratio"] <= 2
    assert rows["frozen bf16"]["dtype"] == "bf16"
    assert any("random" in note and "calibrated" in note for note in table["notes"])


@pytest.mark.full
def test_demo_reaches_its_accuracy_in_time(tmp_path):
    start = time.monotonic()
    done = run("demo", "--out", str(tmp_path), "--device", "cpu")
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["digits"]["accuracy"] >= 0.97 and data["digits"]["steps"] == 220
    assert all(len(row["samples_ms"]) >= 6 for row in data["photographs"]["rows"])
    assert seconds < 240, f"{seconds:.0f} s on this machine, expected under 240"


# ---- demo: what can be wrong is found before any work ----------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if the demo begins to train or to measure."""
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    monkeypatch.setattr(demo, "learn", None)
    monkeypatch.setattr(demo_photographs, "compare_configurations", None)


def test_demo_unwritable_output(no_work, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "x")]) == 2
    assert f"output folder {tmp_path / 'file' / 'x'}: cannot be written: Not a directory" in one_line(capsys)


@pytest.mark.parametrize(  # what else a file can be: test_lab.py
    ("make", "message"),
    [
        (lambda path: None, "got no such file"),
        (lambda path: torch.save(torch.nn.ReLU(), path), "objects other than tensors"),
        (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "missing such as 'conv1.weight'"),
    ],
)
def test_demo_bad_weights(no_work, tmp_path, capsys, make, message):
    path = tmp_path / "weights.pth"
    make(path)
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--weights", str(path)]) == 2
    line = one_line(capsys)
    assert f"weights {path}: " in line and message in line and "expected a state_dict of torchvision:resnet50" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--device", "gpu"], "device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
        (["demo", "--device", "cuda:99"], "device: got 'cuda:99', but this machine has"),
        (["demo", "--threads", "0"], "--threads"),
        (["demo", "--threads", "two"], "--threads"),
        (["demo", "--fast"], "--fast"),
        (["demo", "extra"], "extra"),
        (["train"], "NETWORK"),
        (["info", "--yaml"], "--yaml"),
    ],
)
def test_bad_arguments(no_work, capsys, arguments, message):
    assert cli.main(arguments) == 2
    assert message in one_line(capsys)


def test_demo_names_every_missing_package(no_work, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert 'needs scikit-learn, matplotlib: pip install "fastres[cli,train,viz]"' in one_line(capsys)


def test_demo_fails_below_its_accuracy(monkeypatch, tmp_path, capsys):
    for package in ("sklearn", "torchvision", "matplotlib"):
        pytest.importorskip(package)
    from dataclasses import replace

    too_short = replace(demo.RECIPE, iterations=2, milestones=())
    monkeypatch.setattr(demo, "RECIPE", too_short)
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"fastres: ResNet-20 reached \d+\.\d\d% on the held-out digits, expected at least 97%\n", err)


# ---- info, bench, help -----------------------------------------------------------------------------------------------


def test_info_as_text_and_as_json(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "operators on cpu" in text and max(map(len, text.splitlines())) <= 80
    assert cli.main(["info", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["operators"]["cpu"]["bn_act"]["reference"] == []


HELP = {
    (): "demo train paper info bench freeze predict",
    ("demo",): "--out --weights --quick --device --threads",
    ("freeze",): "--report --image-size --batch --dtype --channels --weights --device --no-tune --save --json",
    ("predict",): "--weights --dtype --out --batch --workers --top-k --labels --image-size --column --device --no-tune",
    ("train",): "--recipe --bn-batch --no-swap --nchw --data-root torchrun",
}


@pytest.mark.parametrize("command", HELP, ids=str)
def test_help_lists_what_exists(capsys, command):
    for arguments in ([], ["--help"], ["-h"])[1 if command else 0 :]:
        assert cli.main([*command, *arguments]) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in HELP[command].split()) and max(map(len, text.splitlines())) <= 80


def test_version(capsys):
    import fastres

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastres {fastres.__version__}\n"


@pytest.mark.parametrize("outcome", [0, 1])
def test_bench_runs_pytest_on_the_checkout(monkeypatch, tmp_path, outcome):
    pytest.importorskip("pytest_benchmark")
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "test_chosen.py").write_text(f"def test_yes():\n    open('ran', 'w').close()\n    assert not {outcome}\n")
    (folder / "test_other.py").write_text("def test_no():\n    raise SystemExit('not asked for')\n")
    monkeypatch.setattr(cli, "_benchmarks", lambda: folder)
    assert cli.main(["bench", "-k", "yes", "-q", "-p", "no:cacheprovider"]) == outcome
    assert (tmp_path / "ran").exists()  # from the checkout's root, where pyproject.toml is


def test_bench_outside_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastres" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "found no source checkout" in one_line(capsys)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_or_rich(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["info"]) == 2
    assert one_line(capsys) == f'fastres: the command line needs {package}: pip install "fastres[cli]"\n'


# ---- interrupts, pipes, terminals ------------------------------------------------------------------------------------


def test_interrupt_is_one_line_and_130(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    with started([*FASTRES, "demo", "--device", "cpu", "--out", str(tmp_path)]) as process:
        for line in process.stdout:
            if "ResNet-20 learns" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (130, "fastres: interrupted\n")


@pytest.mark.parametrize(
    ("load", "env", "again"),
    [(9, {}, True), (1.5, {}, False), (9, {"OMP_WAIT_POLICY": "ACTIVE"}, False), (9, {"GOMP_SPINCOUNT": "9"}, False)],
)
@pytest.mark.parametrize("command", ["demo", "train", "freeze", "predict"])
def test_on_busy_cores_it_starts_over_with_waiting_threads(monkeypatch, load, env, again, command):
    from fastres import _info

    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(_info, "load_average", lambda: load)
    monkeypatch.setattr(_info, "usable_cores", lambda: 2)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["fastres", command, "--help"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/venv/bin/fastres", command, "--help"])
    assert cli.main() == 0
    assert len(started) == again
    if again:
        program, line, environment = started[0]
        assert program == sys.executable and line == [sys.executable, "/venv/bin/fastres", command, "--help"]
        assert environment == {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


def test_an_interrupt_is_one_line_anywhere_and_bugs_keep_their_traceback(monkeypatch, capsys):
    def raises(error):
        def info(**kwargs):
            raise error

        return info

    monkeypatch.setattr("fastres._info.info", raises(KeyboardInterrupt))
    assert cli.main(["info"]) == 130
    assert one_line(capsys) == "fastres: interrupted\n"
    monkeypatch.setattr("fastres._info.info", raises(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*FASTRES, "info"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert "Traceback" not in done.stderr and done.returncode not in (0, 2)


def drawn(monkeypatch, terminal: bool, **env: str) -> str:
    from rich.console import Console

    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **env}.items():
        monkeypatch.setenv(name, value)
    console = Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=80)
    with progress(console, "training", every_s=0.0) as report:
        report(1, 2, "loss 1.5")
        report(2, 2, "loss 0.5")
    return console.file.getvalue()


def test_progress_on_a_terminal_is_a_bar_and_honours_no_color(monkeypatch):
    text = drawn(monkeypatch, True)
    assert "\x1b[" in text and "100%" in text and "loss 0.5" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert max(map(len, re.split(r"[\r\n]", plain))) <= 80
    colors = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert colors.search(text) and not colors.search(drawn(monkeypatch, True, NO_COLOR="1"))


def test_progress_in_a_pipe_is_lines(monkeypatch):
    text = drawn(monkeypatch, False)
    assert not CONTROL.search(text)
    assert re.fullmatch("training 1/2, loss 1.5\ntraining 2/2, loss 0.5\n", text)


def test_progress_in_a_pipe_is_seldom(monkeypatch):
    from rich.console import Console

    now = iter([0.0, 1.0, 4.0, 6.0, 7.0, 8.0])  # on entry, then one reading a report
    monkeypatch.setattr("fastres.lab.terminal.time.monotonic", lambda: next(now))
    console = Console(file=io.StringIO(), force_terminal=False)
    with progress(console, "training", every_s=5.0) as report:
        for done in range(1, 6):
            report(done, 5, "x")
    assert console.file.getvalue().splitlines() == ["training 3/5, x, 5 s left", "training 5/5, x"]
