"""What survives of a run of predict: after a kill, Ctrl-C, a break; what is another run; memory over many images."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")

import fastres  # noqa: E402
from fastres.pipelines import shards  # noqa: E402
from own_process import own_process  # noqa: E402
from predict_cases import child, net, predictions, run, write_images  # noqa: E402

KINDS = ["csv", "jsonl", "parquet"]


@pytest.fixture
def each_batch(monkeypatch):
    """A shard a batch: by default one is written every five seconds, which no test waits for."""
    monkeypatch.setattr(shards, "SECONDS", 0.0)


def table(path: Path) -> list[dict]:
    """The rows of a file, as text where it has text alone."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_rows(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    write_images(tmp_path / "a b", 5)
    write_images(tmp_path / "a b" / "ü\n文", 5)  # the same names, and a folder that needs quotes
    (tmp_path / "a b" / "0002.png").write_bytes(b"damaged")
    out = tmp_path / "new" / f"out.{kind}"
    rows = run(tmp_path / "a b", out=out, top_k=2, labels=list("abcdefg"))
    assert len({row["path"] for row in rows}) == len(rows) == 10 and [row["error"] for row in rows].count(None) == 9
    written = table(out)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]
    assert [row["path"] for row in written] == [row["path"] for row in rows]
    if kind != "csv":
        for row, want in zip(written, rows, strict=True):
            assert row.pop("scores") == pytest.approx(want.pop("scores"), rel=1e-6) and row == want
        return
    assert list(written[0]) == "path row error class_1 label_1 score_1 class_2 label_2 score_2".split()
    for row, want in zip(written, rows, strict=True):
        assert row["error"] == (want["error"] or "")
        if not want["error"]:
            assert [int(row["class_1"]), int(row["class_2"])] == want["classes"]
            assert [row["label_1"], row["label_2"]] == want["labels"]
            assert [float(row["score_1"]), float(row["score_2"])] == want["scores"]


def test_no_more_classes_than_there_are(tmp_path):
    write_images(tmp_path / "a", 1)
    run(tmp_path / "a", out=tmp_path / "out.csv", top_k=50)
    assert list(table(tmp_path / "out.csv")[0])[-1] == "score_7"


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 8, 9, 27, 29, 30])
def test_a_break_is_resumed(tmp_path, each_batch, stop):
    """30 images in batches of 8, the last of 6, stopped after `stop` rows."""
    write_images(tmp_path / "a", 30)
    whole = run(tmp_path / "a", out=tmp_path / "whole.jsonl")
    first = predictions(tmp_path / "a", out=tmp_path / "out.jsonl")
    seen = [next(first) for _ in range(stop)]
    first.close()
    assert not (tmp_path / "out.jsonl").exists()
    again = predictions(tmp_path / "a", out=tmp_path / "out.jsonl")
    assert again.total == 30 and again.resumed == min(-(-stop // 8) * 8, 30)
    assert (again.model is None) == (again.resumed == 30)
    assert list(again) == whole and seen == whole[:stop]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_only_what_is_missing_is_run(tmp_path, each_batch):
    calls = []
    model = fastres.freeze(net(), torch.randn(2, 3, 16, 16), tune=False)
    forward = type(model)._forward
    write_images(tmp_path / "a", 30)
    rows = predictions(tmp_path / "a", model, out=tmp_path / "out.jsonl")
    for _ in range(17):
        next(rows)
    rows.close()
    with pytest.MonkeyPatch.context() as patch:  # nothing public counts the images of a call
        patch.setattr(type(model), "_forward", lambda self, x: calls.append(len(x)) or forward(self, x))
        assert len(run(tmp_path / "a", model=model, out=tmp_path / "out.jsonl")) == 30
    assert calls == [8, 8]  # the check of the number of classes, and the last batch, filled up


def test_a_frozen_model_of_other_images(tmp_path):
    write_images(tmp_path / "a", 1)
    flat = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 36, 7)).eval()
    frozen = fastres.freeze(flat, torch.randn(2, 3, 8, 8), tune=False)
    assert len(run(tmp_path / "a", model=frozen, image_size=8)) == 1
    with pytest.raises(ValueError, match=r"model: does not run on images of \[1, 3, 16, 16\]: "):
        run(tmp_path / "a", model=frozen)
    with pytest.raises(ValueError, match="dtype: got 'bf16', but the model is frozen in torch.float32"):
        run(tmp_path / "a", model=frozen, dtype="bf16")


def test_an_error_on_the_way_keeps_the_batches(tmp_path):
    paths = write_images(tmp_path / "a", 24)

    class Breaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.left = net(), 10**9

        def forward(self, x):
            if self.left <= 0:
                raise RuntimeError("out of luck")
            self.left -= 1
            return self.net(x)

    model = fastres.freeze(Breaks(), torch.randn(2, 3, 16, 16), capture="modules", tune=False)
    rows = predictions(paths, model, out=tmp_path / "out.jsonl")
    model.fallback.left = 2
    with pytest.raises(RuntimeError, match="out of luck"):
        list(rows)
    model.fallback.left = 9
    again = predictions(paths, model, out=tmp_path / "out.jsonl")
    assert again.resumed == 16 and [row["path"] for row in again] == list(map(str, paths))


def test_another_run_is_refused(tmp_path, each_batch):
    write_images(tmp_path / "a", 20)
    out = tmp_path / "out.jsonl"
    rows = predictions(tmp_path / "a", out=out)
    next(rows)
    rows.close()
    other = net()
    other[0].weight.data[0] += 1
    for change, key in (
        ({"batch": 4}, r"batch \(8, now 4\)"),
        ({"model": other}, "weights"),
        ({"dtype": "bf16"}, "dtype"),
        ({"top_k": 2}, "top_k"),
        ({"labels": list("abcdefg")}, "labels"),
        ({"image_size": 24}, "image_size"),
        ({"transform": lambda image: torch.zeros(3, 16, 16)}, "transform"),
    ):
        with pytest.raises(ValueError, match=f"out: .*out.jsonl.parts holds rows of another run: {key}.*delete"):
            run(tmp_path / "a", out=out, **change)
    (tmp_path / "a" / "0000.png").rename(tmp_path / "a" / "zzzz.png")
    with pytest.raises(ValueError, match="another run: names"):
        run(tmp_path / "a", out=out)
    (tmp_path / "a" / "zzzz.png").rename(tmp_path / "a" / "0000.png")
    assert len(run(tmp_path / "a", out=out)) == 20
    before = out.read_bytes()
    with pytest.raises(ValueError, match="out: .*out.jsonl exists, expected a new file"):
        run(tmp_path / "a", out=out)
    assert out.read_bytes() == before


def test_a_missing_or_damaged_shard_is_said(tmp_path, each_batch):
    write_images(tmp_path / "a", 30)
    rows = predictions(tmp_path / "a", out=tmp_path / "out.jsonl")
    for _ in range(20):
        next(rows)
    rows.close()
    first, second, _ = sorted(tmp_path.glob("out.jsonl.parts/0*"))
    text = second.read_text()
    second.write_text(text[:-20])
    with pytest.raises(ValueError, match="got 7 rows, expected 8"):
        run(tmp_path / "a", out=tmp_path / "out.jsonl")
    second.write_text(text)
    first.unlink()
    with pytest.raises(ValueError, match="rows 0 to 7 before it are missing"):
        run(tmp_path / "a", out=tmp_path / "out.jsonl")


def test_what_a_finished_run_has_left_is_removed(tmp_path):
    """As after a kill between the file's appearance and the end of the shards."""
    write_images(tmp_path / "a", 3)
    parts = tmp_path / "out.csv.parts"
    parts.mkdir()
    for name in ("done", "000000000-000000008", "model.fastres", "mine"):
        (parts / name).touch()
    assert len(run(tmp_path / "a", out=tmp_path / "out.csv")) == 3
    assert [path.name for path in parts.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("out", "text"), [("out.txt", "expected a name that ends in .jsonl, .csv, .parquet"), ("out", "expected a name")]
)
def test_no_such_kind_of_file(tmp_path, out, text):
    write_images(tmp_path / "a", 1)
    with pytest.raises(ValueError, match=f"out: got .*{text}"):
        run(tmp_path / "a", out=tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batch": 0}, ValueError, "batch: got 0, expected a number from 1 on"),
        ({"top_k": 1.5}, ValueError, "top_k: got 1.5"),
        ({"workers": -1}, ValueError, "workers: got -1"),
        ({"dtype": "bf17"}, ValueError, "dtype: got 'bf17', expected fp32, "),
        ({"labels": ["a"]}, ValueError, "labels: got 1, expected 7, one for each class of the model"),
        (
            {"model": torch.nn.Conv2d(3, 4, 3)},
            ValueError,
            r"model: gave \[1, 4, 14, 14\] for 1 images, expected logits \[1, cl",
        ),
        (
            {"model": torch.nn.Conv2d(2, 3, 3)},
            ValueError,
            r"model: does not run on float32 \[1, 3, 16, 16\]: RuntimeError: Given",
        ),
        ({"model": "resnet50"}, TypeError, "model: got str, expected an nn.Module"),
    ],
)
def test_refusals(tmp_path, options, error, text):
    write_images(tmp_path / "a", 1)
    with pytest.raises(error, match=text):
        run(tmp_path / "a", **options)


# ---- processes -------------------------------------------------------------------------------------------------------


@own_process
def test_a_killed_run_is_resumed(tmp_path):
    """kill -9 after some rows; what the same run then gives is what an uninterrupted one does, bit for bit."""
    write_images(tmp_path / "a", 60)
    (tmp_path / "a" / "0040.png").write_bytes(b"damaged")
    with child(tmp_path / "a", tmp_path / "out.jsonl") as process:
        while process.stdout.readline().strip() != "20":
            pass
        with pytest.raises(BlockingIOError, match="out: another process writes .*out.jsonl"):
            run(tmp_path / "a", out=tmp_path / "out.jsonl")
    again = predictions(tmp_path / "a", out=tmp_path / "out.jsonl")  # at once: its workers still live
    assert again.resumed >= 24
    rows = list(again)
    assert rows == run(tmp_path / "a", out=tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.full
@own_process
def test_killed_at_twenty_random_moments(tmp_path):
    write_images(tmp_path / "a", 400)
    want, out, draw = run(tmp_path / "a", workers=2), tmp_path / "out.jsonl", random.Random(0)
    found = []
    for _ in range(20):
        with child(tmp_path / "a", out) as process:
            line = process.stdout.readline().split()
            if not line:  # killed between the last row and its end: the file is there
                break
            found.append(int(line[1]))
            time.sleep(draw.random() * 0.15)
    if not out.exists():
        run(tmp_path / "a", out=out, workers=2)
    assert found == sorted(found) and len(set(found)) > 3
    assert table(out) == want and not Path(f"{out}.parts").exists()


@own_process
def test_ctrl_c_leaves_the_batches(tmp_path):
    write_images(tmp_path / "a", 200)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with child(tmp_path / "a", tmp_path / "out.jsonl") as process:
        while process.stdout.readline().strip() != "9":
            pass
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) != 0
    stopped = predictions(tmp_path / "a", out=tmp_path / "out.jsonl")
    assert stopped.resumed >= 16 and stopped.resumed % 8 == 0 and len(list(stopped)) == 200


@own_process
def test_a_worker_that_dies_ends_the_run_and_the_batches_stay(tmp_path):
    import multiprocessing

    write_images(tmp_path / "a", 200)
    rows = predictions(tmp_path / "a", out=tmp_path / "out.jsonl", workers=1)
    for _ in range(20):
        next(rows)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # a signal handler's, wherever this process is
        list(rows)
    rows.close()
    again = predictions(tmp_path / "a", out=tmp_path / "out.jsonl", workers=1)
    assert 24 <= again.resumed < 200
    assert len(list(again)) == 200


@pytest.mark.full
@own_process
def test_memory_is_flat_over_100_000_images(tmp_path):
    """Of this process and its workers, from image 20,000 to the last."""
    import multiprocessing

    paths = write_images(tmp_path / "a", 50, size=8)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths) * 2000)

    def resident():
        """Megabytes of each process, with what it shares: that moves from shared to private as it is written."""
        pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
        return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6 for pid in pids]

    rows = predictions(tmp_path / "list.txt", out=tmp_path / "out.jsonl", workers=2, batch=64, image_size=8)
    samples = {}
    for count, _ in enumerate(rows, 1):
        if count % 10_000 == 0 and count < 100_000:
            samples[count] = resident()
    assert count == 100_000 and sum(1 for _ in open(tmp_path / "out.jsonl", "rb")) == count
    first, last = samples[20_000], samples[90_000]
    assert len(first) == len(last) == 3
    assert all(after - before < 4 for before, after in zip(first, last, strict=True)), samples
