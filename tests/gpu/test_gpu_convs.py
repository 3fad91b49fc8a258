"""How `make gpu` measures convolutions and what becomes of it: who is timed, whose answers count, the phase, the table.

Kernels are stand-ins on the CPU: they prove what is done with a kernel's answers and times, and nothing about one.
"""

import contextlib
import json
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "gpu_run").is_dir():  # an installed wheel, tested without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import bench_conv_act  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
from fastres.lab.timing import wall_timer  # noqa: E402
from fastres.ops import _conv_backends, _conv_tiles  # noqa: E402
from gpu_run import bench, convs, fastest, files, import_results, layers, needs, phases  # noqa: E402
from gpu_run.run import FAILED, PASSED, SKIPPED, Ended, Run  # noqa: E402
from peers import DTYPES  # noqa: E402
from shapes import BLOCK_END, CONVS, INNER, Conv  # noqa: E402

CPU = torch.device("cpu")
H100 = needs.Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559)
SMALL = layers.Layer(Conv(16, 24, 3, 2, 6, BLOCK_END, 0, 1), "fp16", 2)
OTHER = layers.Layer(Conv(16, 24, 1, 1, 6, INNER, 0, 1), "fp32", 2)


def kernel(name, index=0):
    sizes = {"pixels": 64, "channels": 64, "depth": 64, "cluster": 1, "threads": 128, "shared_bytes": 0}
    return _conv_tiles.Kernel(index, name, "float16", 80, splits_depth=False, **sizes)


@pytest.fixture
def run(tmp_path):
    """A run on a GPU that is not there."""
    return Run(tmp_path / "results", tmp_path / "build", H100, [], 570.0)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_every_layer_but_the_stem_is_planned_the_most_important_first():
    found = layers.planned(256)
    assert len(found) == len({layer.key for layer in found}) == 9 * (len(CONVS) - 1)
    fifty = [c for c in CONVS[1:] if c.resnet50]
    first = found[: len(fifty)]
    assert {layer.conv for layer in first} == set(fifty) and first[0].conv.resnet50 == max(c.resnet50 for c in fifty)
    assert all((layer.dtype, layer.batch) == ("fp16", 256) for layer in found[: len(CONVS) - 1])
    assert list(dict.fromkeys(layer.dtype for layer in found)) == ["fp16", "bf16", "fp32"]
    assert list(dict.fromkeys(layer.batch for layer in found)) == [256, 32, 1]
    assert len(layers.planned(32)) == 6 * (len(CONVS) - 1)  # a GPU of little memory: nothing twice


@pytest.mark.parametrize(("gib", "batch"), [(80, 256), (141, 256), (40, 128), (24, 32)])
def test_the_batch_follows_from_the_memory(monkeypatch, gib, batch):
    monkeypatch.setattr(layers, "memory", lambda device: (gib << 30) - (1 << 29))
    assert layers.batch_for(CPU) == batch


@pytest.mark.parametrize("layer", [SMALL, OTHER], ids=lambda layer: layer.title)
def test_a_kernel_gets_what_conv_act_passes_it(monkeypatch, layer):
    """The same types, shapes and strides, in the same order, as from the backend itself."""
    calls = []

    def record(*given):
        calls.append(given)
        return given[0].new_empty(layer.batch, layer.conv.outputs, layer.conv.out, layer.conv.out)

    monkeypatch.setattr(torch.ops.fastres._conv_act_native, "default", record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu = types.SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(_conv_tiles, "choose", lambda problem, multiprocessors: kernel("one", 7))
    x, weight, bias, residual = tensors = layer.tensors(CPU)
    c = layer.conv
    shape = layer.batch, c.outputs, c.out, c.out
    how = (c.stride,) * 2, (c.padding,) * 2, (1, 1), 1, "relu", c.residual
    call = _conv_backends.Conv(True, False, (layer.batch, c.size, c.size), tuple(weight.shape), *how)
    problem = _conv_backends.problem_of(x, call)
    assert (problem.shape, problem.residual, problem.dtype) == (layer.shape, c.residual, x.dtype)
    _conv_backends.cuda(x, weight, bias, residual, None, call)
    y = torch.empty(shape, dtype=x.dtype).to(memory_format=torch.channels_last)
    layers.native(kernel("one", 7), layer, tensors, y)

    def alike(value):
        return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value

    theirs, ours = ([alike(value) for value in given] for given in calls)
    assert ours == theirs and ours[-1] == 7


def test_what_stands_beside_on_a_gpu(monkeypatch):
    tensors = SMALL.tensors(CPU)
    gpu = torch.device("cuda")
    monkeypatch.setattr(layers, "capability", lambda device: (9, 0))
    ours = [k.name for k in _conv_tiles.kernels() if k.element == "float16"]
    assert list(layers.candidates(SMALL, tensors, tensors[3], gpu)) == ["cudnn", "triton", *ours]
    assert set(layers.candidates(SMALL, tensors, tensors[3], CPU)) == {"reference", "cpu", "triton"}
    assert set(layers.yardsticks(SMALL, tensors, gpu, True)) == {"conv", "conv_bias", "conv_bias_tuned", "read"}
    found = layers.yardsticks(OTHER, OTHER.tensors(CPU), gpu, False)
    assert set(found) == {"conv", "conv_bias"}
    x, weight, bias, _ = OTHER.tensors(CPU)
    assert torch.equal(found["conv_bias"](), F.conv2d(x, weight, bias))
    read = tensors[3].permute(0, 2, 3, 1).contiguous().view(torch.int32).max()
    assert layers.yardsticks(SMALL, tensors, gpu, False)["read"]() == read


# ---- whose answers count ---------------------------------------------------------------------------------------------


ANSWERS = {
    "right": lambda wanted: wanted,
    "wrong": lambda wanted: wanted + 0.02 * wanted.abs().max(),
    "half": lambda wanted: wanted.where(torch.arange(wanted.shape[1]).view(1, -1, 1, 1) < 12, torch.nan),
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Kernels by these names, whose answers are as their names say; "refused" and "fault" raise."""

    def make(*names):
        def native(kernel, layer, tensors, y):
            if kernel.name == "refused":
                raise RuntimeError("conv_act: refused refuses: planted\nmore")
            if kernel.name == "fault":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if kernel.name != "nothing":  # whatever y holds stays in it
                y.copy_(ANSWERS[kernel.name](layers.reference(layer, tensors)))

        monkeypatch.setattr(layers, "native", native)
        monkeypatch.setattr(layers, "own_kernels", lambda layer, device: [kernel(n, i) for i, n in enumerate(names)])
        monkeypatch.setattr(layers, "ON_CPU", ("cpu",))

    return make


def test_wrong_answers_are_left_out_and_reported(stand_ins):
    stand_ins("wrong", "right", "nothing", "half", "refused")
    found = convs.measured(SMALL, CPU, wall_timer(), 2, True)
    assert set(found.entry["ms"]) == {"cpu", "right"} and found.entry["beside"] == {}
    assert [text.split(" at ")[0] for text in found.wrong] == ["wrong", "nothing", "half"]
    assert all("output 0 differs" in text and SMALL.title in text for text in found.wrong)
    assert found.refused == [f"refused at {SMALL.title}: RuntimeError: conv_act: refused refuses: planted"]
    data = {"schema": _conv_tiles.SCHEMA, "schema_version": _conv_tiles.VERSION, "entries": [found.entry]}
    assert _conv_tiles.checked(data, "here") == [found.entry]
    assert found.entry["shape"] == [2, 6, 6, 16, 24, 3, 3, 3, 3, 2, 2, 1, 1, 1, 1] and found.entry["residual"]


def test_a_tf32_answer_may_differ_by_its_roundings_and_no_more():
    wanted = torch.linspace(-1, 1, 1001)
    assert convs.tried(lambda: wanted + 2**-10, wanted) is None
    assert convs.tried(lambda: wanted + 2**-8, wanted)[0] == "wrong"
    half = wanted.half()
    assert convs.tried(lambda: half, half) is None and convs.tried(lambda: half + 0.01, half)[0] == "wrong"


def ran(chosen, seconds):
    """What a run of these layers has saved, one after the other: (entries, wrong, refused)."""
    saved = []
    with contextlib.suppress(convs.Fault):
        convs.run(chosen, CPU, time.monotonic() + seconds, 2, lambda *s: saved.append([list(x) for x in s]))
    return saved


def test_after_a_fault_nothing_more_is_measured_and_what_was_is_kept(stand_ins, monkeypatch):
    stand_ins("right")
    real = convs.measured

    def measured(layer, *arguments):
        if layer is OTHER:
            stand_ins("right", "fault")
        return real(layer, *arguments)

    monkeypatch.setattr(convs, "measured", measured)
    later = layers.Layer(SMALL.conv, "fp32", 2)
    entries, wrong, _ = ran([SMALL, OTHER, later], 60)[-1]
    assert len(entries) == 1 and len(wrong) == 1
    assert wrong[0].startswith(f"fault at {OTHER.title}: RuntimeError: CUDA error: an illegal memory access")


def test_what_is_not_reached_is_not_there(stand_ins):
    stand_ins("right")
    assert ran([SMALL, OTHER], -1) == [[[], [], []]]
    assert [len(entries) for entries, _, _ in ran([SMALL, OTHER], 60)] == [0, 1, 2]


def test_processes_that_cannot_compile_do_not_break_the_run():
    """Each raises here: there is no GPU."""
    convs.compile_all([SMALL, OTHER], CPU, time.monotonic() + 60)
    convs.compile_all([SMALL], CPU, time.monotonic() - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_a_layer_of_every_dtype_can_be_measured(stand_ins, dtype):
    stand_ins("right")
    found = convs.measured(layers.Layer(SMALL.conv, dtype, 1), CPU, wall_timer(), 2, False)
    assert found.entry["dtype"] == str(DTYPES[dtype]).removeprefix("torch.") and not found.wrong + found.refused


def test_a_layer_that_does_not_fit_into_memory_is_left_out(monkeypatch):
    def measured(layer, *arguments):
        raise torch.cuda.OutOfMemoryError("planted")

    monkeypatch.setattr(convs, "measured", measured)
    entries, _, refused = ran([SMALL, OTHER], 60)[-1]
    assert entries == [] and len(refused) == 2 and "out of memory" in refused[0]


# ---- what the phases say of it ---------------------------------------------------------------------------------------


def entry(conv, ms, beside, batch=256, dtype="fp16"):
    layer = layers.Layer(conv, dtype, batch)
    about = {"arch": 90, "dtype": {"fp16": "float16", "fp32": "float32"}[dtype], "shape": list(layer.shape)}
    return about | {"residual": conv.residual, "ms": ms, "beside": beside, "conv": conv.id, "counts": conv.counts}


FIRST, SECOND, END = CONVS[1], CONVS[2], CONVS[7]
ENTRIES = [
    entry(FIRST, {"cudnn": 1.0, "triton": 2.0, "sm90_a": 0.5, "sm90_b": 4.0}, {"conv": 0.8, "conv_bias": 1.0}),
    entry(SECOND, {"cudnn": 1.0, "triton": 2.0, "sm90_a": 1.25}, {"conv_bias": 1.0, "conv_bias_tuned": 0.5}),
    entry(END, {"cudnn": 3.0, "triton": 2.0, "sm90_a": 4.0}, {"conv_bias": 3.0, "read": 1.0}),
    entry(CONVS[3], {"cudnn": 3.0, "triton": 2.0, "sm90_a": 1.0}, {"conv_bias": 9.0}),  # of ResNet-18
    entry(FIRST, {"cudnn": 3.0, "triton": 2.0, "sm90_a": 1.0}, {"conv_bias": 9.0}, batch=32),
    entry(FIRST, {"cudnn": 3.0, "triton": 2.0, "sm90_a": 1.0}, {"conv_bias": 9.0}, dtype="fp32"),
]


def test_who_is_fastest_and_the_bar():
    assert fastest.message(ENTRIES, 297).endswith("measured; fastest: cuda at 4, cudnn at 1, triton at 1")
    assert fastest.message([], 297) == "0 of 297 convolutions measured"
    wanted = ["fp16, batch 256", f"median 1.40x conv + bias, least 0.80x ({SECOND.id}), 1 below 1x"]
    wanted += [f"median 1.00x conv + bias + reading the residual, least 1.00x ({END.id}), 0 below 1x"]
    wanted += [f"median 0.40x conv + bias by its fastest plan, least 0.40x ({SECOND.id}), 1 below 1x"]
    wanted += [f"{c.id}: {ratio}x" for c, ratio in ((SECOND, "0.80"), (END, "1.00"), (FIRST, "2.00"))]
    for line, words in zip(fastest.lines(ENTRIES), wanted, strict=True):
        assert words in line
    alone = [entry(FIRST, {"cudnn": 1.0, "triton": 2.0}, {"conv_bias": 1.0})]  # ours were wrong
    assert fastest.lines(alone) == [] and fastest.lines([]) == []


def written(run, monkeypatch, ended, **data):
    whole = {"why_not": None, "planned": 297, "wrong": [], "refused": [], "entries": ENTRIES} | data

    def python(self, arguments, limit_s, environment=None):
        assert arguments[:2] == ["-m", "gpu_run.convs"] and arguments[3] == str(run.results / "convs.json")
        (run.results / files.CONVS).write_text(json.dumps(whole))
        return ended

    monkeypatch.setattr(Run, "python", python)
    return phases.convs(run, 90.0)


def test_the_phase(run, monkeypatch):
    right, late, broken = Ended(0, [], False), Ended(-2, [], True), Ended(1, ["Fault: planted"], False)
    outcome = written(run, monkeypatch, right, refused=["triton at one: planted"])
    assert outcome.status == PASSED and outcome.message == fastest.message(ENTRIES, 297)
    assert outcome.lines == [*fastest.lines(ENTRIES), "left out: triton at one: planted"]
    assert written(run, monkeypatch, late).status == PASSED  # what it measured in its time stands
    assert written(run, monkeypatch, right, entries=[]).status == FAILED
    outcome = written(run, monkeypatch, right, wrong=["sm90_a at one: output 0 differs"])
    assert outcome.status == FAILED and outcome.lines[0] == "wrong answers: sm90_a at one: output 0 differs"
    outcome = written(run, monkeypatch, broken)
    assert outcome.status == FAILED and "Fault: planted" in outcome.lines
    outcome = written(run, monkeypatch, right, why_not="built without CUTLASS's headers", entries=[])
    assert outcome.status == SKIPPED and outcome.message == "built without CUTLASS's headers"


LEFT_OUT = "fastres._C_cuda's convolutions is left out, conv_act on a GPU runs through cuDNN or Triton: no headers"


@pytest.mark.parametrize(("kernels", "cutlass", "status"), [(13, True, PASSED), (0, False, PASSED), (0, True, FAILED)])
def test_the_build_says_whether_it_has_convolutions(run, monkeypatch, kernels, cutlass, status):
    """Without CUTLASS's headers they are left out, with a line; with them they must be there."""
    refusals = [] if kernels else ["built without CUTLASS's headers"]
    operators = {"conv_act": {"cudnn": [], "triton": [], "cuda": refusals}}
    found = json.dumps({"device": "cuda", "operators": operators, "convolutions": kernels})
    ends = [Ended(0, [f"fastres: {LEFT_OUT}"] * (not kernels), False), Ended(0, [found], False)]
    monkeypatch.setattr(Run, "python", lambda self, *arguments: ends.pop(0))
    run.absent += [] if cutlass else [needs.Item("CUTLASS", None)]
    outcome = phases.build(run, 100.0)
    assert outcome.status == status and (LEFT_OUT in outcome.message) == (not kernels)
    assert outcome.lines[0] == f"{kernels or 'no'} kernels of convolutions" and outcome.facts["convolutions"] == kernels
    assert ("conv_act: cuda refuses: built without CUTLASS's headers" in outcome.lines) == (not kernels)


def test_benchmarks_time_the_convolution_alone_beside_conv_act():
    """Of other values than conv_act's: it is timed, not judged, and nothing is compared with it."""
    peers = {c: bench.operator(bench.ConvActCase(c, "fp16", 8)).peers for c in (FIRST, END)}
    assert peers[FIRST] == ("eager", "fastres", "cudnn", "triton", "cuda", "conv_bias")
    assert peers[END] == (*peers[FIRST], "conv_bias_read")
    case = bench.ConvActCase(SMALL.conv, "fp32", 2)
    result = measure.measure(case, CPU, measure.TINY, ("eager", "fastres", "conv_bias", "conv_bias_read"))
    assert set(result.samples) == {"eager", "fastres", "conv_bias", "conv_bias_read"}
    assert set(result.verdicts) == {"fastres"} and result.verdicts["fastres"].passed
    found = report.case_data(result, roofline.Rates(1e10, {"fp32": 1e11}))["peers"]
    assert found["conv_bias"]["speedup"] == {} and set(found["fastres"]["speedup"]) == {"eager"}
    if not torch.cuda.is_available():  # on a CPU nothing of it stands in the tables
        assert {peer for c in bench_conv_act.CASES for peer in c.peers("quick")} <= {"eager", "fastres", "compile"}


# ---- the table -------------------------------------------------------------------------------------------------------


def test_an_imported_table_decides(tmp_path, monkeypatch):
    """What was measured, through the import's file, to the order of the backends and the kernel that runs."""
    gpu = {"name": H100.name, "capability": "9.0", "cudnn": 91002}
    where = {"gpu": gpu, "commit": "c" * 40, "time": "2026-12-01", "versions": {"torch": "2.11.0"}}
    data = {"schema": _conv_tiles.SCHEMA, "schema_version": _conv_tiles.VERSION, "environment": where}
    path, table = tmp_path / "conv_measured.json", next(t for t in import_results.TABLES if t.file == files.CONVS)
    assert _conv_tiles.load(path) == {}
    path.write_text(table.merged(data | {"entries": ENTRIES}, path))
    assert len(json.loads(path.read_text())["entries"]) == len(ENTRIES) == len(path.read_text().splitlines()) - 2
    monkeypatch.setattr(_conv_tiles, "MEASURED", _conv_tiles.load(path))
    own = (kernel("sm90_a"), kernel("sm90_b", 1))
    monkeypatch.setattr(_conv_tiles, "taken_by", lambda problem: (own, ()))
    _conv_tiles.choose.cache_clear()
    for conv, order in ((FIRST, ("cuda", "cudnn", "triton")), (END, ("triton", "cudnn", "cuda"))):
        for batch in (256, 200):  # the nearest, within a factor of two
            problem = _conv_tiles.Problem((9, 0), torch.float16, layers.Layer(conv, "fp16", batch).shape, conv.residual)
            assert _conv_tiles.measured_order(problem) == order
            assert _conv_tiles.choose(problem, 132).name == "sm90_a"
    far = _conv_tiles.Problem((9, 0), torch.float16, layers.Layer(END, "fp16", 100).shape, True)
    assert _conv_tiles.measured_order(far) == ()
    _conv_tiles.choose.cache_clear()


def test_the_table_is_shipped_and_whole():
    tomllib = pytest.importorskip("tomllib")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fastres"]
    assert str(_conv_tiles.PATH.relative_to(_conv_tiles.PATH.parents[1])) in data
    (path,) = (t.path for t in import_results.TABLES if t.file == files.CONVS)
    assert path == f"fastres/ops/{_conv_tiles.PATH.name}"
