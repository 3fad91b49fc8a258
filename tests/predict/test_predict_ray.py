"""Predicting on a Ray cluster of this machine: the rows are the local ones, each once, also when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("PIL")
import fastres  # noqa: E402
import fastres.ray  # noqa: E402
from predict_cases import CLASSES, net, predictions, run, write_images  # noqa: E402


@pytest.fixture
def saved(tmp_path):
    fastres.freeze(net(), torch.randn(2, 3, 16, 16), tune=False).save(tmp_path / "net.fastres")
    return tmp_path / "net.fastres"


def alike(mine, other):
    """The same rows; scores may differ in the last digits, as the number of threads does."""
    assert [row["path"] for row in mine] == [row["path"] for row in other]
    for one, two in zip(mine, other, strict=True):
        assert one["error"] == two["error"] and one["scores"] == pytest.approx(two["scores"], abs=1e-5)


def test_the_class_without_a_cluster(saved, tmp_path):
    """Bytes with one that is damaged, and pixels; more rows than a batch, none at all."""
    paths = write_images(tmp_path / "a", 5)
    made = fastres.ray.Predictor(
        saved, image_size=16, batch=2, top_k=3, labels=[f"c{place}" for place in range(CLASSES)]
    )
    files = numpy.array([path.read_bytes() for path in paths[:4]] + [b"damaged"], object)
    rows = made({"bytes": files, "path": numpy.array(list(map(str, paths)))})
    assert sorted(rows) == ["classes", "error", "labels", "path", "scores"]
    assert {name: values.shape[0] for name, values in rows.items()} == dict.fromkeys(rows, 5)
    wanted = run(tmp_path / "a", batch=2, top_k=3)[:4]
    assert rows["classes"][:4].tolist() == [row["classes"] for row in wanted]
    assert rows["labels"][0].tolist() == [f"c{place}" for place in wanted[0]["classes"]]
    assert (rows["classes"][4] == -1).all() and numpy.isnan(rows["scores"][4]).all() and "no image" in rows["error"][4]
    assert made({"bytes": numpy.array([], object)})["classes"].shape == (0, 3)
    pixels = fastres.ray.Predictor(lambda: fastres.load(saved), image_size=16, batch=2, column="image")
    shown = pixels({"image": numpy.zeros((3, 20, 30, 3), numpy.uint8)})
    assert shown["classes"].shape == (3, 5) and (shown["error"] == "").all()


def test_refusals(saved, tmp_path):
    with pytest.raises(ValueError, match=r"column: got 'bytes', expected one of \['image'\]"):
        fastres.ray.Predictor(saved, image_size=16)({"image": numpy.zeros((1, 4, 4, 3), numpy.uint8)})
    with pytest.raises(TypeError, match="model: got Sequential, expected a FrozenModel"):
        fastres.ray.Predictor(net)
    write_images(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="engine: got 'spark', expected 'local' or 'ray'"):
        run(tmp_path / "a", engine="spark")


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_images(tmp_path / "a", 1)
    with pytest.raises(ImportError, match=r'engine: ray needs Ray .*pip install "fastres\[ray\]"'):
        run(tmp_path / "a", engine="ray", out=tmp_path / "out.jsonl")
    assert run(tmp_path / "a", out=tmp_path / "out.jsonl")  # nobody holds the file


class Slow:
    """A transform that says which process runs it, and takes its time."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, image):
        import time

        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(0.02)
        return torch.from_numpy(numpy.asarray(image.resize((16, 16)), dtype=numpy.float32)).permute(2, 0, 1) / 255

    def __repr__(self):
        return "Slow"


@pytest.mark.full
@pytest.mark.xdist_group("ray")
class TestCluster:
    """A cluster of two workers, and a CPU for Ray's own reading; started here and ended here."""

    @pytest.fixture(autouse=True, scope="class")
    def _ray(self):
        ray = pytest.importorskip("ray")
        folders = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tests/predict")])
        here = {
            "PYTHONPATH": os.pathsep.join([folders, os.environ.get("PYTHONPATH", "")]),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in here.items():
                patch.setenv(name, value)
            ray.init(num_cpus=3, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
            yield
            ray.shutdown()

    def test_a_worker_killed_in_the_middle(self, tmp_path):
        """Every row once, in order, as one process gives them; the file is whole."""
        write_images(tmp_path / "a", 400)
        (pids := tmp_path / "pids").mkdir()
        out = tmp_path / "out.jsonl"
        rows = predictions(
            tmp_path / "a", engine="ray", workers=2, batch=4, transform=Slow(pids), out=out, image_size=16
        )
        mine, killed = [], None
        for row in rows:
            mine.append(row)
            if len(mine) == 40:
                workers = {int(path.name) for path in pids.iterdir()} - {os.getpid()}
                assert len(workers) == 2, "two actors decode"
                killed = workers.pop()
                os.kill(killed, signal.SIGKILL)
        assert killed is not None
        there = {int(path.name) for path in pids.iterdir()} - {os.getpid()}
        assert len(there) >= 3, "another actor took the place of the dead one"
        wanted = run(tmp_path / "a", batch=4, transform=Slow(pids), image_size=16)
        assert len(mine) == 400
        alike(mine, wanted)
        assert [json.loads(line) for line in out.read_text().splitlines()] == mine

    def test_resumed_by_another_engine(self, tmp_path):
        """Begun here, stopped, ended on the cluster: a table's rows, one damaged, are those of one run."""
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        files = [path.read_bytes() for path in write_images(tmp_path / "a", 50)]
        files[30] = b"damaged"
        parquet.write_table(pyarrow.table({"image": files}), tmp_path / "t.parquet", row_group_size=16)
        out = tmp_path / "out.csv"
        rows = predictions(tmp_path / "t.parquet", out=out)
        for _ in range(17):
            next(rows)
        rows.close()
        rows = predictions(tmp_path / "t.parquet", out=out, engine="ray", workers=2)
        assert rows.resumed == 24
        mine = list(rows)
        alike(mine, run(tmp_path / "t.parquet"))
        assert mine[30]["error"] and [row["row"] for row in mine] == list(range(50))

    def test_map_batches(self, saved, tmp_path):
        import ray

        paths = write_images(tmp_path / "a", 20)
        files = ray.data.read_binary_files(str(tmp_path / "a"), include_paths=True)
        rows = files.map_batches(
            fastres.ray.Predictor,
            fn_constructor_args=[str(saved)],
            fn_constructor_kwargs={"image_size": 16, "batch": 8, "top_k": 2},
            batch_size=8,
            compute=ray.data.ActorPoolStrategy(size=2),
        ).take_all()
        assert sorted(row["path"] for row in rows) == sorted(map(str, paths))
        wanted = {row["path"]: row["classes"] for row in run(tmp_path / "a", top_k=2)}
        assert {row["path"]: row["classes"].tolist() for row in rows} == wanted


@pytest.mark.full
def test_the_command(tmp_path):
    """A cluster of its own; an address where nothing listens is one line."""
    for package in ("ray", "typer", "rich"):
        pytest.importorskip(package)
    write_images(tmp_path / "a", 20)
    command = [sys.executable, "-m", "fastres", "predict", "fastres:cifar_resnet8", "--image-size", "16", "--no-tune"]
    command += [str(tmp_path / "a"), "--out", str(tmp_path / "out.csv"), "--engine", "ray", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0 and "20 rows, 0 of them errors" in done.stderr, done.stderr
    assert done.stdout == "" and len((tmp_path / "out.csv").read_text().splitlines()) == 21
    (tmp_path / "out.csv").unlink()
    command += ["--address", "127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("fastres: --address: got '127.0.0.1:9'")
