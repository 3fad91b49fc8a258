"""int8 networks beside the int8 of other engines: images/s and the SNR of the logits, in one interleaved run.

    python benchmarks/int8.py [--networks resnet50,resnet18] [--batches 1,8,32] [--seconds 6] [--json FILE]

The networks have random weights and batch norms calibrated on smooth noise (`images`). Every engine quantizes the same
32 images by its own means: fastres with its defaults but the gate, so that every layer is int8 as the others' are;
ONNX Runtime by `quantize_static` (QDQ, uint8 activations, int8 weights per channel, entropy: minmax); OpenVINO by NNCF,
preset mixed. Times are medians of rounds in which each engine takes a turn; the ratio is to the best of the others.

An engine that is not installed has a line with the command that installs it.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastres
from fastres.inference.gate import snr
from fastres.lab.results import environment
from fastres.verify import calibrate
from measure import Absent
from runtimes import exported, needed

CALIBRATION, JUDGED = 32, 32
OTHERS = ("onnxruntime", "openvino")


def images(count: int, seed: int, size: int = 224) -> Tensor:
    """Smooth noise of three scales: [count, 3, size, size]."""
    rng = torch.Generator().manual_seed(seed)
    scales = ((8, 1.0), (32, 0.5), (size, 0.1))
    parts = [
        F.interpolate(torch.randn(count, 3, n, n, generator=rng), size=size, mode="bilinear") * s for n, s in scales
    ]
    return sum(parts[1:], parts[0])


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    calibrate(net, images(16, 100))
    return net


# ---- engines: each returns a function that gives, for images, a call that returns logits -----------------------------

Engine = Callable[[Tensor], Callable[[], Any]]


def eager(net: nn.Module, given: Tensor) -> Engine:
    net = copy.deepcopy(net).to(memory_format=torch.channels_last)

    def build(x: Tensor) -> Callable[[], Any]:
        x = x.contiguous(memory_format=torch.channels_last)
        return lambda: net(x)

    return build


def ours(dtype: str) -> Callable[[nn.Module, Tensor], Engine]:
    def make(net: nn.Module, given: Tensor) -> Engine:
        how: dict[str, Any] = {"verify": False, "dtype": dtype}
        if dtype == "int8":
            how |= {"calibrate": given, "gate": lambda network: 0.0}  # every layer, as the others
        started = time.perf_counter()
        first = fastres.freeze(net, given[:2], tune=False, **how)
        if dtype == "int8":
            print(f"  fastres quantized {len(given)} images in {time.perf_counter() - started:.1f} s, {counts(first)}")

        def build(x: Tensor) -> Callable[[], Any]:
            fast = fastres.freeze(net, x, **how)
            x = x.to(fast.dtype)
            return lambda: fast(x)

        return build

    return make


def counts(frozen: fastres.FrozenModel) -> str:
    found = frozen.report.quantization
    return ", ".join(f"{n} layers {name}" for name, n in found.counts.items()) if found is not None else "not quantized"


def onnxruntime(net: nn.Module, given: Tensor) -> Engine:
    ort, quantization = needed("onnxruntime"), needed("onnxruntime.quantization")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[dict[str, Any]] = iter({"images": part.numpy()} for part in given.split(8))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        source, clean, made = (Path(folder) / f"{name}.onnx" for name in ("source", "clean", "int8"))
        source.write_bytes(exported(net, torch.float32))
        quant_pre_process(str(source), str(clean), skip_symbolic_shape=True)
        types = quantization.QuantType
        quantization.quantize_static(
            str(clean),
            str(made),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=types.QUInt8,
            weight_type=types.QInt8,
        )
        model = made.read_bytes()

    def build(x: Tensor) -> Callable[[], Any]:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_free_dimension_override_by_name("batch", len(x))
        options.log_severity_level = 3
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {"images": x.numpy()}
        return lambda: torch.from_numpy(session.run(["logits"], feed)[0])

    return build


def openvino(net: nn.Module, given: Tensor) -> Engine:
    ov, nncf = needed("openvino"), needed("nncf")
    model = ov.convert_model(copy.deepcopy(net), example_input=given[:2], input=[-1, *given.shape[1:]])
    parts = nncf.Dataset(list(given.split(1)), lambda t: t.numpy())
    model = nncf.quantize(model, parts, preset=nncf.QuantizationPreset.MIXED, subset_size=len(given))

    def build(x: Tensor) -> Callable[[], Any]:
        fixed = model.clone()
        fixed.reshape(list(x.shape))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = ov.Core().compile_model(fixed, "CPU", settings).create_infer_request()
        feed = {0: x.numpy()}
        return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

    return build


ENGINES: dict[str, Callable[[nn.Module, Tensor], Engine]] = {
    "eager": eager,
    "fastres fp32": ours("fp32"),
    "fastres bf16": ours("bf16"),
    "fastres int8": ours("int8"),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call in rounds of all, in turns."""
    for call in calls.values():
        call(), call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times[next(iter(times))]) < 5:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def run(name: str, batches: list[int], seconds: float, engines: list[str]) -> list[dict[str, Any]]:
    """One network: a row for each engine and batch size."""
    net, given, judged = network(name), images(CALIBRATION, 1), images(JUDGED, 2)
    with torch.no_grad():
        want = net(judged)
    built: dict[str, Engine] = {}
    for engine in engines:
        try:
            built[engine] = ENGINES[engine](net, given)
        except Absent as absent:
            print(f"  {engine}: {absent}")
    ratios = {}
    for engine, build in built.items():
        got = torch.cat([build(part)().float().reshape(len(part), -1) for part in judged.split(8)[:1]])
        ratios[engine] = snr(want[: len(got)], got)
    rows = []
    for batch in batches:
        x = images(batch, 3)
        times = interleaved({engine: build(x) for engine, build in built.items()}, seconds)
        medians = {engine: statistics.median(found) for engine, found in times.items()}
        others = [medians[engine] for engine in OTHERS if engine in medians]
        print(f"{name} batch {batch}")
        for engine, median in medians.items():
            rate = batch / median
            best = f"{min(others) / median:5.2f}x the best other" if others and engine == "fastres int8" else ""
            if engine == "fastres int8" and "fastres bf16" in medians:
                best += f", {medians['fastres bf16'] / median:.2f}x bf16"
            span = f"{min(times[engine]) * 1e3:.2f}..{max(times[engine]) * 1e3:.2f}"
            print(
                f"  {engine:<13} {rate:8.1f} img/s {median * 1e3:8.2f} ms ({span}) SNR {ratios[engine]:6.1f} dB {best}"
            )
            rows.append({"network": name, "batch": batch, "engine": engine, "ms": median * 1e3, "snr": ratios[engine]})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", default="resnet50,resnet18")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--seconds", type=float, default=6.0, help="of each batch size")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    batches, engines = [int(n) for n in asked.batches.split(",")], asked.engines.split(",")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sys.argv}")
    with torch.no_grad():
        rows = [row for name in asked.networks.split(",") for row in run(name, batches, asked.seconds, engines)]
    if asked.json is not None:
        command = shlex.join(["python", "benchmarks/int8.py", *sys.argv[1:]])
        about = environment(torch.device("cpu"), command)
        asked.json.write_text(json.dumps({"command": command, "environment": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
