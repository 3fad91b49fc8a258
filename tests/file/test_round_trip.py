"""FrozenModel.save and fastres.load: the same network, bit for bit, in one plain file."""

import copy
import dataclasses
import operator
import re
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastres
from fastres.graph.steps import Slot
from fastres.inference.file import store
from fastres.verify.verdict import Row, Verification
from file_cases import Residual, X, assert_same, aten, content, freeze, run, stored, through
from swap_cases import hugging_face_resnet, scramble

Pair = namedtuple("Pair", ["image", "rest"])


@dataclasses.dataclass
class Scores:
    logits: object
    aux: object = None


torch.export.register_dataclass(Scores)


class Several(nn.Module):
    """Two inputs, a flag, keywords; outputs in every kind of structure."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.bn, self.kind = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), kind

    def forward(self, image, mask=None, *, scale=1.0, mode="plain", act=torch.relu):
        y = self.bn(self.conv(image)) * scale
        y = y if mask is None else y * mask
        y = y.relu() if mode == "relu" else y
        kinds = {
            "tuple": lambda: (y, None, 7, [y.sum(), {"a": y.mean()}]),
            "dict": lambda: {"out": y, "aux": {"z": y.amax(1)}, 3: y + 1},
            "ordered": lambda: OrderedDict(b=y, a=y.abs()),
            "named": lambda: Pair(y, (y + 1, torch.arange(3))),
            "max": lambda: torch.max(y, 1),
            "dataclass": lambda: Scores(y, Scores((y.sum(), y.abs()))),
            "one": lambda: y,
        }
        return kinds[self.kind]()


def assert_same_network(got, want):
    mine, its = got.state_dict(), want.state_dict()
    assert list(mine) == list(its)
    for name, t in its.items():
        assert torch.equal(mine[name], t) and mine[name].dtype == t.dtype and mine[name].stride() == t.stride(), name
    assert str(got.graph) == str(want.graph) and [s.name for s in got.graph.steps] == [s.name for s in want.graph.steps]
    assert str(got.report) == str(want.report) and got.report.to_dict() == want.report.to_dict()
    assert got.dtype is want.dtype and got.plan == want.plan and not got.training
    assert not any(t.requires_grad for t in got.state_dict().values())


def saved(frozen, path):
    frozen.save(path)
    return fastres.load(path)


# ---- the same network


def test_same_outputs_and_tensors(residual, residual_file):
    loaded = fastres.load(residual_file)
    assert_same_network(loaded, residual)
    x = X.clone()
    x[0, 0, 0, 0] = float("nan")
    for images in (*(torch.randn(batch, 3, 12, 12) for batch in (0, 1, 2, 5)), x):
        assert_same(loaded(images), residual(images))
    operators = {str(step.operator) for step in loaded.graph.steps}
    assert {"fastres.conv_act.default", "fastres.bn_act.default", "aten.softmax.int"} <= operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_dtypes_and_layouts(tmp_path, dtype, channels_last):
    frozen = freeze(Residual(), dtype=dtype)
    frozen.use_channels_last(channels_last)
    loaded = saved(frozen, tmp_path / "net")
    assert_same_network(loaded, frozen)
    assert_same(loaded(X), frozen(X))


def test_the_plan_of_a_tuned_network(tmp_path):
    frozen = fastres.freeze(scramble(Residual()).eval(), torch.randn(9, 3, 12, 12))
    frozen.plan.images_at_a_time = 4
    executor, inputs, constants = frozen.prepared(X)
    found = executor.find_choices(inputs, constants)
    frozen.choose({choices.key: list(choices.ways)[-1] for choices, _ in found})
    assert frozen.plan.choices
    loaded = saved(frozen, tmp_path / "net")
    assert_same_network(loaded, frozen)
    assert loaded.report.verification and loaded.report.verification.rows == frozen.report.verification.rows
    y = torch.randn(11, 3, 12, 12)
    assert_same(loaded(y), frozen(y))
    part = loaded._prepare("", y[:4])  # the ways taken are the executor's own record
    frozen(part), loaded(part)
    assert loaded._network.executor.ways([part]) == frozen._network.executor.ways([part]) != {}


def test_a_verdict_that_failed_is_kept(residual, tmp_path):
    good = Row("out", "output", (2,), "float32", *(0.0,) * 6, 1.0, True)
    bad = dataclasses.replace(good, ratio=float("inf"), passed=False, message="off")
    frozen = copy.deepcopy(residual)
    verdict = Verification((good, bad), "float32", False, False)
    frozen.report = dataclasses.replace(residual.report, verification=verdict)
    again = saved(frozen, tmp_path / "net").report.verification
    assert again.rows == (good, bad) and not again.passed


@pytest.mark.parametrize("kind", ["tuple", "dict", "ordered", "named", "max", "dataclass", "one"])
def test_outputs_of_any_structure(tmp_path, kind):
    frozen = freeze(Several(kind))
    loaded = saved(frozen, tmp_path / "net")
    assert_same(loaded(X), frozen(X))
    assert type(loaded(X)) is type(frozen(X))


def test_the_call_is_the_source_s(tmp_path):
    mask = torch.rand(2, 1, 12, 12)
    frozen = freeze(Several("one"), {"image": X, "mask": mask, "scale": 0.5, "mode": "relu"})
    loaded = saved(frozen, tmp_path / "net")
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
    """One of the defaults, a function, is no plain data: the file says that there is one."""
    frozen = freeze(Several("one"))
    loaded = saved(frozen, tmp_path / "net")
    for model in (loaded, saved(loaded, tmp_path / "again")):
        for call in ({}, {"mask": None, "mode": "".join(["pl", "ain"])}, {"scale": float("1.0")}):
            assert_same(model(X, **call), frozen(X))


def test_what_a_loaded_model_says_and_refuses(residual_file, residual, tmp_path):
    loaded = fastres.load(residual_file)
    assert loaded.is_stale() is False
    with pytest.raises(RuntimeError, match="source is gone"):
        loaded.refresh()
    with pytest.raises(RuntimeError, match=r"\[N, 3, H, W\]"):
        loaded(torch.randn(2, 4, 16, 16))
    with pytest.raises(RuntimeError, match="snapshot"):
        loaded.train()
    loaded.save(tmp_path / "again")  # what is loaded can be saved, and is the same
    assert (tmp_path / "again").read_bytes() == residual_file.read_bytes()
    assert saved(fastres.load(residual_file).half(), tmp_path / "half").dtype is torch.float16


def test_attributes_of_the_source_come_along(tmp_path):
    net = Residual()
    net.size, net.names, net.limit, net.odd = (6, 6), ["a"], 2**70, object()
    loaded = saved(freeze(net), tmp_path / "net")
    assert (loaded.size, loaded.names, loaded.limit) == ((6, 6), ["a"], 2**70) and not hasattr(loaded, "odd")


def test_a_loaded_model_exports_and_draws_no_random_numbers(residual_file, residual):
    state = torch.get_rng_state()
    loaded = fastres.load(residual_file)
    assert torch.equal(state, torch.get_rng_state())
    program = torch.export.export(loaded, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), residual(X))


def test_another_device(residual_file):
    loaded = fastres.load(residual_file, device="meta")
    assert loaded.device.type == "meta" and loaded(X.to("meta")).shape == (2, 5)


# ---- another process


FRESH = """
import sys
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
    output, errors = run(FRESH, residual_file, tmp_path / "io").communicate()
    assert output == "same\n", errors


# ---- the file


def test_it_is_a_plain_safetensors_file(residual, residual_file):
    metadata, _ = content(residual_file)
    assert set(metadata) == {"format", "version", "fastres", "torch", "model", "sha256"}
    assert metadata["format"] == "fastres.frozen" and metadata["version"] == "3"
    assert metadata["fastres"] == fastres.__version__ and metadata["torch"] == torch.__version__
    tensors, state = load_file(residual_file), residual.weights.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], t) for name, t in state.items())


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
        "slice": torch.randn(6, 4)[::2, 1:3],
        "expanded": torch.randn(3, 1).expand(3, 4),
    }
    loaded = through(tmp_path / "net", outputs=tuple(Slot(i + 1) for i in range(len(tensors))), tensors=tensors)
    for (name, want), t in zip(tensors.items(), loaded(torch.ones(2, 4)), strict=True):
        assert t.dtype == want.dtype and t.shape == want.shape and t.is_contiguous(), name
        torch.testing.assert_close(t, want, rtol=0, atol=0, equal_nan=True)
        assert t.data_ptr() % 64 == 0 or not t.numel()
    assert torch.signbit(loaded.weights.f32[1])


def test_arguments_of_every_kind(tmp_path):
    full = {"dtype": torch.float64, "device": torch.device("cpu"), "layout": torch.strided, "pin_memory": False}
    steps = [
        (aten.sym_size.int, (Slot(0), 0)),
        (operator.mul, (Slot(1), 2)),
        (torch.sym_max, (Slot(2), 3)),
        (aten.full.default, ([Slot(3), 4], float("-inf")), full),
        (aten.clone.default, (Slot(4),), {"memory_format": torch.contiguous_format}),
        (aten.split.Tensor, (Slot(5), 2)),
        (operator.getitem, (Slot(6), 0)),
        (aten.div.Tensor_mode, (Slot(0), 2.5), {"rounding_mode": "floor"}),
        (aten.arange.default, (2,)),
        (aten.index.Tensor, (Slot(0), [None, Slot(9)])),
        (aten.pow.Tensor_Scalar, (Slot(0),), {"exponent": 2}),
    ]
    outputs = (Slot(7), Slot(8), Slot(10), Slot(11), None, 3, True, 0.1, "text", float("nan"))
    network = stored(steps, outputs)
    store.write(tmp_path / "net", network)
    loaded = fastres.load(tmp_path / "net")
    assert str(loaded.graph) == str(network.calls[0][0])
    x = torch.randn(3, 4)
    got = loaded(x)
    assert_same(got[:4], (torch.full((2, 4), float("-inf")).double(), x.div(2.5).floor(), x[:, :2].clone(), x.pow(2)))
    assert got[4:9] == outputs[4:9] and got[9] != got[9]


def test_a_file_is_forgotten_once_it_is_loaded(residual, residual_file, tmp_path):
    path = tmp_path / "net"
    for spoil in (lambda: path.write_bytes(b"\xff" * path.stat().st_size), lambda: path.write_bytes(b""), path.unlink):
        path.write_bytes(residual_file.read_bytes())
        loaded = fastres.load(path)
        spoil()
        assert_same(loaded(X), residual(X))


# ---- what another package brings


def hub_model():
    library = hugging_face_resnet()
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return library.ResNetForImageClassification(library.ResNetConfig(**options))


def test_hugging_face_models(tmp_path):
    frozen, x = freeze(hub_model(), {"pixel_values": torch.randn(2, 3, 32, 32)}), torch.randn(3, 3, 32, 32)
    loaded = saved(frozen, tmp_path / "net")
    assert_same(loaded(pixel_values=x), frozen(pixel_values=x))
    assert_same(loaded(x, None), frozen(pixel_values=x))
    assert type(loaded) is type(frozen) and loaded.config.to_dict() == frozen.config.to_dict()
    refused_without("transformers.modeling_outputs", "its output is a .*: it needs transformers", tmp_path / "net")


def test_torchvision_operators(tmp_path):
    pytest.importorskip("torchvision")
    align = torch.ops.torchvision.roi_align.default
    x, boxes = torch.randn(1, 2, 4, 4), torch.tensor([[0.0, 1, 1, 3, 3]] * 8)
    steps = [
        (aten.reshape.default, (Slot(0), [1, 2, 4, 4])),
        (aten.constant_pad_nd.default, (Slot(1), [1, 0])),
        (align, (Slot(2), Slot(3), 1.0, 2, 2, -1, False)),
    ]
    loaded = through(tmp_path / "net", steps, (Slot(4),), inputs=2)
    assert torch.equal(loaded(x.view(8, 4), boxes[:, 1:])[0], align(x, boxes, 1.0, 2, 2, -1, False))
    refused_without("torchvision", "it calls torchvision.roi_align.default: it needs torchvision", tmp_path / "net")


def refused_without(module, words, path):
    """In a fresh process: refused where `module` does not import, loaded where it does, by that import alone."""
    code = """
        import sys, fastres
        sys.modules[sys.argv[2]] = None
        try:
            fastres.load(sys.argv[1])
        except ValueError as error:
            print(error)
        del sys.modules[sys.argv[2]]
        fastres.load(sys.argv[1])
        print(sys.argv[2] in sys.modules, "transformers.models.resnet.modeling_resnet" in sys.modules)
    """
    output, errors = run(code, path, module).communicate()
    assert re.search(words, output) and output.endswith("\nTrue False\n"), (output, errors)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_of_loading_100_mb(tmp_path):
    """A process that loads 100 MB of weights grows by little more than that at its peak."""
    big = {f"w{i}": torch.randn(512, 512, 3, 3) for i in range(11)}
    store.write(tmp_path / "net", stored(outputs=tuple(Slot(i + 1) for i in range(11)), tensors=big))
    store.write(tmp_path / "small", stored(outputs=(Slot(1),), tensors={"w": torch.randn(3)}))
    code = """
        import sys
        from fastres.inference.file import store
        def peak():
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
        store.read(sys.argv[2])
        before = peak()
        kept = store.read(sys.argv[1])
        print(peak() - before)
    """
    output, errors = run(code, tmp_path / "net", tmp_path / "small").communicate()
    size = (tmp_path / "net").stat().st_size / 2**20
    assert 95 < size < 105 and float(output) < 1.2 * size, errors
