"""fastres.lab: recipes, data sets and their order, augmentation, test-time views; what is missing or corrupt."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pickle

import pytest
import torch

from fastres.lab import recipes
from fastres.lab.augment import augmented, draw, multi_scale, ten_crops
from fastres.lab.datasets import InMemory, Part, load, order, stream
from fastres.lab.errors import DataError, LabError, RecipeError
from fastres.pipelines.images import DEVIATION, MEAN
from own_process import own_process
from train_runs import write_images

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(kind="none", batch_size=4, iterations=10):
    return recipes.TrainRecipe("small", batch_size, iterations, 0.1, (), augment=kind)


def set_of(images, classes=2):
    labels = torch.arange(len(images)) % classes
    return InMemory("made", classes, (images, labels), (images[:5], labels[:5]))


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_the_papers_schedules():
    cifar, deep, imagenet = (recipes.recipe(name) for name in ("cifar10", "cifar10-110", "imagenet"))
    assert (cifar.batch_size, cifar.iterations, cifar.momentum, cifar.weight_decay) == (128, 64_000, 0.9, 1e-4)
    at = (0, 31_999, 32_000, 47_999, 48_000, 63_999)
    assert [cifar.lr_at(t) for t in at] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert dataclasses.replace(deep, name="cifar10", warmup_lr=None) == cifar
    assert deep.lr_at(0, warmed_up=False) == 0.01 == deep.lr_at(10_000, False) and deep.lr_at(400, True) == 0.1
    assert deep.warmup_until_error == 0.8
    assert (imagenet.batch_size, imagenet.iterations, imagenet.lr) == (256, 600_000, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected an integer of at least 1"),
        ({"iterations": 1.5}, "iterations: got 1.5"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"milestones": (20, 10)}, r"milestones: got \(20, 10\)"),
        ({"augment": "mixup"}, "augment: got 'mixup', expected one of cifar"),
        ({"decay": "bn"}, "decay: got 'bn', expected one of all, convolutions"),
        ({"bn_batch": 48}, "bn_batch: got 48, expected a divisor of batch_size, 128"),
    ],
)
def test_a_recipe_refuses(change, message):
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(recipes.recipe("cifar10"), **change)
    with pytest.raises(RecipeError, match="recipe: got 'sgd', expected one of cifar10"):
        recipes.recipe("sgd")


# ---- order -----------------------------------------------------------------------------------------------------------


def test_every_image_once_an_epoch_and_nothing_is_left_out():
    row = torch.cat([order(10, 4, seed=3, iteration=i) for i in range(10)])  # four epochs
    epochs = row.split(10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert not torch.equal(row[:10], order(10, 10, seed=4, iteration=0))
    assert torch.equal(order(3, 7, 0, 5), torch.cat([order(3, 1, 0, i) for i in range(35, 42)]))


@pytest.mark.parametrize("kind", ["none", "cifar", "digits", "imagenet"])
def test_batches_are_a_function_of_seed_and_iteration(kind):
    data = set_of(torch.rand(10, 3, 8, 8, generator=generator()))
    recipe = small(kind)
    whole = list(data.batches(recipe, 5, 0, Part(), CPU))
    assert len(whole) == 10
    for found, wanted in zip(data.batches(recipe, 5, 6, Part(), CPU), whole[6:], strict=True):  # resumed
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    halves = [list(data.batches(recipe, 5, 0, Part(rank, 2), CPU)) for rank in range(2)]
    for wanted, first, second in zip(whole, *halves, strict=True):  # two processes
        assert torch.equal(torch.cat((first[0], second[0])), wanted[0])
        assert torch.equal(torch.cat((first[1], second[1])), wanted[1])
    other = next(data.batches(recipe, 6, 0, Part(), CPU))
    assert not torch.equal(other[0], whole[0][0])


def test_test_batches_hold_every_image_once_over_the_parts():
    images = torch.rand(23, 1, 4, 4, generator=generator())
    data = InMemory("made", 2, (images, torch.arange(23)), (images, torch.arange(23)))
    found = [labels for rank in range(3) for _, labels in data.test_batches(4, Part(rank, 3), CPU)]
    assert sorted(torch.cat(found).tolist()) == list(range(23))


def test_streams_differ():
    seeds = {stream(*key) for key in itertools.product(range(5), ("order", "augment"), range(50))}
    assert len(seeds) == 500 and all(0 <= seed < 1 << 63 for seed in seeds)


# ---- preprocessing and augmentation ----------------------------------------------------------------------------------


def test_the_mean_is_per_pixel_over_the_training_images():
    images = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8, generator=generator())
    data = set_of(images)
    centerd, labels = data.train()
    wanted = images.double() - images.double().mean(0)
    assert torch.allclose(centerd.double(), wanted / wanted.square().mean().sqrt(), atol=1e-5)
    assert torch.equal(labels, torch.arange(50) % 2)
    assert torch.equal(data.test()[0], centerd[:5])  # with the training images' mean


def test_cifar_augmentation_is_pad_4_crop_flip():
    """Each image, counted one by one, against the same crop and flip made by slicing."""
    images = torch.rand(64, 3, 32, 32, generator=generator())
    drawn = draw("cifar", 64, generator(1))
    found = augmented(images, "cifar", drawn)
    assert found.shape == images.shape and found.is_contiguous(memory_format=torch.channels_last)
    padded = torch.zeros(64, 3, 40, 40)
    padded[:, :, 4:36, 4:36] = images
    for i, (y, x, flip) in enumerate(drawn.tolist()):
        crop = padded[i, :, y : y + 32, x : x + 32]
        assert torch.equal(found[i], crop.flip(2) if flip else crop)
    many = draw("cifar", 4000, generator(2))
    for column, values in ((0, 9), (1, 9), (2, 2)):
        counts = many[:, column].bincount()
        assert len(counts) == values and counts.min() > 0.8 * 4000 / values


def test_digits_move_by_a_pixel_and_are_never_mirrored():
    images = torch.zeros(300, 1, 7, 7)
    images[:, 0, 3, 3] = 1.0
    moved = augmented(images, "digits", draw("digits", 300, generator())).flatten(1)
    assert torch.equal(moved.sum(1), torch.ones(300))
    assert set(moved.argmax(1).tolist()) == {7 * y + x for y in (2, 3, 4) for x in (2, 3, 4)}
    assert not draw("digits", 300, generator())[:, 2].any()


def test_color_moves_along_the_axes_of_rgb():
    images = torch.zeros(2000, 3, 2, 2)
    found = augmented(images, "imagenet", draw("imagenet", 2000, generator()))
    shifts = found[:, :, 0, 0] * torch.tensor(DEVIATION)  # in 0..1
    assert torch.equal(found, found[:, :, :1, :1].expand_as(found))
    spread = torch.linalg.eigvalsh(shifts.T.cov().double()).flip(0).sqrt()
    assert spread.tolist() == pytest.approx([0.02175, 0.00188, 0.00045], rel=0.1)


def test_ten_crops_and_multi_scale():
    images = torch.arange(2 * 3 * 8 * 10.0).reshape(2, 3, 8, 10)
    crops = ten_crops(images, 6)
    assert crops.shape == (10, 2, 3, 6, 6)
    assert torch.equal(crops[0], images[:, :, :6, :6]) and torch.equal(crops[3], images[:, :, 2:, 4:])
    assert torch.equal(crops[4], images[:, :, 1:7, 2:8]) and torch.equal(crops[5:], crops[:5].flip(4))
    with pytest.raises(ValueError, match="size: got 9, expected at most the images' shorter side, 8"):
        ten_crops(images, 9)
    views = multi_scale(images, (4, 8, 16))
    assert [tuple(view.shape[2:]) for view in views] == [(4, 5), (8, 10), (16, 20)] and views[1] is images


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder in CIFAR-10's format with 20 training images and 4 test images, whose MD5s torchvision then expects."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(name, seed):
        pixels = torch.randint(0, 256, (4, 3072), dtype=torch.uint8, generator=generator(seed)).numpy()
        return name, write(name, {"data": pixels, "labels": [seed, 1, 2, 3]})

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [list(batch(f"data_batch_{i}", i)) for i in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [list(batch("test_batch", 9))])
    meta = {"filename": "batches.meta", "key": "label_names"}
    md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**meta, "md5": md5})
    return tmp_path


def test_cifar10_is_read_from_its_folder(cifar):
    data = load("cifar10", cifar)
    assert (data.train_size, data.test_size, data.classes, data.channels, data.size) == (20, 4, 10, 3, 32)
    images, labels = data.train()
    assert labels.tolist() == [i for seed in range(1, 6) for i in (seed, 1, 2, 3)]
    raw = torch.randint(0, 256, (4, 3072), dtype=torch.uint8, generator=generator(2)).view(4, 3, 32, 32).float()
    assert torch.allclose(images[4:8], (raw - data.mean) / data.deviation)


def test_missing_and_corrupt_cifar10_is_one_clear_line(cifar, tmp_path):
    folder = cifar / "cifar-10-batches-py"
    (folder / "data_batch_3").write_bytes(b"cut off")
    with pytest.raises(DataError, match="data_batch_3: is corrupt: its MD5 is not") as corrupt:
        load("cifar10", cifar)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="has no cifar-10-batches-py/data_batch_3") as missing:
        load("cifar10", cifar)
    with pytest.raises(DataError, match="data root: got none") as none:
        load("cifar10")
    for caught in (corrupt, missing, none):
        text = str(caught.value)
        assert "download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in text and "\n" not in text


# ---- images in folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Six training and four test images of two classes."""
    return write_images(tmp_path, {"train": 3, "val": 2}, (300, 400))


@own_process  # it forks decoders
@pytest.mark.parametrize("workers", [0, 2])
def test_folders_give_the_papers_crops_reproducibly(folders, workers):
    data = load("imagenet", folders, workers)
    assert (data.train_size, data.test_size, data.classes, data.size) == (6, 4, 2, 224)
    recipe = small("imagenet", batch_size=4, iterations=3)
    whole = list(data.batches(recipe, 1, 0, Part(), CPU))
    assert [tuple(images.shape) for images, _ in whole] == [(4, 3, 224, 224)] * 3
    for images, labels in whole:  # back in 0..1, the classes are told apart by their brightness
        bright = (images * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None]).mean((1, 2, 3))
        assert torch.equal(bright > 0.4, labels == 1)
    resumed = list(data.batches(recipe, 1, 2, Part(), CPU))
    assert torch.equal(resumed[0][0], whole[2][0])
    halves = [list(data.batches(recipe, 1, 0, Part(rank, 2), CPU)) for rank in range(2)]
    assert torch.equal(torch.cat((halves[0][1][0], halves[1][1][0])), whole[1][0])


def test_folders_test_on_the_middle_crop(folders):
    from PIL import Image

    coarse = torch.rand(1, 3, 6, 8, generator=generator()) * 255
    smooth = torch.nn.functional.interpolate(coarse, (300, 400), mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    Image.fromarray(smooth.byte().numpy()).save(folders / "val/a/0.JPEG", quality=95)
    data = load("imagenet", folders, 0)
    (images, labels), (rest, _) = data.test_batches(3, Part(), CPU)
    assert images.shape == (3, 3, 224, 224) and rest.shape == (1, 3, 224, 224) and labels.tolist() == [0, 0, 1]
    picture = Image.open(folders / "val/a/0.JPEG")  # 400x300
    resized = picture.resize((341, 256), Image.Resampling.BILINEAR).crop((59, 16, 283, 240))
    pixels = torch.tensor(list(resized.tobytes())).view(224, 224, 3).permute(2, 0, 1) / 255
    wanted = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    off = (images[0] - wanted).abs().mean()  # a third of a pixel: PIL rounds the resized image's width
    assert off < 0.05 and all((images[0] - wanted.roll(3, axis)).abs().mean() > 3 * off for axis in (1, 2))


@pytest.mark.parametrize("views", ["single", "ten-crop", "multi-scale"])
def test_errors_over_views(folders, views):
    """A network that tells brightness is right in every view; one that always says class 0 is wrong half the time."""
    from fastres.lab.evaluation import test_errors

    class Bright(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = torch.nn.Parameter(torch.tensor(sign))

        def forward(self, x):
            y = self.sign * x.mean((1, 2, 3))
            return torch.stack((-y, y), 1)

    data = load("imagenet", folders, 0)
    right, wrong = (test_errors(Bright(sign), data, views) for sign in (1.0, -1.0))
    assert (right.top1, wrong.top1, right.top5, right.images) == (0.0, 1.0, 0.0, 4)


def test_other_views_need_folders():
    from fastres.lab.evaluation import test_errors

    net = torch.nn.Linear(1, 1)
    for views in ("ten-crop", "twelve"):
        with pytest.raises(DataError, match=f"views: got '{views}', expected"):
            test_errors(net, set_of(torch.zeros(5, 1, 2, 2)), views)


@own_process  # it forks decoders
def test_a_corrupt_image_is_named(folders):
    path = folders / "train" / "b" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:3000])
    for workers in (0, 1):
        data = load("imagenet", folders, workers)
        with pytest.raises(DataError) as caught:
            list(data.batches(small("imagenet", 6, 1), 0, 0, Part(), CPU))
        text = str(caught.value)
        assert text.startswith(f"data file {path}: cannot be decoded: ") and "\n" not in text


def test_missing_folders_are_one_clear_line(folders, tmp_path):
    (folders / "train" / "c").mkdir()
    cases = (None, "data root: got none"), (tmp_path / "nowhere", "has no train/"), (folders, "data folder")
    for root, message in cases:
        with pytest.raises(LabError, match=message) as caught:
            load("imagenet", root)
        assert "ILSVRC2012_img_train.tar" in str(caught.value) and "\n" not in str(caught.value)
    (folders / "train" / "c").rmdir()
    (folders / "val" / "b").rename(folders / "val" / "z")
    with pytest.raises(DataError, match="different classes, such as 'b'"):
        load("imagenet", folders)
    with pytest.raises(DataError, match="data: got 'mnist', expected one of digits, digits8, cifar10, imagenet"):
        load("mnist")


def test_without_torchvision(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    for name in ("cifar10", "imagenet"):
        with pytest.raises(LabError, match=r'needs torchvision.*pip install "fastres\[train\]"'):
            load(name, tmp_path)


# ---- digits ----------------------------------------------------------------------------------------------------------


def test_digits_need_no_folder():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert (data.train_size, data.test_size, data.classes, data.channels, data.size) == (1437, 360, 10, 1, 16)
    images, labels = data.train()
    assert images.mean(0).abs().max() < 1e-5 and float(images.std()) == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(load("digits").test()[1], data.test()[1]) and labels.dtype == torch.int64
    with pytest.raises(RecipeError, match="augment: got 'imagenet', expected another one for 1-channel images"):
        next(data.batches(small("imagenet"), 0, 0, Part(), CPU))
