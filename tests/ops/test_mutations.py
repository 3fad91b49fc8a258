"""The suite's own test: each planted bug must make it fail. Works on a copy of the sources; C++ mutants are compiled.

`python tests/ops/test_mutations.py` runs them with a line each; `make test-full` runs them as tests.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "fastres", "kernels", "tests", "benchmarks")
FILES = ("setup.py", "pyproject.toml", "LICENSE", "LICENSE.CUTLASS", "README.md")
OPERATORS = ("tests/ops/test_bn_act.py", "tests/ops/test_bn_act_contract.py", "tests/ops/test_add_relu.py")
INTERPRETER = ("tests/kernels/test_triton_interpreter.py::test_lane[lane_bn_act]",)
GEOMETRY = ("tests/kernels/test_triton_interpreter.py::test_lane[lane_geometry]",)
CONV = ("tests/kernels/test_triton_interpreter.py::test_lane[lane_conv_act]",)
CONV_ACT = ("tests/ops/test_conv_act.py",)
STEPS = ("tests/swap/test_conv_steps.py",)
LOWER = ("tests/freeze/test_lower.py",)
EXECUTOR = ("tests/freeze/test_executor.py",)
LARGE = ("tests/ops/test_large.py",)
EMULATED = ("tests/emulation/test_cuda_emulated.py",)
NATIVE = ("tests/ops/test_native.py",)
LAUNCH = ("tests/emulation/test_cuda_launch.py",)


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str  # must be there, or the mutant is stale and its test fails
    new: str
    tests: tuple[str, ...] = OPERATORS
    backend: str = "cpu"


MUTANTS = [
    Mutant("cuda-tail-dropped", "csrc/cuda/add_relu_flat.cu", "V > 1 && blockIdx.x == 0", "V > 9", NATIVE),
    Mutant(
        "cuda-barrier-dropped",
        "csrc/cuda/bn_act_tile.cuh",
        "    __syncthreads();\n    if (y < rows - half)",
        "    if (y < rows - half)",
        EMULATED,
    ),
    Mutant(
        "cuda-shuffle-too-short", "csrc/cuda/bn_act_tile.cuh", "step > 0; step /= 2", "step > 1; step /= 2", EMULATED
    ),
    Mutant(
        "cuda-eps-omitted",
        "csrc/cuda/bn_act_tile.cuh",
        "reciprocal_std(var[c.of(k)], eps)",
        "reciprocal_std(var[c.of(k)], 0.f)",
        EMULATED,
    ),
    Mutant(
        "cuda-mask-from-the-input",
        "csrc/cuda/bn_act_backward.cu",
        "y_pack[u] = load_pack<T, V>(y + offset[u])",
        "y_pack[u] = load_pack<T, V>(x + offset[u])",
        EMULATED,
    ),
    Mutant("cuda-biased-running-variance", "csrc/cuda/bn_act_forward.cu", "m2 / (n - 1)", "m2 / n", EMULATED),
    Mutant(
        "cuda-residual-dropped", "csrc/cuda/bn_act_forward.cu", "if constexpr (kResidual) z[k] += r[k];", "", EMULATED
    ),
    Mutant(
        "cuda-last-parts-missed",
        "csrc/cuda/bn_act_tile.cuh",
        "part < parts; part += height",
        "part + height < parts; part += height",
        EMULATED,
    ),
    Mutant(
        "cuda-second-channel-of-a-vector", "csrc/cuda/launch.h", "lane >= left ? 1 : 0", "lane > left ? 1 : 0", LAUNCH
    ),
    Mutant("cuda-last-chunk-overrun", "csrc/cuda/launch.h", " || vector >= tile_vectors", "", LAUNCH),
    Mutant(
        "cuda-int32-offset",
        "csrc/cuda/launch.h",
        "return image * row_stride + position;",
        "return static_cast<int>(image * row_stride + position);",
        LAUNCH,
    ),
    Mutant("cuda-misaligned-vectors", "csrc/cuda/launch.h", "(kVectorBytes - off) / size", "off / size", LAUNCH),
    Mutant("welford-shares-swapped", "csrc/element.h", "share = other_count / total", "share = count / total", LAUNCH),
    Mutant(
        "welford-nothing-times-infinity",
        "csrc/element.h",
        "delta * (delta * (count * share))",
        "delta * delta * (count * share)",
        LAUNCH,
    ),
    Mutant("welford-batch-uncorrected", "csrc/element.h", "m2 += squares - sum * step;", "m2 += squares;", LAUNCH),
    Mutant("welford-overflow-is-nan", "csrc/element.h", "m2 != m2 && mean - mean == 0", "false", LAUNCH),
    Mutant(
        "relu-drops-nan", "csrc/element.h", "return z < floor ? floor : z;", "return z > floor ? z : floor;", NATIVE
    ),
    Mutant("lower-writes-over-inputs", "fastres/inference/lower.py", "if owners & self.taken:", "if False:", LOWER),
    Mutant(
        "lower-writes-over-what-is-read-later",
        "fastres/inference/lower.py",
        "if any(self.last.get(s, 0) > place for s in alike):",
        "if False:",
        LOWER,
    ),
    Mutant(
        "executor-ignores-versions",
        "fastres/_stamp.py",
        "(count >= 0 and t._version != count) or ",
        "",
        EXECUTOR,
    ),
    Mutant(
        "written-over-with-gradients",
        "fastres/nn/conv_steps.py",
        "if not (torch.is_grad_enabled() and any_requires_grad(*tensors)):",
        "if True:",
        STEPS,
    ),
    Mutant("written-over-under-hooks", "fastres/nn/conv_steps.py", "is_plain(conv, nn.Conv2d) and ", "", STEPS),
    Mutant(
        "conv-residual-added-after-relu",
        "fastres/ops/_conv_backends.py",
        "        z = z.add_(residual)\n    return ACTIVATIONS[act](z).to(c.dtype)",
        "        return ACTIVATIONS[act](z).add_(residual).to(c.dtype)\n    return ACTIVATIONS[act](z).to(c.dtype)",
        CONV_ACT,
    ),
    Mutant(
        "cpu-tail-dropped",
        "csrc/cpu/bn_act_terms.h",
        "    map.template at<W>(i + n - W, map.template parameters<W, kBroadcast>(kBroadcast ? c : c + n - W));\n",
        "",
    ),
    Mutant("cpu-tail-written-over-twice", "csrc/cpu/bn_act_terms.h", "return x == y;", "return false;", NATIVE),
    Mutant("cpu-eps-omitted", "csrc/cpu/bn_act_terms.h", "std::sqrt(var[c] + eps)", "std::sqrt(var[c] + 0 * eps)"),
    Mutant(
        "cpu-mask-from-the-input",
        "csrc/cpu/bn_act_terms.h",
        "relu_gradient(g, load<W>(y + i))",
        "relu_gradient(g, load<W>(x + i))",
    ),
    Mutant(
        "cpu-residual-and-input-swapped",
        "csrc/cpu/bn_act_terms.h",
        "affine(load<W>(x + i), p.mean, p.scale, p.bias);\n    if constexpr (kResidual) z += load<W>(residual + i);",
        "affine(load<W>((kResidual ? residual : x) + i), p.mean, p.scale, p.bias);\n"
        "    if constexpr (kResidual) z += load<W>(x + i);",
    ),
    Mutant(
        "cpu-int32-offset",
        "csrc/cpu/add_relu.cpp",
        "const int64_t last = end * kBlock < n ? end * kBlock : n;",
        "const int64_t last = static_cast<int>(end * kBlock < n ? end * kBlock : n);",
        LARGE,
    ),
    Mutant(
        "cpu-biased-running-variance",
        "csrc/cpu/bn_act.cpp",
        "momentum, static_cast<double>(count) / static_cast<double>(count - 1));",
        "momentum, 1);",
    ),
    Mutant(
        "cpu-statistics-moved-in-eval-mode",
        "csrc/cpu/bn_act.cpp",
        "  if (training) {\n    move(running_mean",
        "  if (running_mean) {\n    move(running_mean",
    ),
    Mutant(
        "cpu-streamed-second-row-dropped",
        "csrc/cpu/bn_act_rows.h",
        "for (; row < last; ++row) map_rows<W, 1, kStream>(row * part.channels + c, width, c);",
        "",
    ),
    Mutant("biased-running-variance", "fastres/ops/_bn_autograd.py", "unbiased = n / (n - 1)", "unbiased = 1.0"),
    Mutant(
        "statistics-updated-before-the-check",
        "fastres/ops/bn_act.py",
        "    y, mean, var = _OP(",
        "    if num_batches_tracked is not None:\n        num_batches_tracked.add_(1)\n    y, mean, var = _OP(",
    ),
    Mutant(
        "residual-and-input-swapped",
        "fastres/ops/bn_act.py",
        "_OP(x, weight, bias, running_mean, running_var, residual, training",
        "_OP(x if residual is None else residual, weight, bias, running_mean, running_var, "
        "None if residual is None else x, training",
    ),
    Mutant(
        "triton-tail-mask-dropped",
        "kernels/bn_act_forward.py",
        "tl.store(y_ptr + base + local, z.to(y_ptr.dtype.element_ty), valid)",
        "tl.store(y_ptr + base + local, z.to(y_ptr.dtype.element_ty))",
        INTERPRETER,
    ),
    Mutant(
        "triton-biased-or-wrong-count",
        "kernels/bn_act_forward.py",
        "tl.store(var_ptr + channel, tl.sum(m2, 0) / n.to(tl.float32)",
        "tl.store(var_ptr + channel, tl.sum(m2, 0) / (n - 1).to(tl.float32)",
        INTERPRETER,
    ),
    Mutant("triton-eps-omitted", "kernels/element.py", "tl.sqrt_rn(var + eps)", "tl.sqrt_rn(var)", INTERPRETER),
    Mutant(
        "triton-int32-offset",
        "kernels/image.py",
        "row = (tile // line_blocks).to(tl.int64) * BLOCK_R",
        "row = (tile // line_blocks) * BLOCK_R",
        GEOMETRY,
    ),
    Mutant(
        "conv-depth-tail-mask-dropped",
        "kernels/conv_act_forward.py",
        "in_depth = c < channels",
        "in_depth = c < channels + BLOCK_K",
        CONV,
    ),
    Mutant(
        "conv-flat-depth-tail-mask-dropped",
        "kernels/conv_act_forward.py",
        "in_depth = depth < R * S * channels",
        "in_depth = depth < R * S * channels + BLOCK_K",
        CONV,
    ),
    Mutant(
        "conv-padding-mask-dropped",
        "kernels/conv_act_forward.py",
        "x_valid = row_valid & inside(h + r * dilation_h, w + s * dilation_w, height, width)",
        "x_valid = row_valid",
        CONV,
    ),
    Mutant(
        "conv-padding-mask-one-too-wide",
        "kernels/conv_act_forward.py",
        "return in_height & (w.to(tl.uint32) < tl.cast(width, tl.uint32))",
        "return in_height & (w.to(tl.uint32) <= tl.cast(width, tl.uint32))",
        CONV,
    ),
    Mutant(
        "conv-dilation-omitted",
        "kernels/conv_act_forward.py",
        "shift = image_rows(origin, r * dilation_h, s * dilation_w, height, width, all_channels, X_LAST)\n",
        "shift = image_rows(origin, r, s, height, width, all_channels, X_LAST)\n",
        CONV,
    ),
    Mutant(
        "conv-bias-omitted",
        "kernels/conv_act_forward.py",
        "    if bias_ptr is not None:",
        '    if bias_ptr is not None and ACT == "never":',
        CONV,
    ),
    Mutant(
        "conv-residual-after-the-activation",
        "kernels/conv_act_forward.py",
        "z += tl.load(residual_ptr + local, valid, other=0.0).to(tl.float32)\n"
        "    tl.store(y_ptr + local, activate(z, ACT)",
        "z = activate(z, ACT) + tl.load(residual_ptr + local, valid, other=0.0).to(tl.float32)\n"
        "    tl.store(y_ptr + local, (activate(z, ACT) if residual_ptr is None else z)",
        CONV,
    ),
    Mutant(
        "conv-output-row-mask-dropped",
        "kernels/conv_act_forward.py",
        "valid = row_valid[:, None] & column_valid[None, :]",
        "valid = (m >= 0)[:, None] & column_valid[None, :]",
        CONV,
    ),
    Mutant(
        "conv-band-tail-too-high",
        "kernels/conv_act_forward.py",
        "height = tl.minimum(tiles_m - first, GROUP_M)",
        "height = tl.minimum(tiles_m, GROUP_M)",
        CONV,
    ),
    Mutant(
        "conv-int32-pixel",
        "kernels/conv_act_forward.py",
        "first = tl.cast(tile, tl.int64) * BLOCK_M",
        "first = tile * BLOCK_M",
        CONV,
    ),
    Mutant(
        "conv-int32-output-offset",
        "kernels/conv_act_forward.py",
        "y_rows = m * all_out_channels if Y_LAST",
        "y_rows = (m * all_out_channels).to(tl.int32) if Y_LAST",
        CONV,
    ),
    Mutant(
        "conv-relu-drops-nan",
        "kernels/element.py",
        "tl.where(z < 0, 0.0, z)",
        "tl.where(z > 0, z, 0.0)",
        CONV,
    ),
]


def copy_sources(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    # The copy's own packages, before installed ones: a folder that holds nothing but the way to them.
    (folder / "fastres" / "kernels").symlink_to(folder / "kernels")
    (folder / "path").mkdir()
    (folder / "path" / "fastres").symlink_to(folder / "fastres")


def environment(folder: Path, backend: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(folder / "path"), "FASTRES_TEST_BACKENDS": backend}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "FASTRES_BUILD_EXT": "cpu"}


def build(folder: Path) -> None:
    """The extension, in place; ninja compiles only what a mutant touched."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment(folder, "cpu"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run_tests(folder: Path, tests: tuple[str, ...], backend: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "full or not full", *tests]
    return subprocess.run(command, cwd=folder, env=environment(folder, backend), capture_output=True, text=True)


def plant(folder: Path, mutant: Mutant) -> str:
    """Writes the bug and returns the file's sound text."""
    path = folder / mutant.path
    sound = path.read_text()
    assert mutant.old in sound, f"{mutant.name}: {mutant.path} no longer holds {mutant.old!r}"
    path.write_text(sound.replace(mutant.old, mutant.new))
    return sound


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")
    copy_sources(folder)
    build(folder)
    return folder


@pytest.mark.parametrize(
    "tests",
    [OPERATORS, INTERPRETER, GEOMETRY, CONV, LARGE, EMULATED, NATIVE, LAUNCH],
    ids=["ops", "lane", "geometry", "conv", "large", "emulated", "native", "launch"],
)
def test_the_sound_copy_passes(checkout, tests):
    done = run_tests(checkout, tests, "cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    where = subprocess.run(
        [sys.executable, "-c", "import fastres.kernels as k, fastres._C as c; print(k.__file__, c.__file__)"],
        cwd=checkout,
        env=environment(checkout, "cpu"),
        capture_output=True,
        text=True,
    ).stdout
    assert where.count(str(checkout)) == 2, where  # the copy is what was tested


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_planted_bug_is_caught(checkout, mutant):
    sound = plant(checkout, mutant)
    try:
        build(checkout)  # compiles what differs from the last build: this mutant, or the one before it
        done = run_tests(checkout, mutant.tests, mutant.backend)
        caught = done.returncode == 1 or done.returncode < 0  # a failed test, or a crash
        assert caught, f"{mutant.name} survived: exit {done.returncode}\n{done.stdout[-3000:]}"
    finally:
        (checkout / mutant.path).write_text(sound)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-m", "full", *sys.argv[1:]]))
