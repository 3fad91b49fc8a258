"""`make gpu-import`: files a run's results under their names, or refuses all of it and changes nothing."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "gpu_run").is_dir():  # an installed wheel, tested without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from fastres.kernels import configs, measured  # noqa: E402

import bench_add_relu  # noqa: E402
import bench_bn_act  # noqa: E402
import measure  # noqa: E402
import pages  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from fastres.ops import _conv_tiles  # noqa: E402
from gpu_run import files, import_results  # noqa: E402
from roofline import Rates  # noqa: E402

GPU = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_mib": 81559, "cuda": "13.0", "cudnn": 91002}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHERE = {"gpu": GPU, "commit": COMMIT, "time": "2026-12-01T00:00:00+00:00", "versions": {"torch": "2.11.0"}}
TABLE, TUNED = "fastres/ops/conv_measured.json", "kernels/tuned.json"
PLACE = f"NVIDIA_H100_80GB_HBM3-torch{torch.__version__.partition('+')[0]}"
SMALL = shapes.Activation(5, 6, 7, shapes.BLOCK_END, 1, 1)


@pytest.fixture(scope="module")
def bench():
    """A result file of three cases, as a GPU would have written it; its figures are this CPU's."""
    cases = [
        bench_bn_act.BnActCase(SMALL, "train", "residual-relu", "channels_last", "fp32", 2),
        bench_bn_act.BnActCase(SMALL, "eval", "relu", "channels_last", "bf16", 2),
        bench_add_relu.AddReluCase(SMALL, "eval", "nchw", "fp32", 2),
    ]
    cpu, effort = torch.device("cpu"), measure.Effort(0.0, 6, sample_s=0.0)
    results = [measure.measure(case, cpu, effort, case.peers("eager")) for case in cases]
    data = report.document(results, cpu, effort, "gpu", Rates(1e10, {"fp32": 1e11}))
    data["environment"] |= {"gpu": GPU, "commit": COMMIT}
    data["run"] = {"dry_run": False}
    return json.dumps(data)


def entry(shape_class="large", kernel="add_relu_forward_kernel", arch=90, **config):
    whole = asdict(configs.TABLE[kernel, arch][shape_class]) | config
    return {"kernel": kernel, "arch": arch, "shape_class": shape_class, "config": whole, "speedup": 1.25}


def tuned(*entries, **other):
    data = {"schema": measured.SCHEMA, "schema_version": measured.VERSION, "dry_run": False, "environment": WHERE}
    return json.dumps(data | {"entries": list(entries)} | other)


def conv_entry(batch=256, **other):
    shape = [batch, 56, 56, 64, 64, 3, 3, 56, 56, 1, 1, 1, 1, 1, 1]
    ms = {"cudnn": 0.3, "triton": 0.4, "sm90_128x64_pingpong": 0.2}
    about = {"conv": "3x3", "beside": {"conv_bias": 0.35}}
    return {"arch": 90, "dtype": "float16", "shape": shape, "residual": False, "ms": ms} | about | other


def convs(*entries, **other):
    data = json.loads(tuned(*entries, **other))
    return json.dumps(data | {"schema": _conv_tiles.SCHEMA, "schema_version": _conv_tiles.VERSION} | other)


def run_file(**other):
    phase = {"status": "passed", "seconds": 1.0, "message": "", "lines": [], "facts": {}}
    data = {"schema": files.RUN_SCHEMA, "schema_version": files.RUN_VERSION, "dry_run": False, "sources": "0" * 64}
    data["phases"] = {name: dict(phase) for name in ("build", "tests", "convs", "tune", "bench")}
    return json.dumps(WHERE | data | other)


@pytest.fixture
def folder(tmp_path, bench):
    """A run's results, and beside them a checkout's folders."""
    path = tmp_path / "run"
    path.mkdir()
    (path / files.RUN).write_text(run_file())
    (path / files.BENCH).write_text(bench)
    (path / files.TUNED).write_text(tuned(entry(tile=4096, num_warps=8)))
    (path / files.CONVS).write_text(convs(conv_entry(), conv_entry(1, residual=True)))
    (path / files.TESTS).write_text(files.junit([]))
    (path / files.SUMMARY).write_text("# make gpu\n")
    (path / files.LOG).write_text("all of it\n")
    root = tmp_path / "root"
    (root / "kernels").mkdir(parents=True)
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "benchmarks" / "results" / "older.json").write_text("{}")
    return path


def state(folder):
    root = folder.parent / "root"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def imports(folder):
    return import_results.main([str(folder)], folder.parent / "root")


def test_results_are_filed_under_their_names(folder, bench, capsys):
    assert imports(folder) == 0
    names = {f"bn_act-train-fp32-{PLACE}", f"bn_act-eval-bf16-{PLACE}", f"add_relu-eval-fp32-{PLACE}"}
    expected = {f"benchmarks/results/{name}{suffix}" for name in names for suffix in (".json", ".md")}
    expected |= {"benchmarks/results/older.json", f"benchmarks/results/gpu-{PLACE}.md", "kernels/tuned.json", TABLE}
    assert set(state(folder)) == expected
    results = folder.parent / "root" / "benchmarks" / "results"
    whole = {case["id"]: case for case in json.loads(bench)["cases"]}
    for name in names:  # readable by compare.py and plot.py, the figures as they were measured
        found = pages.load(results / f"{name}.json")
        assert found["environment"]["gpu"] == GPU and "dry_run" in found["run"]
        for case in found["cases"]:
            assert case == whole.pop(case["id"])
    assert not whole
    assert "test-full" in capsys.readouterr().out


def test_configurations_are_merged_and_loaded(folder):
    path = folder.parent / "root" / "kernels" / "tuned.json"
    older = [entry(tile=512), entry("small", tile=1024)]
    path.write_text(json.dumps({"schema": measured.SCHEMA, "schema_version": measured.VERSION, "entries": older}))
    assert imports(folder) == 0
    table = {key: dict(rows) for key, rows in configs.TABLE.items()}
    assert measured.load(path, table) == 2
    rows = table["add_relu_forward_kernel", 90]
    assert (rows["large"].tile, rows["large"].num_warps, rows["small"].tile) == (4096, 8, 1024)
    found = {e["shape_class"]: e for e in json.loads(path.read_text())["entries"]}
    assert found["large"]["device"] == GPU["name"] and found["large"]["commit"] == COMMIT


def test_convolutions_are_merged_and_loaded(folder):
    path = folder.parent / "root" / TABLE
    path.parent.mkdir(parents=True)
    older = [conv_entry(ms={"cudnn": 9.0}), conv_entry(32, ms={"cudnn": 8.0})]
    path.write_text(convs(*older))
    assert imports(folder) == 0
    (layer, rows), (other, alone) = sorted(_conv_tiles.load(path).items(), key=lambda item: item[0][-1])
    assert {n // 56**2: ms["cudnn"] for n, ms in rows.items()} == {256: 0.3, 32: 8.0}
    assert layer[:2] == (90, "float16") and list(alone) == [56**2] and other[-1]
    found = {e["shape"][0]: e for e in json.loads(path.read_text())["entries"]}
    assert found[256]["device"] == GPU["name"] and found[256]["commit"] == COMMIT and found[256]["cudnn"] == 91002
    assert found[256]["beside"] == {"conv_bias": 0.35} and "device" not in found[32]


@pytest.mark.parametrize("phase", ["tests", "tune", "convs"])
def test_what_a_failed_phase_measured_stays_out(folder, phase, capsys):
    edited(files.RUN, lambda data: data["phases"][phase].update(status="failed", message="1 failed"))(folder)
    assert imports(folder) == 0
    out = {"tune": {TUNED}, "convs": {TABLE}}.get(phase, {TUNED, TABLE})
    said = capsys.readouterr().out
    assert {TUNED, TABLE} - state(folder).keys() == out and len(state(folder)) > 3
    assert f"the phase {phase} failed: 1 failed" in said and all(f"{table} is not changed" in said for table in out)


@pytest.mark.parametrize("missing", [[files.BENCH], [files.BENCH, files.TUNED]], ids=str)
def test_a_run_that_measured_less(folder, missing):
    for name in missing:
        (folder / name).unlink()
    assert imports(folder) == 0
    filed = {"benchmarks/results/older.json", f"benchmarks/results/gpu-{PLACE}.md", TABLE}
    assert set(state(folder)) == filed | ({TUNED} if files.TUNED not in missing else set())


def edited(name, change=lambda data: None, **other):
    def edit(folder):
        data = json.loads((folder / name).read_text()) | other
        change(data)
        (folder / name).write_text(json.dumps(data))

    return edit


def elsewhere(name, **where):
    return edited(name, lambda data: data["environment"].update(where))


def without_commit(folder, sources):
    for name in import_results.MEASURED:
        elsewhere(name, commit=None)(folder)
    edited(files.RUN, commit=None, sources=sources)(folder)


def test_a_run_without_git_gets_the_commit_of_the_same_sources(folder, monkeypatch):
    (folder.parent / "root" / "kernels" / "one.py").write_text("x = 1\n")
    before = state(folder)
    monkeypatch.setattr(import_results, "commit", lambda root: COMMIT)
    without_commit(folder, "1" * 64)
    assert imports(folder) == 1 and state(folder) == before
    without_commit(folder, import_results.digest(folder.parent / "root"))
    assert imports(folder) == 0
    path = folder.parent / "root" / "benchmarks" / "results" / f"add_relu-eval-fp32-{PLACE}.json"
    assert pages.load(path)["environment"]["commit"] == COMMIT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited(files.RUN, dry_run=True), "a dry run"),
        (edited(files.BENCH, run={"dry_run": True}), "a dry run"),
        (edited(files.TUNED, dry_run=True), "a dry run"),
        (edited(files.RUN, schema="other"), "expected the schema"),
        (edited(files.RUN, phases={"tests": 3}), "phases"),
        (edited(files.BENCH, schema="fastres.demo"), "not a result of these benchmarks"),
        (edited(files.BENCH, schema_version=1), "another version"),
        (edited(files.BENCH, lambda data: data["cases"][1]["peers"]["fastres"].pop("samples")), "samples"),
        (elsewhere(files.BENCH, gpu=GPU | {"name": "NVIDIA A100"}), "measured on NVIDIA A100"),
        (elsewhere(files.BENCH, commit="f" * 40), "of commit ffff"),
        (elsewhere(files.TUNED, gpu=None), "measured on no GPU"),
        (edited(files.TUNED, entries=[entry(tile=3000)]), "tile: got 3000"),
        (edited(files.TUNED, entries=[entry(arch=80)]), "tuned.json: entries for sm_80, measured on sm_90"),
        (lambda folder: (folder / files.BENCH).write_text('{"schema": "fastres.ben'), "cannot be read"),
        (lambda folder: (folder / files.TESTS).write_text("<testsuites>"), "cannot be read"),
        (lambda folder: (folder / "weights.pkl").write_bytes(b"\x80"), "weights.pkl: not a file of make gpu"),
        (lambda folder: (folder / files.RUN).unlink(), "has no run.json"),
        (lambda folder: [(folder / n).unlink() for n in import_results.MEASURED], "nothing was measured"),
        (edited(files.CONVS, dry_run=True), "convs.json: a dry run"),
        (edited(files.CONVS, schema="other"), "convs.json: expected the schema"),
        (edited(files.CONVS, entries=[conv_entry(arch=80)]), "convs.json: entries for sm_80, measured on sm_90"),
        (edited(files.CONVS, entries=[conv_entry(ms={"cudnn": 0})]), "expected milliseconds by name"),
        (edited(files.CONVS, entries=[conv_entry(), conv_entry()]), "is there twice"),
        (edited(files.CONVS, entries=[conv_entry(beside=3)]), "beside"),
        (elsewhere(files.CONVS, gpu=GPU | {"name": "NVIDIA A100"}), "convs.json: measured on NVIDIA A100"),
        (elsewhere(files.CONVS, commit="f" * 40), "convs.json: of commit ffff"),
    ],
)
def test_what_is_refused_changes_nothing(folder, change, says, capsys):
    before = state(folder)
    change(folder)
    assert imports(folder) == 1 and state(folder) == before
    error = capsys.readouterr().err
    assert says in error and error.endswith("nothing was changed\n") and error.count("\n") == 1


def test_a_disk_that_is_full_in_the_middle_changes_nothing(folder, monkeypatch):
    before, real, written = state(folder), Path.write_text, []

    def write_text(path, *arguments, **how):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        return real(path, *arguments, **how)

    monkeypatch.setattr(Path, "write_text", write_text)
    assert imports(folder) == 1 and state(folder) == before


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert import_results.main([str(tmp_path / "none")], tmp_path) == 1
    assert "is not a folder" in capsys.readouterr().err
