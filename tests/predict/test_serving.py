"""The services of examples/: answers go to those who asked, a full queue refuses, nothing is wrong under load."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import threading
from http.client import HTTPConnection
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "examples").is_dir():
    pytest.skip("examples/ is not here", allow_module_level=True)
pytest.importorskip("PIL")
import fastres  # noqa: E402
from predict_cases import net, run, write_images  # noqa: E402


def loaded(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def doubled(batch):
    return {"twice": numpy.array([2 * one for one in batch["bytes"]]), "error": numpy.array([""] * len(batch["bytes"]))}


def test_each_gets_its_own_answer():
    batches, found = loaded("examples/serve_http.py").Batches(doubled, most=4, threads=3, waiting=64), {}

    def ask(first):
        for number in range(first, first + 50):
            found[number] = int(batches.ask(number).result(10)["twice"])

    threads = [threading.Thread(target=ask, args=(50 * place,)) for place in range(4)]
    [one.start() for one in threads], [one.join() for one in threads]
    assert found == {number: 2 * number for number in range(200)}


def test_a_full_queue_refuses_and_an_error_reaches_everybody():
    gate = threading.Event()

    def fails(batch):
        gate.wait(10)
        raise RuntimeError("out of order")

    batches = loaded("examples/serve_http.py").Batches(fails, most=2, threads=1, wait=0.0, waiting=3)
    asked = []
    with pytest.raises(queue.Full):
        for _ in range(10):
            asked.append(batches.ask(b""))
    gate.set()
    for answer in asked:
        with pytest.raises(RuntimeError, match="out of order"):
            answer.result(10)


@pytest.mark.full
def test_http_under_load():
    """A bounded load on loopback: no wrong answer, memory that does not grow."""
    for package in ("fastapi", "uvicorn", "sklearn"):
        pytest.importorskip(package)
    (few, many) = loaded("benchmarks/http_service.py").serve("cifar", 32, seconds=8.0, connections=[2, 16])
    for found in (few, many):
        assert found["answers"] > 50 and found["wrong"] == 0, found
    assert many["memory"] < 1.1 * few["memory_first_half"] + 50, (few, many)


@pytest.mark.full
@pytest.mark.xdist_group("ray")
def test_ray_serve(tmp_path, monkeypatch):
    """examples/serve_ray.py with two replicas: every answer is that of its image, a damaged one is an error."""
    ray, serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    fastres.freeze(net(), torch.randn(2, 3, 16, 16), tune=False).save(tmp_path / "net.fastres")
    paths = write_images(tmp_path / "a", 24)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.syspath_prepend(ROOT / "examples")
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    try:
        import serve_ray

        serve_ray.main(tmp_path / "net.fastres", replicas=2, image_size=16, port=18321)
        found = {}

        def ask(place, data):
            connection = HTTPConnection("127.0.0.1", 18321, timeout=60)
            connection.request("POST", "/", data)
            found[place] = json.loads(connection.getresponse().read())

        bodies = [path.read_bytes() for path in paths] + [b"damaged"]
        threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(bodies)]
        [one.start() for one in threads], [one.join() for one in threads]
    finally:
        serve.shutdown()
        ray.shutdown()
    for place, row in enumerate(run(tmp_path / "a")):
        assert found[place]["classes"] == row["classes"] and not found[place]["error"]
    assert "no image" in found[24]["error"] and "classes" not in found[24]
