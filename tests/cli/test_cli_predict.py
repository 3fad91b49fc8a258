"""`fastres predict`: what it prints and writes, resuming, a library's labels and transform, refusals as one line."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
import torch

for package in ("typer", "rich", "PIL"):
    pytest.importorskip(package)

from cli_cases import FASTRES, one_line, started  # noqa: E402
from fastres import cli  # noqa: E402
from fastres.lab.cards import card  # noqa: E402
from fastres.lab.named_models import build  # noqa: E402
from predict_cases import write_images  # noqa: E402

TINY = ["fastres:cifar_resnet8", "--image-size", "16", "--no-tune", "--workers", "0"]


def predict(*arguments) -> int:
    return cli.main(["predict", *map(str, arguments)])


def test_rows_on_standard_output(tmp_path, capsys):
    paths = write_images(tmp_path / "a", 3)
    (tmp_path / "labels.txt").write_text("".join(f"class {place}\n" for place in range(10)))
    assert predict(*TINY, tmp_path / "a", paths[0], "--top-k", 2, "--labels", tmp_path / "labels.txt") == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == list(map(str, [*paths, paths[0]]))
    assert rows[0]["labels"] == [f"class {place}" for place in rows[0]["classes"]] and len(rows[0]["scores"]) == 2
    first, second, last = err.splitlines()
    assert first.endswith("random weights (seed 0); load others with --weights FILE; 4 images")
    assert second.startswith("predicting 4/4, ") and last.startswith("4 rows, 0 of them errors; ")


def test_a_file_and_a_corrupt_image(tmp_path, capsys):
    paths = write_images(tmp_path / "a", 3)
    paths[1].write_bytes(b"damaged")
    out = tmp_path / "out.csv"
    assert predict(*TINY, tmp_path / "a", "--out", out) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{out}: 3 rows, 1 of them errors; ")
    assert [line.split(",")[2] for line in out.read_text().splitlines()[1:]] == [
        "",
        "no image: the bytes are of no format that Pillow reads",
        "",
    ]
    assert predict(*TINY, tmp_path / "a", "--out", out) == 2
    assert one_line(capsys) == f"fastres: --out: {out} exists, expected a new file: delete it or choose another name\n"


def test_a_frozen_file_is_a_model(tmp_path, capsys):
    write_images(tmp_path / "a", 2)
    saved = tmp_path / "net.fastres"
    assert cli.main(["freeze", *TINY[:4], "--save", str(saved)]) == 0
    capsys.readouterr()
    assert predict(saved, *TINY[1:], tmp_path / "a") == 0
    mine = capsys.readouterr().out
    assert predict(*TINY, tmp_path / "a") == 0
    for one, other in zip(
        *(map(json.loads, text.splitlines()) for text in (mine, capsys.readouterr().out)), strict=True
    ):
        assert one["classes"] == other["classes"] and one["scores"] == pytest.approx(other["scores"], rel=1e-3)
    assert predict(saved, tmp_path / "a", "--weights", saved) == 2
    assert "--weights: got" in one_line(capsys)


def test_interrupted_and_resumed(tmp_path):
    """Ctrl-C, then the same command; the rows are those of one run."""
    (tmp_path / "list.txt").write_text(f"{write_images(tmp_path / 'a', 1)[0]}\n" * 30_000)
    command = [*FASTRES, "predict", *TINY[:4], "--workers", "1", "--batch", "8", str(tmp_path / "list.txt")]
    command += ["--out", str(tmp_path / "out.jsonl")]
    with started(command) as process:
        assert "30000 images" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-2:] == ["interrupted; run the same command again to resume", "fastres: interrupted"]
    (tmp_path / "list.txt").write_text((tmp_path / "list.txt").read_text() + "another\n")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "images (30000, now 30001)" in again.stderr and again.stderr.count("\n") == 1


def test_refusals(tmp_path, capsys):
    write_images(tmp_path / "a", 1)
    (tmp_path / "file").touch()
    for arguments, text in (
        ((*TINY, tmp_path / "none"), "IMAGES: found nothing at "),
        ((*TINY, tmp_path / "a", "--out", "x.txt"), "--out: got 'x.txt', expected a name that ends in"),
        ((*TINY, tmp_path / "a", "--out", tmp_path / "file" / "x.csv"), "cannot be written: Not a directory"),
        ((*TINY, tmp_path / "a", "--dtype", "fp31"), "--dtype: got 'fp31', expected fp32"),
        ((*TINY, tmp_path / "a", "--labels", tmp_path / "none"), "cannot be read: No such file or directory"),
        ((*TINY, tmp_path / "a", "--labels", tmp_path / "file"), "--labels: got 0, expected 10"),
        (("fastres:none", tmp_path / "a"), "model: fastres has no network 'none'"),
        ((tmp_path / "file", tmp_path / "a"), "model: "),
        (TINY, "Missing argument 'IMAGES...'"),
    ):
        assert predict(*arguments) == 2, arguments
        assert text in one_line(capsys), arguments


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_torchvisions_published_weights_name_the_classes(tmp_path):
    models = pytest.importorskip("torchvision").models
    named, known = build("torchvision:resnet18"), models.ResNet18_Weights.IMAGENET1K_V1
    found = card(named, tmp_path / "resnet18-f37072fd.pth")
    assert found.labels == known.meta["categories"] and repr(found.transform) == repr(known.transforms())
    assert card(named, tmp_path / "mine.pth").labels is card(named, None).transform is None


def test_timms_configuration_is_the_transform():
    pytest.importorskip("timm")
    from PIL import Image

    found = card(build("timm:resnet18"), None)
    assert found.transform(Image.new("RGB", (300, 200))).shape == (3, 224, 224)


def test_a_hugging_face_folder_has_labels_and_a_processor(tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    small = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "layer_type": "basic", "embedding_size": 8}
    for names in ({0: "cat", 1: "dog"}, {0: "LABEL_0", 1: "LABEL_1"}):
        transformers.ResNetConfig(**small, id2label=names).save_pretrained(tmp_path)
        found = card(build(f"hf:{tmp_path}"), None)
        assert found.labels == (["cat", "dog"] if names[0] == "cat" else None) and found.transform is None
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    found = card(build(f"hf:{tmp_path}"), None)
    made = found.transform(Image.new("RGB", (100, 80), "white"))
    assert made.shape == (3, 64, 64) and made.dtype is torch.float32 and "ConvNext" in repr(found.transform)
