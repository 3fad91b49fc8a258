"""The engines that a frozen network is compared with, each set up as its own documentation recommends for speed.

A builder takes the network (float32, eval mode, on the device) and the images in the working dtype, and returns a call
without arguments that returns the logits. It raises Absent where its library is missing, with the command that installs
it. Any other error also leaves the peer out and is recorded as the reason.

    eager, eager_channels_last   the network in the working dtype, without gradients
    frozen                       fastres.freeze on these images, with its defaults
    torchscript                  trace, torch.jit.freeze, torch.jit.optimize_for_inference; channels_last
    compile, compile_freezing    torch.compile, default mode; with Inductor's freezing, without gradients; channels_last
    compile_max_autotune         torch.compile, mode "max-autotune" (with CUDA graphs); GPUs
    cudagraph                    eager channels_last, captured once as a CUDA graph; GPUs
    onnxruntime                  torch.onnx.export, all graph optimizations, as many threads as torch, fixed batch size
    openvino                     one request with the whole batch, hint LATENCY: all threads work on it
    openvino_throughput          hint THROUGHPUT: the batch split into as many parallel requests as OpenVINO recommends
    jax                          the folded network in jax.numpy, NHWC, under jax.jit; GPUs
"""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastres
from measure import Absent, cuda_graph

Call = Callable[[], Any]
Build = Callable[[nn.Module, Tensor], Call]

INSTALL = {
    "onnx": "onnx onnxscript",
    "onnxscript": "onnx onnxscript",
    "onnxruntime": "onnxruntime onnx onnxscript",
    "openvino": "openvino",
    "jax": "'jax[cuda13]'",
}


def needed(name: str) -> Any:
    """Import a module. Raises Absent with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed: pip install {INSTALL[name]}") from error


def cuda_only(images: Tensor) -> None:
    if images.device.type != "cuda":
        raise Absent(f"needs a CUDA device, the images are on {images.device.type}")


def cpu_only(images: Tensor, library: str) -> None:
    if images.device.type != "cpu":
        raise Absent(f"{library} runs on CPUs only, the images are on {images.device.type}")


def without_gradients(function: Callable[[Tensor], Any], images: Tensor) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return function(images)

    return call


def laid_out(net: nn.Module, images: Tensor, layout: torch.memory_format) -> tuple[nn.Module, Tensor]:
    """A copy of the network in the images' dtype, and the images, both in the layout."""
    module: Any = copy.deepcopy(net).to(images.dtype)
    return module.to(memory_format=layout), images.contiguous(memory_format=layout)


def eager(net: nn.Module, images: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Call:
    return without_gradients(*laid_out(net, images, layout))


eager_channels_last = partial(eager, layout=torch.channels_last)


def frozen(net: nn.Module, images: Tensor) -> Call:
    """Freeze without freeze's own referee: the benchmark judges what it has timed."""
    fast = fastres.freeze(net, images.float(), dtype=images.dtype, verify=False)
    return without_gradients(fast, images)


def torchscript(net: nn.Module, images: Tensor) -> Call:
    module, images = laid_out(net, images, torch.channels_last)
    with torch.no_grad():
        script = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(module, images)))
        script(images)  # it specializes in its first two calls
        script(images)
    return without_gradients(script, images)


def compiled(net: nn.Module, images: Tensor, *, freezing: bool = False, mode: str = "default") -> Call:
    from torch._inductor import config

    module, images = laid_out(net, images, torch.channels_last)
    call = without_gradients(torch.compile(module, dynamic=False, fullgraph=True, mode=mode), images)
    with config.patch(freezing=freezing):
        call()  # compiles
    return call


def compile_max_autotune(net: nn.Module, images: Tensor) -> Call:
    cuda_only(images)
    return compiled(net, images, mode="max-autotune")


def cudagraph(net: nn.Module, images: Tensor) -> Call:
    cuda_only(images)
    return cuda_graph(eager_channels_last(net, images), images.device, warmup=3)


@cache
def exported(net: nn.Module, dtype: torch.dtype) -> bytes:
    """The network as ONNX with a dynamic batch size called "batch"; exported once per dtype."""
    needed("onnx"), needed("onnxscript")
    module, example = copy.deepcopy(net).to("cpu", dtype), torch.randn(2, 3, 224, 224, dtype=dtype)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    dynamic = ({0: torch.export.Dim("batch")},)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        how = {"dynamo": True, "verbose": False, "external_data": False, "dynamic_shapes": dynamic}
        torch.onnx.export(module, (example,), path, **how, **names)
        return path.read_bytes()


def onnxruntime(net: nn.Module, images: Tensor) -> Call:
    """ONNX Runtime with all optimizations and one thread pool of torch's size.

    Its threads spin during a call and stop with it, so they do not disturb the other peers' rounds.
    Source: https://onnxruntime.ai/docs/performance/tune-performance
    """
    ort = needed("onnxruntime")
    gpu = images.device.type == "cuda"
    if gpu and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Absent("onnxruntime here has no CUDAExecutionProvider: pip install onnxruntime-gpu")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", len(images))
    options.log_severity_level = 3
    provider = ("CUDAExecutionProvider", {"device_id": images.device.index or 0}) if gpu else "CPUExecutionProvider"
    session = ort.InferenceSession(exported(net, images.dtype), options, providers=[provider])
    if not gpu:
        feed = {"images": images.numpy()}
        return lambda: session.run(["logits"], feed)[0]
    import numpy as np

    images = images.contiguous()
    logits = torch.empty(len(images), 1000, device=images.device, dtype=images.dtype)
    element = np.float16 if images.dtype is torch.float16 else np.float32
    binding = session.io_binding()
    for name, t, bind in (("images", images, binding.bind_input), ("logits", logits, binding.bind_output)):
        bind(name, "cuda", images.device.index or 0, element, tuple(t.shape), t.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return logits

    return call


@cache
def converted(net: nn.Module) -> Any:
    """The network as an OpenVINO model with a dynamic batch size."""
    ov = needed("openvino")
    return ov.convert_model(copy.deepcopy(net), example_input=torch.randn(2, 3, 224, 224), input=[-1, 3, 224, 224])


def _openvino(net: nn.Module, images: Tensor, hint: str, batch: int | None = None) -> tuple[Any, Any]:
    """openvino and the compiled model. Images and logits are always float32, because numpy has no bfloat16."""
    ov = needed("openvino")
    cpu_only(images, "OpenVINO")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[images.dtype]
    if precision != "f32" and precision.upper() not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Absent(f"OpenVINO does not compute in {precision} on this CPU")
    model = converted(net).clone()
    model.reshape([batch or len(images), *images.shape[1:]])
    settings = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "EXECUTION_MODE_HINT": "PERFORMANCE",
    }
    return ov, ov.Core().compile_model(model, "CPU", settings)


def openvino(net: nn.Module, images: Tensor) -> Call:
    """OpenVINO with the hint LATENCY, for one request at a time.

    Source: https://docs.openvino.ai, "High-level Performance Hints"
    """
    _, model = _openvino(net, images, "LATENCY")
    request, feed = model.create_infer_request(), {0: images.float().numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


def openvino_throughput(net: nn.Module, images: Tensor) -> Call:
    """OpenVINO with the hint THROUGHPUT, for as many parallel requests as OPTIMAL_NUMBER_OF_INFER_REQUESTS."""
    import numpy as np

    _, model = _openvino(net, images, "THROUGHPUT")
    parallel = min(int(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")), len(images))
    while len(images) % parallel:
        parallel -= 1
    part = len(images) // parallel
    ov, model = _openvino(net, images, "THROUGHPUT", part)
    feeds = [{0: piece} for piece in np.split(images.float().numpy(), parallel)]  # each [part, 3, 224, 224]
    logits = np.empty((parallel, part, 1000), np.float32)
    queue = ov.AsyncInferQueue(model, parallel)

    def keep(request: Any, index: int) -> None:
        logits[index] = request.get_output_tensor(0).data

    queue.set_callback(keep)

    def call() -> Any:
        for index, feed in enumerate(feeds):
            queue.start_async(feed, index, share_inputs=True)
        queue.wait_all()
        return logits.reshape(len(images), 1000)

    return call


def jax(net: nn.Module, images: Tensor) -> Call:
    """torchvision's ResNets in jax.numpy, on JAX's own device: NHWC, BN folded in float64; logits in float32."""
    needed("jax")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with torch
    import jax
    import jax.numpy as jnp

    dtype = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}[images.dtype]

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.detach().cpu().float().numpy(), dtype)

    def folded(conv: Any, bn: Any) -> tuple[Any, Any]:
        fused = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
        return array(fused.weight.permute(2, 3, 1, 0)), array(fused.bias)  # [K, K, I, O]

    def conv(x: Any, weights: tuple[Any, Any], stride: int) -> Any:
        weight, bias = weights
        pad = weight.shape[0] // 2
        layout = ("NHWC", "HWIO", "NHWC")
        window = ((pad, pad), (pad, pad))
        return jax.lax.conv_general_dilated(x, weight, (stride, stride), window, dimension_numbers=layout) + bias

    blocks, strides = [], []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            numbers = [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
            convs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in numbers]
            projection = folded(*block.downsample) if block.downsample is not None else None
            blocks.append(([folded(*pair) for pair in convs], projection))
            strides.append([c.stride[0] for c, _ in convs])
    fc = net.fc
    weights = (folded(net.conv1, net.bn1), blocks, (array(fc.weight.t()), array(fc.bias)))

    @jax.jit
    def forward(weights: Any, x: Any) -> Any:
        stem, blocks, (fc, bias) = weights
        x = jax.nn.relu(conv(x, stem, 2))  # [N, 112, 112, 64]
        window, pad = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        x = jax.lax.reduce_window(x, jnp.array(-jnp.inf, dtype), jax.lax.max, window, (1, 2, 2, 1), pad)
        for (convs, projection), steps in zip(blocks, strides, strict=True):
            residual = x if projection is None else conv(x, projection, max(steps))
            for i, (pair, stride) in enumerate(zip(convs, steps, strict=True)):
                x = conv(x, pair, stride)
                x = jax.nn.relu(x if i < len(convs) - 1 else x + residual)  # [N, P, P, O]
        return (x.mean((1, 2)) @ fc + bias).astype(jnp.float32)  # [N, classes]

    x = array(images.permute(0, 2, 3, 1))  # [N, 224, 224, 3]
    return lambda: forward(weights, x).block_until_ready()


_BUILDERS = (
    eager,
    frozen,
    torchscript,
    onnxruntime,
    openvino,
    openvino_throughput,
    compile_max_autotune,
    cudagraph,
    jax,
)
BUILDERS: dict[str, Build] = {builder.__name__: builder for builder in _BUILDERS} | {
    "eager_channels_last": eager_channels_last,
    "compile": compiled,
    "compile_freezing": partial(compiled, freezing=True),
}


def forget() -> None:
    """Drop the exported networks."""
    exported.cache_clear()
    converted.cache_clear()
