"""What predict makes of an image: modes, orientation, damage, the transform."""

from __future__ import annotations

import io
import os

import numpy
import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from fastres.pipelines.images import DEVIATION, MEAN, Decoder, Item  # noqa: E402
from predict_cases import CLASSES, net, predictions, run  # noqa: E402

GRADIENT = numpy.stack(
    [numpy.tile(numpy.arange(0, 240, 6, dtype=numpy.uint8), (30, 1))] * 3, 2
)  # dark left, [30, 40, 3]


def decoded(*files, size=28, transform=None):
    """(pixels as 0..255 floats, errors) of files, in batches as the network is given them."""
    decoder = Decoder(transform, size)
    batch = decoder.batch([Item(str(file)) for file in files])
    given = None if batch.images is None else decoder.given(batch.images)
    if given is not None and transform is None:
        given = (given * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    return given, batch.errors


def test_pixels_are_those_of_torchvisions_transform(tmp_path):
    """But for rounding, and for what a JPEG decoded smaller changes: a few of 255 levels for a smooth picture."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    x, y = numpy.meshgrid(numpy.arange(500), numpy.arange(375))
    picture = numpy.stack([(x + y) / 4, x / 2, 127 + 100 * numpy.sin(y / 40)], 2).astype(numpy.uint8)
    stock = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for name in ("a.png", "a.jpg"):
        Image.fromarray(picture).save(tmp_path / name)
        with Image.open(tmp_path / name) as file:
            want = torch.from_numpy(numpy.array(stock(file.convert("RGB")))).permute(2, 0, 1)
        got, errors = decoded(tmp_path / name, size=224)
        assert errors == [None] and got.shape == (1, 3, 224, 224)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert (got[0] - want).abs().mean() < 1 and (got[0] - want).abs().max() < 6


def test_modes_become_rgb(tmp_path):
    color = Image.fromarray(GRADIENT)
    gray = color.convert("L")
    alpha = color.copy()
    alpha.putalpha(Image.new("L", color.size, 3))  # nearly transparent: what is behind is not asked for
    deep = Image.fromarray(numpy.asarray(gray).astype(numpy.uint16) * 256)
    color.save(tmp_path / "rgb.png")
    gray.save(tmp_path / "l.png")
    alpha.save(tmp_path / "rgba.png")
    color.quantize(64).save(tmp_path / "p.png")
    deep.save(tmp_path / "i16.png")
    color.convert("CMYK").save(tmp_path / "cmyk.tif")
    color.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    gray.convert("LA").save(tmp_path / "la.png")
    color.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", color.size, "white")])
    for path in sorted(tmp_path.iterdir()):
        got, errors = decoded(tmp_path / "rgb.png", path)
        assert errors == [None, None], path
        assert (got[0] - got[1]).abs().mean() < 4, path


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_a_rotated_photo_is_turned_upright(tmp_path, suffix):
    upright = Image.fromarray(GRADIENT)
    upright.save(tmp_path / "upright.png")
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        upright.transpose(turn).save(path, exif=exif, quality=98)
        got, errors = decoded(tmp_path / "upright.png", path)
        assert errors == [None, None] and (got[0] - got[1]).abs().mean() < 4, orientation


def test_damage_is_an_error_of_its_row(tmp_path):
    good = io.BytesIO()
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(numpy.uint8)).save(good, "JPEG")
    (tmp_path / "0good.jpg").write_bytes(good.getvalue())
    (tmp_path / "1half.jpg").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    (tmp_path / "2text.png").write_text("no image")
    (tmp_path / "3empty.jpg").touch()
    (tmp_path / "4gone.jpg").symlink_to(tmp_path / "nowhere")
    rows = run(tmp_path, workers=1)
    assert [row["error"] for row in rows] == [
        None,
        rows[1]["error"],
        "no image: the bytes are of no format that Pillow reads",
        "no image: the bytes are of no format that Pillow reads",
        "No such file or directory",
    ]
    assert "truncated" in rows[1]["error"]
    assert [len(row["classes"]) for row in rows] == [5, 0, 0, 0, 0]
    assert [os.path.basename(row["path"])[0] for row in rows] == list("01234")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path):
    (tmp_path / "secret.png").touch(mode=0)
    assert [row["error"] for row in run(tmp_path)] == ["Permission denied"]
    tmp_path.chmod(0)
    try:
        with pytest.raises(ValueError, match="source: the folder .* cannot be read: Permission denied"):
            run(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_transform_of_the_callers(tmp_path):
    for name, size in (("a.png", (10, 12)), ("b.png", (10, 12)), ("c.png", (11, 12))):
        Image.new("RGB", size, "red").save(tmp_path / name)

    vector = torch.zeros(2)
    assert [row["error"] for row in run(tmp_path / "a.png", transform=lambda image: torch.ones(3, 9, 9))] == [None]
    rows = run(tmp_path, transform=lambda image: torch.ones(3, 9, 9 + image.size[0] % 10 * (image.size[0] < 20)))
    assert [row["error"] for row in rows] == [
        None,
        None,
        "transform: gave [3, 9, 10], expected [3, 9, 9] as for other images",
    ]
    for wrong, text in ((lambda image: image, "gave Image"), (lambda image: vector, r"gave torch.float32 \[2\]")):
        with pytest.raises(TypeError, match=f"transform: {text}, expected a floating tensor"):
            run(tmp_path, transform=wrong)


def test_an_answer_that_is_not_finite_is_an_error(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    broken = net()
    broken[-1].bias.data[0] = float("nan")
    (row,) = run(tmp_path, model=broken)
    assert row["error"] == "the network's answer is not finite" and row["classes"] == row["scores"] == []


def test_scores_are_the_models(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "a.png")
    model = net()
    (row,) = run(tmp_path, model=model, top_k=CLASSES + 3, labels=[f"class {place}" for place in range(CLASSES)])
    pixels, _ = decoded(tmp_path / "a.png", size=16)
    want = model((pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]).softmax(
        1
    )[0]
    assert sorted(row["classes"]) == list(range(CLASSES)) and row["scores"] == sorted(row["scores"], reverse=True)
    torch.testing.assert_close(torch.tensor(row["scores"]), want[row["classes"]], rtol=1e-4, atol=1e-5)
    assert row["labels"] == [f"class {place}" for place in row["classes"]] and row["row"] is None


def test_workers_change_nothing(tmp_path):
    for place in range(9):
        Image.fromarray(GRADIENT + place).save(tmp_path / f"{place}.png")
    assert run(tmp_path, workers=2, batch=4) == run(tmp_path, workers=0, batch=4)


def test_half_precision(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "a.png")
    rows = predictions(tmp_path, dtype="bf16")
    assert rows.model.dtype is torch.bfloat16 and sum(next(rows)["scores"]) <= 1.001
