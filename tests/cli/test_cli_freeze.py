"""`fastres freeze`: every way to name a network, weights, the files it writes, every refusal as one line."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from safetensors.torch import save_file  # noqa: E402

import fastres  # noqa: E402
from cli_cases import one_line  # noqa: E402
from fastres import cli, models  # noqa: E402
from fastres.lab import freeze_command, named_models  # noqa: E402
from fastres.lab.named_models import RANDOM, build  # noqa: E402

SMALL = ["fastres:cifar_resnet8", "--image-size", "16", "--no-tune"]
FILE = """
import torch
from torch import nn
import neighbor  # beside this file

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

class Branch(Net):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x

ready = Net()
number = 3

def two(wide=neighbor.WIDE):
    return nn.Sequential(nn.Conv2d(2, wide, 3), nn.BatchNorm2d(wide), nn.ReLU())

def nothing():
    return "nothing"

def broken():
    raise KeyError("no such layer")

def leaves():
    raise SystemExit(3)

def quantized():
    return torch.ao.nn.quantized.Conv2d(3, 4, 3)
"""


def freeze(*arguments: str) -> int:
    return cli.main(["freeze", *arguments])


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbor.py").write_text("WIDE = 6\n")
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path / "net.py"


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if a network is frozen."""
    monkeypatch.setattr(freeze_command, "freeze_model", None)


# ---- what it shows and writes ----------------------------------------------------------------------------------------


def test_the_report_and_its_first_line(capsys):
    assert freeze(*SMALL, "--report", "--batch", "2") == 0
    out, err = capsys.readouterr()
    first, second, *rest = out.splitlines()
    assert err == "" and first.startswith(f"fastres:cifar_resnet8: {RANDOM}; example 2x3x16x16; ")
    assert second.startswith("CifarResNet: 7 of 7 convolutions") and any("verify: passed" in line for line in rest)
    assert freeze(*SMALL) == 0
    short = capsys.readouterr().out.splitlines()
    assert len(short) == 2 and short[1] == second


def test_json_holds_the_report_and_how_it_was_made(tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert freeze(*SMALL, "--dtype", "bf16", "--json", str(path)) == 0
    assert f"report: {path}\n" in capsys.readouterr().out
    data = json.loads(path.read_text())
    assert data["schema"] == "fastres.freeze/1" and data["command"].startswith("fastres freeze fastres:cifar_resnet8")
    assert data["example"] == [1, 3, 16, 16] and data["weights"] == RANDOM and data["device"] == "cpu"
    assert data["report"]["folded"] == 7 and data["report"]["dtype"] == "bfloat16"
    assert data["report"]["verification"]["passed"] is True and data["versions"]["torch"]
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_saved_network_answers_as_its_source(tmp_path, file, capsys):
    path = tmp_path / "new" / "net.fastres"
    assert freeze(f"{file}:ready", "--image-size", "8", "--no-tune", "--save", str(path)) == 0
    assert f"frozen model: {path}\n" in capsys.readouterr().out
    loaded, x = fastres.load(path), torch.randn(3, 3, 8, 8)
    assert loaded.report.folded == 1 and loaded.report.verification
    assert loaded(x).shape == (3, 4, 6, 6)
    assert [file.name for file in path.parent.iterdir()] == ["net.fastres"]


def test_what_no_file_can_hold_is_not_saved(tmp_path, file, capsys):
    path = tmp_path / "net.fastres"
    assert freeze(f"{file}:Branch", "--image-size", "8", "--no-tune", "--save", str(path)) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastres: --save: path: ") and "was frozen without a graph" in err and err.count("\n") == 1
    assert not path.exists()


def test_tuning_is_on_unless_told_otherwise(capsys):
    assert freeze("fastres:cifar_resnet8", "--image-size", "16x24", "--report") == 0
    out = capsys.readouterr().out
    assert "example 1x3x16x24" in out and "x eager" in out
    assert freeze(*SMALL, "--report") == 0
    assert "x eager" not in capsys.readouterr().out


def test_what_the_referee_rejects_is_shown_and_not_saved(tmp_path, capsys, monkeypatch):
    def wrong(model, images, **options):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.fc.bias.add_(0.1)
        frozen = fastres.freeze(other, images, **{**options, "verify": False})
        frozen.report.verification = fastres.verify(model, frozen, images, backward=False, training=False)
        return frozen

    monkeypatch.setattr(freeze_command, "freeze_model", wrong)
    saved = []
    monkeypatch.setattr(freeze_command.FrozenModel, "save", lambda self, path: saved.append(path), raising=False)
    assert freeze(*SMALL, "--report", "--json", str(tmp_path / "x.json"), "--save", str(tmp_path / "x")) == 1
    out, err = capsys.readouterr()
    assert "verify: FAILED" in out and not saved
    assert err.startswith("fastres: the referee rejects the frozen ") and err.count("\n") == 1
    assert json.loads((tmp_path / "x.json").read_text())["report"]["verification"]["passed"] is False


def test_a_terminal_shows_what_is_being_done(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert freeze(*SMALL) == 0
    err = capsys.readouterr().err
    assert "freezing fastres:cifar_resnet8" in err


# ---- naming a network ------------------------------------------------------------------------------------------------


def test_torchvision_and_fastres(capsys):
    torchvision = pytest.importorskip("torchvision")
    assert freeze("torchvision:resnet18", "--image-size", "32", "--no-tune") == 0
    assert "ResNet: 20 of 20 convolutions" in capsys.readouterr().out
    torch.manual_seed(0)
    wanted = torchvision.models.resnet18().state_dict()
    assert build("fastres:cifar_plain8", channels=1).model.conv1.in_channels == 1
    assert isinstance(build("fastres:resnet18").model, models.ResNet)
    made = build("torchvision:resnet18")
    assert not made.model.training and made.weights == RANDOM
    assert all(torch.equal(t, wanted[name]) for name, t in made.model.state_dict().items())


def test_torchvision_downloads_no_backbone(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    assert type(build("torchvision:lraspp_mobilenet_v3_large").model).__name__ == "LRASPP"


def test_timm_with_other_channels(capsys):
    pytest.importorskip("timm")
    assert freeze("timm:resnet10t", "--image-size", "32", "--channels", "1", "--no-tune") == 0
    out = capsys.readouterr().out
    assert "example 1x1x32x32" in out and RANDOM in out


@pytest.fixture
def hub(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    net = transformers.ResNetForImageClassification(config)
    config.architectures = ["ResNetForImageClassification"]
    return net, tmp_path / "hub"


def test_hugging_face_folder_with_weights(hub, capsys):
    net, folder = hub
    net.save_pretrained(folder)
    capsys.readouterr()
    made = build(f"hf:{folder}")
    assert made.weights == f"weights of {folder} (ResNetForImageClassification)"
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in made.model.state_dict().items())
    assert freeze(f"hf:{folder}", "--image-size", "32", "--no-tune") == 0
    out, err = capsys.readouterr()
    assert err == "" and f"hf:{folder}: weights of {folder}" in out and "convolutions" in out


def test_hugging_face_folder_without_weights(hub, capsys):
    net, folder = hub
    net.config.save_pretrained(folder)
    assert freeze(f"hf:{folder}/config.json", "--image-size", "32", "--no-tune") == 0
    out, err = capsys.readouterr()
    assert err == "" and f"{RANDOM} (ResNetForImageClassification)" in out
    assert build(f"hf:{folder}", channels=1).model.config.num_channels == 1


def test_hugging_face_weights_of_another_network(hub, no_work, capsys):
    net, folder = hub
    net.config.save_pretrained(folder)
    state = {name: t for name, t in net.state_dict().items() if "classifier" not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert freeze(f"hf:{folder}", "--image-size", "32") == 2
    assert "missing_keys classifier.1.bias, classifier.1.weight" in one_line(capsys)


def test_a_function_of_a_file(file, capsys):
    assert freeze(f"{file}:two", "--image-size", "8", "--channels", "2", "--no-tune") == 0
    assert f"{file}:two: weights as {file}:two makes them; example 1x2x8x8" in capsys.readouterr().out
    assert build(f"{file}:two").model[0].out_channels == 6
    assert type(build(f"{file}:Net").model).__name__ == type(build(f"{file}:ready").model).__name__ == "Net"
    assert str(file.parent) not in sys.path


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_from_a_file(tmp_path, capsys, suffix):
    state = models.cifar_resnet(8).state_dict()
    path = tmp_path / f"net{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    made = build("fastres:cifar_resnet8", path)
    assert all(torch.equal(t, state[name]) for name, t in made.model.state_dict().items())
    assert freeze(*SMALL, "--weights", str(path)) == 0
    assert f"fastres:cifar_resnet8: weights of {path}; example" in capsys.readouterr().out


@pytest.mark.parametrize(  # what else a file can be: test_lab.py
    ("make", "message"),
    [
        (
            lambda path: save_file(models.cifar_resnet(8, num_classes=3).state_dict(), path),
            "got shape [3] for 'fc.bias', expected [10]",
        ),
        (lambda path: path.write_bytes(b"\0" * 64), "cannot be read"),
        (lambda path: None, "got no such file"),
    ],
)
def test_bad_weights(no_work, tmp_path, capsys, make, message):
    path = tmp_path / "net.safetensors"
    make(path)
    assert freeze(*SMALL, "--weights", str(path)) == 2
    line = one_line(capsys)
    assert f"weights {path}: " in line and message in line and "fastres:cifar_resnet8" in line


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL"),
        (["resnet50"], "model: got 'resnet50', expected torchvision:NAME, timm:NAME"),
        (["keras:resnet50"], "model: got 'keras:resnet50', expected torchvision:NAME"),
        (["torchvision:"], "model: got 'torchvision:', expected"),
        (["torchvision:resnet5"], "torchvision has no network 'resnet5'; did you mean resnet50"),
        (["timm:resnet50q"], "timm has no network 'resnet50q'; did you mean"),
        (["fastres:resnet19"], "fastres has no network 'resnet19'; did you mean resnet18"),
        (["fastres:cifar_resnet9"], "fastres:cifar_resnet9 cannot be built: ValueError: depth: got 9, expected 6n + 2"),
        (["hf:{tmp}/none"], "none: got no such folder, expected a local folder"),
        (["hf:{tmp}"], "got a folder without config.json"),
        (["{tmp}/none.py:make"], "got no such file {tmp}/none.py in"),
        (["{tmp}/net.py:"], "got '', which is not a name"),
        (["{tmp}/net.py:tow"], "{tmp}/net.py has no function 'tow'; did you mean two?"),
        (["{tmp}/net.py:number"], "has no function 'number'"),
        (["{tmp}/net.py:nothing"], "{tmp}/net.py:nothing gave a str, expected an nn.Module"),
        (["{tmp}/net.py:broken"], "cannot be built: KeyError: 'no such layer' (line 24)"),
        (["{tmp}/net.py:leaves"], "cannot be built: SystemExit: 3 (line 27)"),
        (["{tmp}/neighbor.py:f"], "{tmp}/neighbor.py has no function 'f'"),
        ([*SMALL, "--image-size", "0"], "--image-size: got '0', expected a number of pixels"),
        ([*SMALL, "--image-size", "-3"], "--image-size: got '-3'"),
        ([*SMALL, "--image-size", "8x8x8"], "--image-size: got '8x8x8'"),
        ([*SMALL, "--image-size", "9" * 9], "--image-size: got '999999999'"),
        ([*SMALL, "--batch", "0"], "Invalid value for '--batch'"),
        ([*SMALL, "--batch", "two"], "--batch"),
        ([*SMALL, "--channels", "0"], "Invalid value for '--channels'"),
        ([*SMALL, "--dtype", "int4"], "--dtype: got 'int4', expected fp32, fp16, bf16"),
        ([*SMALL, "--device", "cuda:99"], "device: got 'cuda:99', but this machine has"),
        ([*SMALL, "--device", "meta"], "device: got 'meta', expected auto"),
        ([*SMALL, "--json", "{tmp}/net.py/x.json"], "output folder {tmp}/net.py: cannot be written"),
        ([*SMALL, "--json", "{tmp}"], "got a folder, expected a file or nothing"),
        ([*SMALL, "--save", "{tmp}/net.py/x"], "output folder {tmp}/net.py: cannot be written"),
        ([*SMALL, "--save", "{tmp}"], "got a folder, expected a file or nothing"),
        ([*SMALL, "--fast"], "--fast"),
        (["torchvision:resnet18", "--channels", "1"], "does not run on images of [1, 1, 224, 224]: "),
        (["torchvision:vgg11", "--image-size", "8"], "does not run on images of [1, 3, 8, 8]: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_line_before_any_work(no_work, file, capsys, arguments, message):
    library = arguments[0].partition(":")[0] if arguments else ""
    if library in ("torchvision", "timm"):
        pytest.importorskip(library)
    elif library == "hf":
        pytest.importorskip("transformers")
    tmp = str(file.parent)
    assert freeze(*(argument.replace("{tmp}", tmp) for argument in arguments)) == 2
    assert message.replace("{tmp}", tmp) in one_line(capsys)


@pytest.mark.parametrize(
    ("name", "package"), [("torchvision:resnet18", "torchvision"), ("timm:resnet18", "timm"), ("hf:x", "transformers")]
)
def test_a_missing_library_is_named_with_its_command(no_work, monkeypatch, capsys, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert freeze(name) == 2
    assert one_line(capsys) == f"fastres: model: {package} is not installed: pip install {package}\n"


def test_a_library_that_does_not_import(no_work, monkeypatch, capsys):
    pytest.importorskip("timm")

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(named_models.importlib, "import_module", broken)
    assert freeze("timm:resnet18") == 2
    assert "timm cannot be imported: RuntimeError: operator torchvision::nms does not exist\n" in one_line(capsys)


def test_what_freeze_refuses_is_one_line(file, capsys, monkeypatch):
    def refuses(*args, **kwargs):
        raise TypeError("model: it is quantized, expected a float model")

    monkeypatch.setattr(freeze_command, "freeze_model", refuses)
    assert freeze(f"{file}:two", "--channels", "2") == 2
    assert f"{file}:two: model: it is quantized, expected a float model" in one_line(capsys)


# ---- int8 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    for i in range(20):
        noise = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=rng).numpy()
        image.fromarray(noise).resize((24, 20)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_int8(tmp_path, pictures, capsys):
    path, report = tmp_path / "net.fastres", tmp_path / "report.json"
    given = ["--dtype", "int8", "--calibrate", str(pictures), "--save", str(path), "--json", str(report)]
    assert freeze(*SMALL, *given, "--report") == 0
    out = capsys.readouterr().out
    assert "int8: layers: 8 int8; ranges by mse of 20 calibration images" in out and "passed: SNR" in out
    assert out.count(" int8 ") >= 8
    loaded = fastres.load(path)
    assert loaded.is_quantized and loaded(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert json.loads(report.read_text())["report"]["quantization"]["holds"] is True
    assert freeze(*SMALL, *given[:4]) == 0
    assert "int8: layers: 8 int8" in capsys.readouterr().out


def test_int8_refusals(tmp_path, pictures, no_work, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        (["--dtype", "int8"], "--calibrate: got none, expected a folder of images for --dtype int8"),
        (["--calibrate", str(pictures)], "expected --dtype int8 with it"),
        (["--dtype", "int8", "--calibrate", str(pictures), "--channels", "1"], "--channels: got 1, expected 3"),
        (["--dtype", "int8", "--calibrate", str(pictures), "--image-size", "16x24"], "expected a square"),
        (["--dtype", "int4"], "--dtype: got 'int4', expected fp32"),
    ):
        assert freeze(*SMALL, *arguments) == 2
        assert words in one_line(capsys)


def test_int8_without_an_image_that_can_be_read(tmp_path, capsys):
    pytest.importorskip("PIL")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for folder in (tmp_path, tmp_path / "none"):
        assert freeze(*SMALL, "--dtype", "int8", "--calibrate", str(folder)) == 2
        assert "--calibrate: " in one_line(capsys)
