"""Load examples/serve_http.py on loopback for some seconds: every answer checked, latencies, resident memory.

    python benchmarks/http_service.py [--seconds 20] [--connections 1 4 16]

The service runs in a process of its own; so many connections each send one photograph after the other. An answer is
right if its classes are those of the frozen model asked alone, and its scores within 1e-4. A 503 (the queue is full) is
counted and tried again. Prints a Markdown table, a row for each number of connections.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import torch

import fastres
import fastres.ray

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/serve_http.py"


def photographs(count: int = 8) -> list[bytes]:
    """JPEGs of 400x300, cut out of scikit-learn's two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    files = []
    for place in range(count):
        image = Image.fromarray(load_sample_images().images[place % 2])
        image.crop((place * 25, place * 10, place * 25 + 400, place * 10 + 300)).save(file := io.BytesIO(), "jpeg")
        files.append(file.getvalue())
    return files


def resident(process: int) -> float:
    """The resident megabytes of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def send(port: int, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/classify", body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def load(port: int, process: int, files: list[bytes], wanted: Any, seconds: float, connections: int) -> dict[str, Any]:
    """Send requests until the time is over; the figures of this number of connections."""
    taken: list[float] = []
    counts = {"wrong": 0, "busy": 0}
    lock, end = threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            place, start = turn % len(files), time.perf_counter()
            status, row = send(port, files[place])
            seconds = time.perf_counter() - start
            turn += 1
            with lock:
                if status == 503:
                    counts["busy"] += 1
                    continue
                right = status == 200 and row["classes"] == wanted["classes"][place].tolist()
                right = right and numpy.allclose(row["scores"], wanted["scores"][place], atol=1e-4)
                counts["wrong"] += not right
                taken.append(seconds)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(connections)]
    memory, start = [], time.monotonic()
    for one in clients:
        one.start()
    while any(one.is_alive() for one in clients):
        memory.append(resident(process))
        time.sleep(0.25)
    cut = statistics.quantiles(taken, n=100) if len(taken) > 1 else [float("nan")] * 99
    found = {
        "connections": connections,
        "answers": len(taken),
        **counts,
        "per_s": len(taken) / (time.monotonic() - start),
    }
    found |= {f"p{q}_ms": 1e3 * cut[q - 1] for q in (50, 90, 99)}
    return found | {"memory_first_half": max(memory[: len(memory) // 2 or 1]), "memory": max(memory)}


def serve(network: str, size: int, seconds: float, connections: list[int]) -> list[dict[str, Any]]:
    """Freeze a network, start the example on it, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = getattr(fastres.models, network)() if network != "cifar" else fastres.models.cifar_resnet(8)
        fastres.freeze(model.eval(), torch.randn(8, 3, size, size)).save(saved := f"{folder}/net.fastres")
        files = photographs()
        alone = fastres.ray.Predictor(saved, batch=8, image_size=size)
        wanted = alone({"bytes": numpy.array(files, object)})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(EXAMPLE), saved, "--port", str(port), "--image-size", str(size)]
        with subprocess.Popen(command) as process:
            try:
                for _ in range(240):
                    try:
                        send(port, files[0])
                        break
                    except OSError:
                        time.sleep(0.25)
                return [load(port, process.pid, files, wanted, seconds, count) for count in connections]
            finally:
                process.terminate()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--network", default="resnet18")
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--seconds", type=float, default=20.0)
    options.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16])
    given = options.parse_args()
    rows = serve(given.network, given.size, given.seconds, given.connections)
    print("| connections | answers | wrong | refused (503) | answers/s | p50 | p90 | p99 | resident, at most |")
    print("| --- " * 9 + "|")
    for row in rows:
        latencies = " | ".join(f"{row[f'p{q}_ms']:.0f} ms" for q in (50, 90, 99))
        head = f"| {row['connections']} | {row['answers']} | {row['wrong']} | {row['busy']} | {row['per_s']:.1f}"
        print(f"{head} | {latencies} | {row['memory']:.0f} MB |")


if __name__ == "__main__":
    main()
