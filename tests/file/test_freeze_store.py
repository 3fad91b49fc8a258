"""FrozenModel.save and fastres.load: the same outputs bit for bit, one plain file, whole or not at all.

Files that somebody damaged or made up are in test_freeze_hostile.py.
"""

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_structure

import fastres
from fastres.inference import json_model, json_specs, store
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport
from fastres.verify.verdict import Row, Verification

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """Convolutions with every epilogue, a residual, a pre-activation norm, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 5)
        self.register_buffer("scale", torch.rand(1, 4, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        y = F.silu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        x = self.last(F.relu(self.norm(x))) * self.scale
        x = F.hardswish(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.fc(x.mean((2, 3))).softmax(1)


Pair = namedtuple("Pair", ["image", "rest"])


class Several(nn.Module):
    """Two inputs, a flag, keywords; outputs in every kind of structure."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.bn, self.kind = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), kind

    def forward(self, image, mask=None, *, scale=1.0, mode="plain"):
        y = self.bn(self.conv(image)) * scale
        y = y if mask is None else y * mask
        y = y.relu() if mode == "relu" else y
        kinds = {
            "tuple": lambda: (y, None, 7, [y.sum(), {"a": y.mean()}]),
            "dict": lambda: {"out": y, "aux": {"z": y.amax(1)}},
            "ordered": lambda: OrderedDict(b=y, a=y.abs()),
            "named": lambda: Pair(y, (y + 1, torch.arange(3))),
            "max": lambda: torch.max(y, 1),
            "one": lambda: y,
        }
        return kinds[self.kind]()


def calibrated(net):
    """Norms that do something."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return net.eval()


def freeze(net, inputs=X, **options):
    return fastres.freeze(calibrated(net), inputs, tune=False, verify=False, **options)


def assert_same(got, want):
    got_leaves, got_tree = tree_flatten(got)
    want_leaves, want_tree = tree_flatten(want)
    assert str(got_tree) == str(want_tree)
    for a, b in zip(got_leaves, want_leaves, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        else:
            assert a == b


def assert_same_network(got, want):
    mine, its = got.state_dict(), want.state_dict()
    assert list(mine) == list(its)
    for name, t in its.items():
        assert torch.equal(mine[name], t) and mine[name].dtype == t.dtype and mine[name].stride() == t.stride(), name
    assert got.module.code == want.module.code
    assert str(got.report) == str(want.report) and got.report.to_dict() == want.report.to_dict()
    assert got.dtype is want.dtype and got.plan == want.plan
    assert not any(p.requires_grad for p in got.parameters()) and not any(m.training for m in got.modules())


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return freeze(Residual())


@pytest.fixture(scope="module")
def residual_file(residual, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "residual.fastres"
    residual.save(path)
    return path


# ---- the same network


def test_same_outputs_and_tensors(residual, residual_file):
    loaded = fastres.load(residual_file)
    assert_same_network(loaded, residual)
    for batch in (0, 1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        assert_same(loaded(x), residual(x))
    x = X.clone()
    x[0, 0, 0, 0] = float("nan")
    torch.testing.assert_close(loaded(x), residual(x), rtol=0, atol=0, equal_nan=True)
    kinds = {type(m).__name__ for m in loaded.modules()}
    assert {"FrozenConv", "FrozenNorm", "PoolLinear"} <= kinds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_dtypes_and_layouts(tmp_path, dtype, channels_last):
    frozen = freeze(Residual(), dtype=dtype)
    frozen.use_channels_last(channels_last)
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    assert_same_network(loaded, frozen)
    assert_same(loaded(X), frozen(X))


def test_settings_of_a_tuned_network(tmp_path):
    torch.manual_seed(0)
    frozen = fastres.freeze(calibrated(Residual()), torch.randn(9, 3, 12, 12))
    frozen.images_at_a_time = 4
    convs = [m for m in frozen.modules() if type(m).__name__ == "FrozenConv"]
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    convs[2].weight_for(x)
    convs[2].plain(x)
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    assert_same_network(loaded, frozen)
    assert loaded.report.verification and loaded.report.verification.rows == frozen.report.verification.rows
    again = [m for m in loaded.modules() if type(m).__name__ == "FrozenConv"]
    assert again[2].weight_for(x).data_ptr() == again[2].weight.data_ptr()  # measured once, kept
    y = torch.randn(11, 3, 12, 12)
    assert_same(loaded(y), frozen(y))


def test_a_verdict_that_failed_is_kept(residual, tmp_path):
    good = Row("out", "output", (2,), "float32", *(0.0,) * 6, 1.0, True)
    bad = dataclasses.replace(good, ratio=float("inf"), passed=False, message="off")
    loaded = copy.deepcopy(residual)
    loaded.report = dataclasses.replace(
        residual.report, verification=Verification((good, bad), "float32", False, False)
    )
    loaded.save(tmp_path / "net")
    verdict = fastres.load(tmp_path / "net").report.verification
    assert verdict.rows == (good, bad) and not verdict.passed


@pytest.mark.parametrize("kind", ["tuple", "dict", "ordered", "named", "max", "one"])
def test_outputs_of_any_structure(tmp_path, kind):
    frozen = freeze(Several(kind))
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    assert_same(loaded(X), frozen(X))
    assert type(loaded(X)) is type(frozen(X))


def test_the_call_is_the_source_s(tmp_path):
    mask = torch.rand(2, 1, 12, 12)
    frozen = freeze(Several("one"), {"image": X, "mask": mask, "scale": 0.5, "mode": "relu"})
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    want = frozen(X, mask, scale=0.5, mode="relu")
    for call in (
        lambda f: f(X, mask, scale=0.5, mode="relu"),
        lambda f: f(image=X, mask=mask, mode="relu", scale=0.5),
        lambda f: f(X, mask=mask, scale=0.5, mode="relu"),
    ):
        assert_same(call(loaded), want)
    with pytest.raises(TypeError, match="image"):
        loaded(mask=mask)
    with pytest.raises(TypeError, match="other"):
        loaded(X, other=1)
    with pytest.raises(RuntimeError, match="source"):  # captured for mode="relu" alone
        loaded(X, mask, scale=0.5)


def test_arguments_equal_to_their_defaults(tmp_path):
    frozen = freeze(Several("one"))
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    want = frozen(X)
    assert_same(loaded(X, None), want)
    assert_same(loaded(X, mask=None, mode="".join(["pl", "ain"])), want)
    assert_same(loaded(X, scale=float("1.0")), want)


def test_a_default_that_is_no_plain_data(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x, act=torch.relu):
            return act(self.conv(x))

    frozen = freeze(Odd())
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    assert_same(loaded(X), frozen(X))
    loaded.save(tmp_path / "again")
    assert_same(fastres.load(tmp_path / "again")(X), frozen(X))


def test_what_a_loaded_model_says_and_refuses(residual_file, residual, tmp_path):
    loaded = fastres.load(residual_file)
    assert loaded.is_stale() is False
    with pytest.raises(RuntimeError, match="source is gone"):
        loaded.refresh()
    with pytest.raises(RuntimeError, match=r"\[N, 3, 12, 12\]"):
        loaded(torch.randn(2, 3, 16, 16))
    with pytest.raises(RuntimeError, match="snapshot"):
        loaded.train()
    loaded.save(tmp_path / "again")  # what is loaded can be saved, and is the same
    with safe_open(tmp_path / "again", "pt") as a, safe_open(residual_file, "pt") as b:
        assert a.metadata() == b.metadata()
    half = fastres.load(residual_file).half()
    half.save(tmp_path / "half")
    assert fastres.load(tmp_path / "half").dtype is torch.float16


def test_a_loaded_model_exports(residual_file, residual):
    program = torch.export.export(fastres.load(residual_file), (X,), strict=False)
    torch.testing.assert_close(program.module()(X), residual(X))


def test_loading_draws_no_random_numbers(residual_file):
    state = torch.get_rng_state()
    fastres.load(residual_file)
    assert torch.equal(state, torch.get_rng_state())


# ---- another process


FRESH = """
import json, sys
events = []
watched = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "socket.connect", "import")
sys.addaudithook(lambda event, args: events.append((event, str(args[0]))) if event in watched else None)
import torch, fastres
from safetensors.torch import load_file
fastres.load  # imports what it needs
import torch.fx, safetensors
torch.set_num_threads(1)
begin = len(events)
frozen = fastres.load(sys.argv[1])
seen = {event for event, _ in events[begin:]}
assert not seen - {"import"}, seen
names = {name for event, name in events[begin:] if event == "import"}
assert not [n for n in names if n.split(".")[0] in ("transformers", "torchvision", "timm")], names
tensors = load_file(sys.argv[2])
y = frozen(tensors["x"])
assert torch.equal(y, tensors["y"]) and y.stride() == tensors["y"].stride()
print("same")
"""


def test_a_fresh_process_gives_the_same_bits(residual, residual_file, tmp_path):
    """... and sees no pickle, no process, no package that the network does not need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        save_file({"x": X, "y": residual(X)}, tmp_path / "io")
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, "-c", FRESH, str(residual_file), str(tmp_path / "io")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "same\n", run.stderr


# ---- the file


def test_it_is_a_plain_safetensors_file(residual, residual_file):
    with safe_open(residual_file, "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "version", "fastres", "torch", "model", "sha256"}
    assert metadata["format"] == "fastres.frozen" and metadata["version"] == "1"
    assert metadata["fastres"] == fastres.__version__ and metadata["torch"] == torch.__version__
    tensors = load_file(residual_file)
    state = residual.module.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], t) for name, t in state.items())


def stored(module, inputs=1, outputs=1, **changes):
    """A Stored of a graph that was made by hand, called with `inputs` tensors, flat outputs."""
    args = tuple(range(inputs))
    fields = dict(
        module=module,
        signature=[],
        tree=tree_structure((args, {})),
        plain=(),
        inputs=[(("s0", 4), torch.float32)] * inputs,
        outputs=tree_structure(tuple(range(outputs))),
        batch=2,
        dtype=torch.float32,
        plan=Plan(),
        device=torch.device("cpu"),
        report=FreezeReport("Net", "float32", "cpu", []),
    )
    return json_model.Stored(**(fields | changes))


def constants(**tensors):
    """A network that returns its constants."""
    root, graph = nn.Module(), fx.Graph()
    graph.placeholder("x")
    for name, t in tensors.items():
        root.register_buffer(name, t)
    graph.output(tuple(graph.get_attr(name) for name in tensors))
    return fx.GraphModule(root, graph)


def through(path, module, **changes):
    module = module.eval()
    store.write(path, stored(module, **changes))
    return store.read(path)


def test_tensors_of_every_kind(tmp_path):
    tensors = {
        "f64": torch.randn(3, dtype=torch.float64),
        "f32": torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45]),
        "f16": torch.randn(2, 3).half(),
        "bf16": torch.randn(5).bfloat16(),
        **{f"i{d.itemsize}": torch.arange(-2, 3, dtype=d) for d in (torch.int64, torch.int32, torch.int16, torch.int8)},
        "u8": torch.arange(250, 256, dtype=torch.uint8),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "empty_too": torch.empty(2, 0, 4, dtype=torch.int64),
        "transposed": torch.randn(3, 5).t(),
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "last_1x1": torch.randn(2, 3, 1, 1).contiguous(memory_format=torch.channels_last),
        "last_3d": torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
        "slice": torch.randn(6, 4)[::2, 1:3],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "strideless": torch.randn(3).as_strided((1, 3), (0, 1)),
    }
    assert constants(**tensors).last_1x1.is_contiguous()
    got = through(tmp_path / "net", constants(**tensors), outputs=len(tensors)).module
    for (name, want), t in zip(tensors.items(), got(None), strict=True):
        assert t.dtype == want.dtype and t.shape == want.shape, name
        torch.testing.assert_close(t, want, rtol=0, atol=0, equal_nan=True)
        if name not in ("slice", "expanded", "strideless"):  # not dense: contiguous from now on
            assert t.stride() == want.stride(), name
        assert t.data_ptr() % 64 == 0 or not t.numel()
    assert torch.signbit(got.f32[1])


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    shared = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    root.a, root.b = nn.Linear(4, 4), nn.Linear(4, 4)
    root.a.weight = root.b.weight = shared
    root.register_buffer("c", shared.data)  # the same memory again, as a buffer
    root.register_buffer("d", shared.data[:2])  # a part of it: a tensor of its own
    root.register_buffer("e", torch.zeros(1))
    names = ["a.weight", "b.weight", "c", "d", "e"]
    graph.output((x, *(graph.get_attr(name) for name in names)))
    module = fx.GraphModule(root, graph)
    module.register_buffer("e", module.e, persistent=False)
    network = through(tmp_path / "net", module, outputs=6).module
    assert set(load_file(tmp_path / "net")) == {"a.weight", "d", "e"}
    assert network.a.weight is network.b.weight and isinstance(network.a.weight, nn.Parameter)
    assert network.c.data_ptr() == network.a.weight.data_ptr() and not isinstance(network.c, nn.Parameter)
    assert network.d.data_ptr() != network.a.weight.data_ptr()
    assert "e" not in network.state_dict() and "d" in network.state_dict()


def test_arguments_of_every_kind(tmp_path):
    aten, graph = torch.ops.aten, fx.Graph()
    x = graph.placeholder("x")
    n = graph.call_function(aten.sym_size.int, (x, 0))
    twice = graph.call_function(torch.sym_max, (graph.call_function(sys.modules["_operator"].mul, (n, 2)), 3))
    full = graph.call_function(aten.full.default, ([twice, 4], float("-inf")), dict(dtype=torch.float64, device="cpu"))
    full.kwargs = {**full.kwargs, "device": torch.device("cpu"), "layout": torch.strided, "pin_memory": False}
    last = graph.call_function(aten.clone.default, (full,), {"memory_format": torch.contiguous_format})
    parts = graph.call_function(aten.split.Tensor, (last, 2))
    first = graph.call_function(sys.modules["_operator"].getitem, (parts, 0))
    halves = graph.call_function(aten.div.Tensor_mode, (x, 2.5), {"rounding_mode": "floor"})
    index = graph.call_function(aten.index.Tensor, (x, [None, graph.call_function(aten.arange.default, (2,))]))
    graph.output((first, halves, index, None, 3, True, 0.1, "text", float("nan")))
    module = fx.GraphModule(nn.Module(), graph).eval()
    got = through(tmp_path / "net", module, outputs=9).module
    assert got.code == module.code
    x = torch.randn(3, 4)
    assert_same(got(x)[:-1], module(x)[:-1])


def test_names_that_no_file_may_use_are_others_in_it(tmp_path):
    names = ["a-b", "a b", "a_b", "größe", "__x", "a/b"]
    root, graph = nn.Module(), fx.Graph()
    graph.placeholder("x")
    for i, name in enumerate(names):
        root.add_module(name, nn.Module())
        root.get_submodule(name).register_buffer("w", torch.tensor(float(i)))
    graph.output(tuple(graph.get_attr(f"{name}.w") for name in names))
    got = through(tmp_path / "net", fx.GraphModule(root, graph), outputs=len(names)).module
    assert got(None) == tuple(range(len(names)))
    assert list(got.state_dict()) == ["a-b.w", "a_b.w", "a_b.w_", "a_b.w__", "gr__e.w", "m___x.w"]


def test_a_file_is_forgotten_once_it_is_loaded(residual, residual_file, tmp_path):
    path = tmp_path / "net"
    for spoil in (lambda: path.write_bytes(b"\xff" * path.stat().st_size), lambda: path.write_bytes(b""), path.unlink):
        path.write_bytes(residual_file.read_bytes())
        loaded = fastres.load(path)
        spoil()
        assert_same(loaded(X), residual(X))


# ---- whole or not at all


def test_paths(residual, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    residual.save("here")
    (tmp_path / "folder").mkdir()
    residual.save(tmp_path / "folder" / "über naß")
    (tmp_path / "link").symlink_to("folder/target")
    residual.save(tmp_path / "link")  # a link is followed
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "target").is_file()
    for path in ("here", tmp_path / "folder" / "über naß", "link", str(tmp_path / "here")):
        assert_same(fastres.load(path)(X), residual(X))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "here", "link", "target", "über naß"]
    (tmp_path / "usual").touch()
    assert (tmp_path / "here").stat().st_mode == (tmp_path / "usual").stat().st_mode
    (tmp_path / "here").chmod(0o640)
    residual.save("here")
    assert (tmp_path / "here").stat().st_mode & 0o777 == 0o640
    with pytest.raises(IsADirectoryError, match="folder"):
        residual.save(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        residual.save(tmp_path / "nowhere" / "net")
    with pytest.raises(TypeError):
        residual.save(3)
    with pytest.raises(TypeError):
        residual.save(b"bytes")


class Stop(BaseException):
    pass


@pytest.mark.parametrize("step", ["serialize_file", "_flush", "replace"])
@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), Stop()])
def test_a_failed_save_leaves_the_old_file_alone(residual, residual_file, tmp_path, monkeypatch, step, error):
    path = tmp_path / "net"
    path.write_bytes(residual_file.read_bytes())
    before = path.read_bytes()
    real = getattr(store, step, None) or os.replace

    def broken(*args, **kwargs):
        if step != "replace":
            real(*args, **kwargs)  # the temporary file is there, whole
        raise error

    monkeypatch.setattr(store.os if step == "replace" else store, step, broken)
    with pytest.raises(type(error)):
        fastres.load(residual_file).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_full_disk(residual_file, tmp_path):
    code = """
        import os, resource, signal, sys
        import fastres
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        frozen = fastres.load(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            frozen.save(sys.argv[2])
        except OSError as error:
            print("OSError", sys.argv[2] in str(error))
        print(os.listdir(os.path.dirname(sys.argv[2])))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(residual_file), str(tmp_path / "net")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "OSError True\n[]\n", run.stderr


def test_a_network_without_a_graph_is_refused(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return y if y.sum() > 0 else -y

    frozen = freeze(Branch())
    assert frozen.report.capture == "modules"
    (tmp_path / "net").write_bytes(b"old")
    with pytest.raises(
        fastres.FrozenFileError, match=r"net' is not written: Branch was frozen without a graph.*torch.exp"
    ):
        frozen.save(tmp_path / "net")
    assert (tmp_path / "net").read_bytes() == b"old" and os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.randn(3).to_sparse(), "sparse"),
        (torch.randn(3, dtype=torch.complex64), "complex64"),
        (torch.empty(3, device="meta"), "meta"),
        (torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), "qint8"),
        (torch.randn(3).as_subclass(type("Odd", (torch.Tensor,), {})), "Odd"),
    ],
)
def test_tensors_that_no_file_holds(tmp_path, value, words):
    with pytest.raises(fastres.FrozenFileError, match=f"node odd: .*{words}"):
        through(tmp_path / "net", constants(odd=value))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (torch.ops.aten.relu_.default, ("x",), "aten.relu_.default writes"),
        (torch.ops.aten.from_file.default, ("/etc/passwd",), "filename"),
        (torch.relu, ("x",), "built-in"),
        (getattr, ("x", "shape"), "getattr"),
        (torch.ops.aten.add.Tensor, ("x", 1j), "complex"),
        (torch.ops.aten.add.Tensor, ("x", 2**70), "int is no plain value"),
    ],
)
def test_calls_that_no_file_holds(tmp_path, function, args, words):
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(function, tuple(x if a == "x" else a for a in args))
    graph.output((y,))
    with pytest.raises(fastres.FrozenFileError, match=words):
        through(tmp_path / "net", fx.GraphModule(nn.Module(), graph))
    assert os.listdir(tmp_path) == []


def test_modules_and_structures_that_no_file_holds(tmp_path):
    root, graph = nn.Module(), fx.Graph()
    root.conv = nn.Conv2d(3, 4, 1)
    graph.output((graph.call_module("conv", (graph.placeholder("x"),)),))
    with pytest.raises(fastres.FrozenFileError, match="node conv: it calls a Conv2d"):
        through(tmp_path / "net", fx.GraphModule(root, graph))
    made = stored(constants(a=torch.ones(1)))
    made.outputs = tree_structure(defaultdict(list, a=1))  # its factory could be any function
    with pytest.raises(fastres.FrozenFileError, match="defaultdict"):
        store.write(tmp_path / "net", made)
    assert os.listdir(tmp_path) == []


# ---- what another package brings


def test_torchvision_operators(tmp_path):
    pytest.importorskip("torchvision")
    graph = fx.Graph()
    x, boxes = graph.placeholder("x"), graph.placeholder("boxes")
    y = graph.call_function(torch.ops.torchvision.roi_align.default, (x, boxes, 1.0, 2, 2, -1, False))
    graph.output((y,))
    module = fx.GraphModule(nn.Module(), graph).eval()
    got = through(tmp_path / "net", module, inputs=2).module
    boxes = torch.tensor([[0.0, 1, 1, 6, 7]])
    assert torch.equal(got(X, boxes)[0], module(X, boxes)[0])
    code = """
        import sys
        from fastres.inference import store
        sys.modules["torchvision"] = None
        try:
            store.read(sys.argv[1])
        except ValueError as error:
            print(error)
        del sys.modules["torchvision"]
        print(type(store.read(sys.argv[1])).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "net")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "it calls torchvision.roi_align: it needs torchvision, which does not import" in run.stdout, run.stderr
    assert run.stdout.endswith("\nStored\n")


def hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return freeze(transformers.ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)})


def test_hugging_face_outputs(tmp_path, monkeypatch):
    frozen, x = hugging_face(), torch.randn(3, 3, 32, 32)
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    out, want = loaded(pixel_values=x), frozen(pixel_values=x)
    assert type(out) is type(want) and torch.equal(out.logits, want.logits)
    assert_same(loaded(x, None), want)
    monkeypatch.setattr(json_specs, "_registered", lambda module, name: None)  # nothing has imported it
    monkeypatch.setitem(sys.modules, "transformers.modeling_outputs", None)  # nor can
    with pytest.raises(
        fastres.FrozenFileError, match=f"a {type(out).__name__}: it needs transformers, which does not imp"
    ):
        fastres.load(tmp_path / "net")


@pytest.mark.full
def test_hugging_face_outputs_in_a_fresh_process(tmp_path):
    """Loading imports the one module that registers the class of its output."""
    frozen = hugging_face()
    frozen.save(tmp_path / "net")
    code = """
        import sys, torch, fastres
        frozen = fastres.load(sys.argv[1])
        print(sorted(m for m in sys.modules if m in ("transformers", "transformers.models.resnet.modeling_resnet")))
        print(type(frozen(pixel_values=torch.ones(1, 3, 32, 32))).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "net")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "['transformers']\nImageClassifierOutputWithNoAttention\n", run.stderr


# ---- cost


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_of_loading_100_mb(tmp_path):
    """A process that loads 100 MB of weights grows by little more than that at its peak."""
    big = {f"w{i}": torch.randn(512, 512, 3, 3).contiguous(memory_format=torch.channels_last) for i in range(11)}
    store.write(tmp_path / "net", stored(constants(**big).eval(), outputs=11))
    code = """
        import sys
        from fastres.inference import store
        def peak():
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
        store.read(sys.argv[2])
        before = peak()
        kept = store.read(sys.argv[1])
        print(peak() - before)
    """
    store.write(tmp_path / "small", stored(constants(w=torch.randn(3)).eval()))
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "net"), str(tmp_path / "small")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    size = (tmp_path / "net").stat().st_size / 2**20
    assert 95 < size < 105 and float(run.stdout) < 1.2 * size
