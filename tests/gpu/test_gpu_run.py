"""`make gpu`: its dry run, what it says where something is missing, whole files however a run ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "gpu_run").is_dir():  # an installed wheel, tested without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from gpu_run import __main__ as command_line  # noqa: E402
from gpu_run import checkout, files, needs, phases, tests  # noqa: E402
from gpu_run.run import FAILED, PASSED, Ended, Outcome, Run  # noqa: E402

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FASTRES_"))} | {
    "PYTHONPATH": str(ROOT / "benchmarks"),
    "PYTHONSAFEPATH": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
COMMAND = [sys.executable, "-m", "gpu_run"]
H100 = needs.Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559)


def gpu_run(*arguments, **how):
    return subprocess.run([*COMMAND, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=570, **how)


@pytest.fixture
def run(tmp_path):
    """A run on a GPU that is not there, with xdist and compute-sanitizer absent."""
    absent = [needs.Item("xdist", None), needs.Item("compute-sanitizer", None), needs.Item("timm", None)]
    return Run(tmp_path / "results", tmp_path / "build", H100, absent, 570.0)


# ---- the whole of it -------------------------------------------------------------------------------------------------


EVERY = ("build", "tests", "sanitizer", "convs", "tune", "bench")


@pytest.mark.parametrize("chosen", [("build", "convs"), pytest.param(EVERY, marks=pytest.mark.full)], ids="-".join)
def test_dry_run(tmp_path, chosen):
    """Each phase in a process of its own, as on a GPU; what it leaves is whole, small and refused by the import."""
    results, before = tmp_path / "results", sorted((ROOT / "benchmarks" / "results").iterdir())
    done = gpu_run("--dry-run", "--phases", ",".join(chosen), "--results", str(results), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    screen = done.stdout.split("\n\n")[-1].splitlines()
    assert len(screen) <= 40 and screen[-1].startswith("make gpu: passed")
    assert {path.name for path in results.iterdir()} <= set(files.NAMES) and len(files.NAMES) <= 8
    assert all(path.stat().st_size < files.MOST for path in results.iterdir())

    found = json.loads((results / files.RUN).read_text())
    assert found["dry_run"] and found["gpu"] is None and found["versions"]["torch"]
    assert {name: phase["status"] for name, phase in found["phases"].items()} == dict.fromkeys(chosen, "passed")
    convs = json.loads((results / files.CONVS).read_text())
    assert convs["dry_run"] and len(convs["entries"]) == convs["planned"] and not convs["wrong"] + convs["refused"]
    page = (results / files.SUMMARY).read_text()
    assert all(f"| {name} | passed |" in page for name in chosen) and "images/s" not in page
    if chosen == EVERY:
        cases = ElementTree.parse(results / files.TESTS).findall(".//testcase")
        ran = {case.get("name") for case in cases if not list(case)}
        assert {"test_every_batch_norm_is_ours[timm]", "test_frozen_is_as_good_as_eager[hugging face-dtype0]"} <= ran
        assert {f"test_every_geometry_is_exact[stand_in-{name}]" for name in ("float16", "float32")} <= ran
        assert found["phases"]["sanitizer"]["facts"]["interpreter"]["counts"]["passed"] >= 16
        tuned = json.loads((results / files.TUNED).read_text())
        assert tuned["dry_run"] and {e["kernel"] for e in tuned["entries"]} >= {"bn_act_backward_kernel"}
        bench = json.loads((results / files.BENCH).read_text())
        assert bench["run"]["dry_run"] and {case["what"] for case in bench["cases"]} >= {"bn_act", "networks", "train"}

    imports = [sys.executable, "-m", "gpu_run.import_results", str(results)]
    refused = subprocess.run(imports, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and "dry run" in refused.stderr and "nothing was changed" in refused.stderr
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_without_a_gpu_it_says_so_at_once_in_one_line():
    begun = time.monotonic()
    done = gpu_run()
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("make gpu: no GPU: ") and done.stderr.count("\n") == 1
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_stopped_leaves_whole_files(tmp_path, number, code):
    results = tmp_path / "results"
    arguments = ["--dry-run", "--phases", "build,sanitizer", "--results", str(results)]
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log, end = results / files.LOG, time.monotonic() + 120
    while not (log.exists() and "test_gpu_sanitize" in log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    statuses = {n: p["status"] for n, p in json.loads((results / files.RUN).read_text())["phases"].items()}
    assert statuses == {"build": "passed", "sanitizer": "interrupted" if number == signal.SIGTERM else "running"}
    assert "| build | passed |" in (results / files.SUMMARY).read_text()
    assert {path.name for path in results.iterdir()} <= set(files.NAMES)  # no half-written file


# ---- what a machine lacks --------------------------------------------------------------------------------------------


DRIVER = """
    int cuInit(unsigned f) { return 0; }
    int cuDeviceGetCount(int *n) { *n = COUNT; return 0; }
    int cuDeviceGet(int *d, int i) { *d = i; return 0; }
    int cuDeviceGetName(char *s, int n, int d) { __builtin_strcpy(s, "NVIDIA Test"); return 0; }
    int cuDeviceTotalMem_v2(unsigned long *n, int d) { *n = 80ul << 30; return 0; }
    int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : -1; return 0; }
"""


@pytest.mark.parametrize("count, says", [(1, "NVIDIA Test (9.0, 80 GiB)"), (0, "none is visible")])
def test_the_gpu_is_the_drivers_first(tmp_path, count, says):
    """Beside a driver that is made for this test."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "driver.c"
    source.write_text(DRIVER.replace("COUNT", str(count)))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
    environment = ENVIRONMENT | {"LD_LIBRARY_PATH": str(tmp_path)}
    code = "from gpu_run.needs import find_gpu; print(find_gpu())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(says), done.stderr


def test_everything_missing_is_said_at_once(monkeypatch):
    monkeypatch.setattr(needs, "find_gpu", lambda: H100)
    monkeypatch.setattr(needs, "_torch", lambda gpu: (needs.Item("torch", "2.11.0"), "13.0"))
    monkeypatch.setattr(needs, "tool", lambda name, remedy: needs.Item(name, None, remedy, "was not found"))
    real = needs.module
    monkeypatch.setattr(needs, "module", lambda name, *a, **k: real("no_such_" + name if name == "pybind11" else name))
    with pytest.raises(SystemExit) as stop:
        command_line.check(False)
    lines = str(stop.value).splitlines()
    assert lines[0].startswith("make gpu: 3 missing") and len(lines) == 4
    for line, parts in zip(lines[1:], (("pybind11", "pip install"), ("nvcc", "13.0"), ("c++", "g++")), strict=True):
        assert all(part in line for part in parts), line


def test_a_compiler_for_another_cuda_is_missing(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert needs._nvcc("12.8").version == "12.4"
    wrong = needs._nvcc("13.0")
    assert wrong.version is None and "of CUDA 12, torch of 13.0" in str(wrong)


def test_cutlass_from_a_folder_or_a_wheel(monkeypatch, tmp_path):
    import zipfile

    monkeypatch.setenv(needs.CUTLASS, str(tmp_path))
    assert needs.cutlass().version is None and "FASTRES_CUTLASS" in str(needs.cutlass())
    header = tmp_path / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert needs.cutlass().version == str(tmp_path)
    wheel = tmp_path / "nvidia_cutlass.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("cutlass_library/source/include/cutlass/cutlass.h", "")
    monkeypatch.setenv(needs.CUTLASS, str(wheel))
    assert needs.cutlass().version == str(wheel)


@pytest.mark.parametrize("text", ["", "tests,nothing"])
def test_unknown_phases(text):
    done = gpu_run("--phases", text)
    assert done.returncode == 2 and "expected some of build, tests, sanitizer, convs, tune, bench" in done.stderr


# ---- fastres without an install --------------------------------------------------------------------------------------


def test_fastres_is_imported_from_the_sources_in_children_and_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_DISABLE", "triton")  # of the caller's: nothing is switched off
    environment = checkout.environment(tmp_path, {})
    assert "FASTRES_DISABLE" not in environment
    code = "import fastres, fastres.kernels.configs as c; print(fastres.__file__, c.__file__)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    for program in (code, nested):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        package, kernels = done.stdout.split()
        assert package == str(ROOT / "fastres" / "__init__.py")
        assert kernels == str(tmp_path / "parts" / "kernels" / "configs.py")  # not an installed package's


# ---- phases ----------------------------------------------------------------------------------------------------------


def test_a_program_is_stopped_at_its_limit_with_what_it_started(run, tmp_path):
    mark = tmp_path / "child"
    child = f"import pathlib, time; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    ended = run.python(["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"], 1.0)
    assert ended.out_of_time and ended.code != 0
    time.sleep(2)
    assert not mark.exists()
    ended = run.python(["-c", "print('one'); print('two'); raise SystemExit(3)"], 60.0)
    assert (ended.code, ended.last, ended.out_of_time) == (3, "two", False)
    assert "out of time" in (log := (run.results / files.LOG).read_text()) and "two" in log


def test_a_build_that_fails_says_the_compilers_error(run, monkeypatch):
    said = ["x.cu(3): error: planted", "fastres: FASTRES_BUILD_EXT=1, but fastres._C cannot be built: it failed"]
    asked = []

    def python(self, arguments, limit_s, environment=None):
        asked.append((arguments, environment, self.environment["TORCH_CUDA_ARCH_LIST"]))
        return Ended(1, said, False)

    monkeypatch.setattr(Run, "python", python)
    outcome = phases.build(run, 100.0)
    assert outcome.status == FAILED and outcome.lines == said[:1] and needs.Gpu("A100", "8.0", 1).arch_list == "8.0"
    assert asked == [(["setup.py", "build_ext", "--inplace", "--force"], {"FASTRES_BUILD_EXT": "1"}, "9.0a")]


def test_a_torch_that_finds_no_gpu_fails_the_build(run, monkeypatch):
    found = json.dumps({"device": "cpu", "operators": {}})
    monkeypatch.setattr(Run, "python", lambda self, arguments, *how: Ended(0, [found], False))
    assert phases.build(run, 100.0).message == "fastres finds no GPU to use"


def test_time_is_kept_for_the_later_phases(run):
    assert [phase.name for phase in phases.PHASES[3:]] == ["convs", "tune", "bench"]
    total = phases.limit(run, phases.PHASES, 0)
    assert 0 < total <= 300
    run.deadline = run.started + 220  # the tests have run long: the later phases keep their least
    assert phases.limit(run, phases.PHASES, 3) == pytest.approx(50, abs=2)
    run.deadline = run.started + 180
    assert phases.limit(run, phases.PHASES, 4) == pytest.approx(30, abs=2)
    assert phases.limit(run, phases.PHASES, 5) == pytest.approx(180, abs=2)


def test_a_phase_that_fails_does_not_keep_the_others(run, capsys):
    def broken(run, limit_s):
        raise OSError("planted")

    later = phases.Phase("later", 100, 10, lambda run, limit_s: Outcome(PASSED, "ran"))
    summary = command_line.Summary(run, "make gpu", [])
    command_line.work(run, summary, (phases.Phase("broken", 100, 10, broken), later))
    assert [phase["status"] for phase in summary.phases.values()] == [FAILED, PASSED]
    assert summary.failed == ["broken"] and "OSError: planted" in (run.results / files.SUMMARY).read_text()
    assert "FAILED (broken)" in summary.screen()[-1]
    run.deadline = time.monotonic()
    command_line.work(run, summary, (later,))
    assert summary.phases["later"]["status"] == FAILED  # no time was left


SUITE = """
    import pytest

    @pytest.fixture
    def broken():
        raise RuntimeError("a fixture")

    def test_right(): pass
    def test_wrong(): assert 1 == 2, "planted"
    def test_error(broken): pass
    def test_memory(): pytest.skip("needs 40 GiB of GPU memory, 3 are free")
    def test_absent(): pytest.importorskip("timm_that_is_absent")
    def test_else(): pytest.skip("it rains")
    @pytest.mark.xfail(reason="known")
    def test_known(): assert False
"""


@pytest.mark.parametrize("how", [("-p", "no:xdist"), ("-n", "2")], ids=("alone", "xdist"))
def test_tests_are_recorded_as_they_end_and_judged(run, tmp_path, how):
    (tmp_path / "test_suite.py").write_text(textwrap.dedent(SUITE))
    # skipped as a whole: under xdist its controller does not hear of it
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.skip('it snows', allow_module_level=True)\n")
    record = tmp_path / "record.jsonl"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *how, "-c", os.devnull]
    arguments += ["--rootdir", str(tmp_path), str(tmp_path), *tests.plugin(record)]
    ended = run.python(arguments, 60.0)
    found = tests.once(files.read_lines(record))
    outcomes = {test["test"].rpartition("_")[2]: test["outcome"] for test in found}
    skipped = dict.fromkeys(("memory", "absent", "else", "whole.py"), "skipped")
    assert outcomes == {"right": "passed", "wrong": "failed", "error": "error", "known": "xfailed"} | skipped

    outcome = tests.judged(run, found, [ended])
    assert outcome.status == FAILED and outcome.message == "1 passed, 1 failed, 1 error, 4 skipped"
    text = "\n".join(outcome.lines)
    assert "planted" in text and "a fixture" in text and "skipped: 1 x needs 40 GiB" in text
    assert all(f"1 x it {does}" in text for does in ("rains", "snows"))
    suite = ElementTree.fromstring(files.junit(found)).find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 8, "failures": 1, "errors": 1, "skipped": 4}


@pytest.mark.parametrize(
    ("says", "code", "status", "line"),
    [
        ("========= Error: Device not supported", 1, "skipped", "cannot run here: Device not supported"),
        ("========= ERROR SUMMARY: 2 errors", 86, "failed", "memcheck: ERROR SUMMARY: 2 errors"),
        ("3 tests were not collected", 4, "failed", "pytest ended with 4: 3 tests were not collected"),
    ],
)
def test_what_the_sanitizer_says(run, tmp_path, says, code, status, line):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    program.chmod(0o755)
    run.environment["PATH"] = f"{tmp_path}{os.pathsep}{run.environment['PATH']}"
    assert tests.sanitizer(run, 60.0).status == "skipped"  # the tool is absent
    run.absent.clear()
    outcome = tests.sanitizer(run, 60.0)
    assert outcome.status == status and line in "\n".join([outcome.message, *outcome.lines])


def test_what_fails_a_phase_of_tests(run):
    passing = [{"test": f"t.py::{i}", "outcome": "passed", "seconds": 0.1, "message": ""} for i in range(3)]
    right, none = (Ended(code, [], False) for code in (0, 5))
    late, crashed = Ended(2, [], True), Ended(3, ["boom"], False)
    assert tests.judged(run, passing, [right, none]).status == PASSED
    assert tests.judged(run, [], [none]).status == FAILED
    assert "out of time" in tests.judged(run, passing, [right, late]).lines[0]
    assert tests.judged(run, passing, [late]).status == tests.judged(run, passing, [crashed]).status == FAILED


@pytest.mark.parametrize(
    ("reason", "right"),
    [
        ("needs 40 GiB of GPU memory, 3 are free", True),
        ("needs 2 GPUs", True),
        ("needs compute capability 10.0", True),
        ("could not import 'timm': No module named 'timm'", True),
        ("could not import 'torchvision': No module named 'torchvision'", False),  # it is there
        ("CUTLASS is not installed: fastres._C_cuda has no convolutions", False),  # they are there
        ("no CUDA device", False),
        ("fastres._C_cuda is not part of this build", False),
    ],
)
def test_why_a_gpu_test_may_be_skipped(run, reason, right):
    assert tests.accepted(reason, run) == right
    run.absent.append(needs.Item("CUTLASS", None))
    assert tests.accepted(reason, run) == (right or "CUTLASS is not installed" in reason)


@pytest.mark.full
def test_the_chosen_files_hold_every_gpu_test():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "tests"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=570)
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == set(tests.gpu_files(ROOT)), done.stdout[-2000:]
