"""The suite's own test: each planted bug must make it fail. Works on a copy of the sources; C++ mutants are compiled.

`python tests/ops/test_mutations.py` runs them with a line each; `make test-full` runs them as tests.

Longer than 400 lines: one table of bugs.
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
INTERPRETER = ("tests/kernels/interpreter/lane_bn_act.py",)
GEOMETRY = ("tests/kernels/interpreter/lane_geometry.py",)
CONV = ("tests/kernels/interpreter/lane_conv_act.py",)
CONV_ACT = ("tests/ops/test_conv_act.py",)
STEPS = ("tests/swap/test_conv_steps.py",)
LOWER = ("tests/freeze/test_lower.py",)
EXECUTOR = ("tests/freeze/test_executor.py",)
WINOGRAD = ("tests/ops/test_conv_winograd.py",)
TRAINING = ("tests/ops/test_conv_act_winograd.py",)
DIRECT = ("tests/ops/test_conv_direct.py",)
PLANNED = ("tests/freeze/test_planned_memory.py",)
PRODUCT = ("tests/ops/test_conv_1x1.py",)
LARGE = ("tests/ops/test_large.py",)
EMULATED = ("tests/emulation/test_cuda_emulated.py",)
NATIVE = ("tests/ops/test_native.py",)
LAUNCH = ("tests/emulation/test_cuda_launch.py",)


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


# By file and tests that must fail: name, sound text (where it is gone the mutant is stale, and its test fails), bug.
BUGS = {
    ("csrc/cuda/add_relu_flat.cu", NATIVE): [("cuda-tail-dropped", "V > 1 && blockIdx.x == 0", "V > 9")],
    ("csrc/cuda/bn_act_tile.cuh", EMULATED): [
        ("cuda-barrier-dropped", "    __syncthreads();\n    if (y < rows - half)", "    if (y < rows - half)"),
        ("cuda-shuffle-too-short", "step > 0; step /= 2", "step > 1; step /= 2"),
        ("cuda-eps-omitted", "reciprocal_std(var[c.of(k)], eps)", "reciprocal_std(var[c.of(k)], 0.f)"),
        ("cuda-last-parts-missed", "part < parts; part += height", "part + height < parts; part += height"),
    ],
    ("csrc/cuda/bn_act_backward.cu", EMULATED): [
        (
            "cuda-mask-from-the-input",
            "y_pack[u] = load_pack<T, V>(y + offset[u])",
            "y_pack[u] = load_pack<T, V>(x + offset[u])",
        )
    ],
    ("csrc/cuda/bn_act_forward.cu", EMULATED): [
        ("cuda-biased-running-variance", "m2 / (n - 1)", "m2 / n"),
        ("cuda-residual-dropped", "if constexpr (kResidual) z[k] += r[k];", ""),
    ],
    ("csrc/cuda/launch.h", LAUNCH): [
        ("cuda-second-channel-of-a-vector", "lane >= left ? 1 : 0", "lane > left ? 1 : 0"),
        ("cuda-last-chunk-overrun", " || vector >= tile_vectors", ""),
        (
            "cuda-int32-offset",
            "return image * row_stride + position;",
            "return static_cast<int>(image * row_stride + position);",
        ),
        ("cuda-misaligned-vectors", "(kVectorBytes - off) / size", "off / size"),
    ],
    ("csrc/element.h", LAUNCH): [
        ("welford-shares-swapped", "share = other_count / total", "share = count / total"),
        ("welford-nothing-times-infinity", "delta * (delta * (count * share))", "delta * delta * (count * share)"),
        ("welford-batch-uncorrected", "m2 += squares - sum * step;", "m2 += squares;"),
        ("welford-overflow-is-nan", "m2 != m2 && mean - mean == 0", "false"),
    ],
    ("csrc/element.h", NATIVE): [("relu-drops-nan", "return z < floor ? floor : z;", "return z > floor ? z : floor;")],
    ("fastres/inference/lower.py", LOWER): [
        ("lower-writes-over-inputs", "if owners & self.taken:", "if False:"),
        ("lower-writes-over-what-is-read-later", "if any(self.last.get(s, 0) > place for s in alike):", "if False:"),
    ],
    ("fastres/_stamp.py", EXECUTOR): [("executor-ignores-versions", "(count >= 0 and t._version != count) or ", "")],
    ("fastres/nn/conv_steps.py", STEPS): [
        (
            "written-over-with-gradients",
            "return None if torch.is_grad_enabled() and any_requires_grad(*everything) else fixed",
            "return fixed",
        ),
        ("written-over-under-hooks", "is_plain(conv, nn.Conv2d) and ", ""),
    ],
    ("fastres/ops/_conv_backends.py", CONV_ACT): [
        (
            "conv-residual-added-after-relu",
            "        z = z.add_(residual)\n    return ACTIVATIONS[act](z).to(c.dtype)",
            (
                "        return ACTIVATIONS[act](z).add_(residual).to(c.dtype)\n"
                "    return ACTIVATIONS[act](z).to(c.dtype)"
            ),
        )
    ],
    ("csrc/cpu/bn_act_terms.h", OPERATORS): [
        (
            "cpu-tail-dropped",
            "    map.template at<W>(i + n - W, map.template parameters<W, kBroadcast>(kBroadcast ? c : c + n - W));\n",
            "",
        ),
        ("cpu-eps-omitted", "std::sqrt(var[c] + eps)", "std::sqrt(var[c] + 0 * eps)"),
        ("cpu-mask-from-the-input", "relu_gradient(g, load<W>(y + i))", "relu_gradient(g, load<W>(x + i))"),
        (
            "cpu-residual-and-input-swapped",
            (
                "affine(load<W>(x + i), p.mean, p.scale, p.bias);\n"
                "    if constexpr (kResidual) z += load<W>(residual + i);"
            ),
            (
                "affine(load<W>((kResidual ? residual : x) + i), p.mean, p.scale, p.bias);\n"
                "    if constexpr (kResidual) z += load<W>(x + i);"
            ),
        ),
    ],
    ("csrc/cpu/winograd_transforms.h", WINOGRAD): [
        ("winograd-coefficient", "o[0] = (d[4] - d[2] * 2.5f) + d[0];", "o[0] = (d[4] - d[2] * 2.4f) + d[0];")
    ],
    ("csrc/cpu/winograd.h", WINOGRAD): [
        (
            "winograd-channel-tail-dropped",
            "for (; c < shape.channels; ++c) at_channel<1, false>(from + c, v + to.at(t, c)",
            "for (; c < 0; ++c) at_channel<1, false>(from + c, v + to.at(t, c)",
        ),
        (
            "winograd-taps-transposed",
            "store<W>(out + (i * kEdge<M> + j) * to.tap, o[j]);",
            "store<W>(out + (j * kEdge<M> + i) * to.tap, o[j]);",
        ),
        ("winograd-tile-of-another-image", "image = tile / (s.rows * s.columns);", "image = 0;"),
    ],
    ("csrc/cpu/conv_winograd.cpp", WINOGRAD): [("winograd-rows-past-the-image", "      if (i >= bottom) break;\n", "")],
    ("csrc/cpu/conv_winograd.cpp", TRAINING): [
        ("winograd-kernel-not-turned", "    w += 2 * (along[2] + along[3]);\n    along[2] = -along[2];\n", ""),
        ("winograd-spreads-nan", "zeros[j] += o[j] * 0.0f;", ""),
    ],
    ("csrc/cpu/conv_winograd_weight.cpp", TRAINING): [
        (
            "winograd-gradient-of-the-last-block",
            "ToMemory{d + tap * kPanel<W> * kPanel<W>, add || t > 0}",
            "ToMemory{d + tap * kPanel<W> * kPanel<W>, false}",
        ),
        ("winograd-gradient-past-the-image", "below ? load<W>(from + row) : zero", "load<W>(from + row)"),
    ],
    ("csrc/cpu/conv_bands.h", DIRECT): [
        ("direct-padding-left-as-it-was", "        std::memset(to, 0, low * pixel_ * 4);\n", ""),
        (
            "direct-taps-not-dilated",
            "offset.push_back(tap * w.dilation / w.stride);",
            "offset.push_back(tap / w.stride);",
        ),
        ("direct-plane-of-another-tap", "remainder = tap * w.dilation % w.stride", "remainder = tap % w.stride"),
        ("direct-behind-a-dense-row-left", "(count + down_.extent) * row(), 0, kSlack * 4);", "0, 0, 0);"),
        ("pool-loses-nan", "(bit_cast<Int<W>>(b) & nan) |", "(bit_cast<Int<W>>(most) & nan) |"),
        ("pool-keeps-rows-of-another-image", "if (n != image) image = n, done = low;", "image = n;"),
        ("pool-past-the-image", "std::min(shape.rows, top + pool.size)", "top + pool.size"),
    ],
    ("csrc/cpu/conv_panels.h", DIRECT): [
        ("direct-row-between-lines-kept", "if (q < columns) {", "if (q <= columns) {"),
        ("direct-block-starts-behind-a-line", "(q < columns ? q : columns)", "q"),
        (
            "tiles-of-the-block-before",
            "put_rows<16>(m[side], row, rows);\n      to",
            "put_rows<16>(m[side ^ 1], row, rows);\n      to",
        ),
        ("tiles-of-another-panel", "panel * kPanel<16>};", "panel * kPanel<8>};"),
    ],
    ("csrc/cpu/amx.h", DIRECT): [
        ("tiles-right-columns-from-the-left", "FASTRES_TILE_LOAD(7, u + 64, kRow);", "FASTRES_TILE_LOAD(7, u, kRow);"),
        ("tiles-one-tap", "const char* at = v + taps[tap] * 4;", "const char* at = v;"),
    ],
    ("csrc/cpu/conv_direct.cpp", DIRECT): [
        (
            "pairs-packed-the-other-way-round",
            "* width) * group + i % group;",
            "* width) * group + group - 1 - i % group;",
        ),
    ],
    ("csrc/cpu/conv_epilogue.h", DIRECT): [
        (
            "epilogue-bias-before-scale",
            "    if (scale != nullptr) c *= load<W>(scale + k);\n    if (bias != nullptr) c += load<W>(bias + k);\n",
            "    if (bias != nullptr) c += load<W>(bias + k);\n    if (scale != nullptr) c *= load<W>(scale + k);\n",
        ),
        ("epilogue-residual-of-another-pixel", "c += load<W>(residual + at);", "c += load<W>(residual + k);"),
    ],
    ("csrc/cpu/winograd_transforms.h", TRAINING): [
        ("winograd-gradient-coefficient", "g[2] = even + o[3];", "g[2] = even - o[3];")
    ],
    ("fastres/inference/lower.py", PLANNED): [
        ("planned-outputs-of-the-network", "        if math.isinf(last):\n            continue\n", ""),
        (
            "planned-without-what-is-written-over",
            "new = (alike | {written[s] for s in alike if s in written}) - group",
            "new = alike - group",
        ),
    ],
    ("fastres/inference/arena.py", PLANNED): [
        ("planned-places-overlap", "if not apart and offset + wish.bytes > offsets[j]:", "if False:")
    ],
    ("csrc/cpu/conv_epilogue.h", WINOGRAD): [
        (
            "conv-bias-before-the-scale",
            "    if (scale != nullptr) c *= load<W>(scale + k);\n    if (bias != nullptr) c += load<W>(bias + k);\n",
            "    if (bias != nullptr) c += load<W>(bias + k);\n    if (scale != nullptr) c *= load<W>(scale + k);\n",
        ),
        ("conv-residual-of-another-pixel", "c += load<W>(residual + at);", "c += load<W>(residual + k);"),
    ],
    ("csrc/cpu/conv.h", PRODUCT): [
        ("product-panel-tail-dropped", "channel + j < outputs; ++j)", "channel + j + 1 < outputs; ++j)")
    ],
    ("csrc/cpu/conv_1x1.cpp", PRODUCT): [
        ("product-row-of-another-pixel", "+ q * shape.stride_w;", "+ q;"),
    ],
    ("csrc/cpu/bn_act_terms.h", NATIVE): [("cpu-tail-written-over-twice", "return x == y;", "return false;")],
    ("csrc/cpu/add_relu.cpp", LARGE): [
        (
            "cpu-int32-offset",
            "const int64_t last = end * kBlock < n ? end * kBlock : n;",
            "const int64_t last = static_cast<int>(end * kBlock < n ? end * kBlock : n);",
        )
    ],
    ("csrc/cpu/bn_act.cpp", OPERATORS): [
        (
            "cpu-biased-running-variance",
            "momentum, static_cast<double>(count) / static_cast<double>(count - 1));",
            "momentum, 1);",
        ),
        (
            "cpu-statistics-moved-in-eval-mode",
            "  if (training) {\n    move(running_mean",
            "  if (running_mean) {\n    move(running_mean",
        ),
    ],
    ("csrc/cpu/bn_act_rows.h", OPERATORS): [
        (
            "cpu-streamed-second-row-dropped",
            "for (; row < last; ++row) map_rows<W, 1, kStream>(row * part.channels + c, width, c);",
            "",
        )
    ],
    ("fastres/ops/_bn_autograd.py", OPERATORS): [
        ("biased-running-variance", "unbiased = n / (n - 1)", "unbiased = 1.0")
    ],
    ("fastres/ops/bn_act.py", OPERATORS): [
        (
            "statistics-updated-before-the-check",
            "    y, mean, var = _OP(",
            ("    if num_batches_tracked is not None:\n        num_batches_tracked.add_(1)\n    y, mean, var = _OP("),
        ),
        (
            "residual-and-input-swapped",
            "_OP(x, weight, bias, running_mean, running_var, residual, training",
            "_OP(x if residual is None else residual, weight, bias, running_mean, running_var, "
            "None if residual is None else x, training",
        ),
    ],
    ("kernels/bn_act_forward.py", INTERPRETER): [
        (
            "triton-tail-mask-dropped",
            "tl.store(y_ptr + base + local, z.to(y_ptr.dtype.element_ty), valid)",
            "tl.store(y_ptr + base + local, z.to(y_ptr.dtype.element_ty))",
        ),
        (
            "triton-biased-or-wrong-count",
            "tl.store(var_ptr + channel, tl.sum(m2, 0) / n.to(tl.float32)",
            "tl.store(var_ptr + channel, tl.sum(m2, 0) / (n - 1).to(tl.float32)",
        ),
    ],
    ("kernels/element.py", INTERPRETER): [("triton-eps-omitted", "tl.sqrt_rn(var + eps)", "tl.sqrt_rn(var)")],
    ("kernels/image.py", GEOMETRY): [
        (
            "triton-int32-offset",
            "row = (tile // line_blocks).to(tl.int64) * BLOCK_R",
            "row = (tile // line_blocks) * BLOCK_R",
        )
    ],
    ("kernels/conv_act_forward.py", CONV): [
        ("conv-depth-tail-mask-dropped", "in_depth = c < channels", "in_depth = c < channels + BLOCK_K"),
        (
            "conv-flat-depth-tail-mask-dropped",
            "in_depth = depth < R * S * channels",
            "in_depth = depth < R * S * channels + BLOCK_K",
        ),
        (
            "conv-padding-mask-dropped",
            "x_valid = row_valid & inside(h + r * dilation_h, w + s * dilation_w, height, width)",
            "x_valid = row_valid",
        ),
        (
            "conv-padding-mask-one-too-wide",
            "return in_height & (w.to(tl.uint32) < tl.cast(width, tl.uint32))",
            "return in_height & (w.to(tl.uint32) <= tl.cast(width, tl.uint32))",
        ),
        (
            "conv-dilation-omitted",
            "shift = image_rows(origin, r * dilation_h, s * dilation_w, height, width, all_channels, X_LAST)\n",
            "shift = image_rows(origin, r, s, height, width, all_channels, X_LAST)\n",
        ),
        ("conv-bias-omitted", "    if bias_ptr is not None:", '    if bias_ptr is not None and ACT == "never":'),
        (
            "conv-residual-after-the-activation",
            (
                "z += tl.load(residual_ptr + local, valid, other=0.0).to(tl.float32)\n"
                "    tl.store(y_ptr + local, activate(z, ACT)"
            ),
            (
                "z = activate(z, ACT) + tl.load(residual_ptr + local, valid, other=0.0).to(tl.float32)\n"
                "    tl.store(y_ptr + local, (activate(z, ACT) if residual_ptr is None else z)"
            ),
        ),
        (
            "conv-output-row-mask-dropped",
            "valid = row_valid[:, None] & column_valid[None, :]",
            "valid = (m >= 0)[:, None] & column_valid[None, :]",
        ),
        (
            "conv-band-tail-too-high",
            "height = tl.minimum(tiles_m - first, GROUP_M)",
            "height = tl.minimum(tiles_m, GROUP_M)",
        ),
        ("conv-int32-pixel", "first = tl.cast(tile, tl.int64) * BLOCK_M", "first = tile * BLOCK_M"),
        (
            "conv-int32-output-offset",
            "y_rows = m * all_out_channels if Y_LAST",
            "y_rows = (m * all_out_channels).to(tl.int32) if Y_LAST",
        ),
    ],
    ("kernels/element.py", CONV): [("conv-relu-drops-nan", "tl.where(z < 0, 0.0, z)", "tl.where(z > 0, z, 0.0)")],
}
MUTANTS = [Mutant(name, path, old, new, tests) for (path, tests), bugs in BUGS.items() for name, old, new in bugs]


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


def environment(folder: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(folder / "path"), "FASTRES_TEST_BACKENDS": "cpu"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "FASTRES_BUILD_EXT": "cpu"}


def build(folder: Path) -> None:
    """The extension, in place; ninja compiles only what a mutant touched."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run_tests(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "full or not full", *tests]
    env = environment(folder) | ({"TRITON_INTERPRET": "1"} if "interpreter" in tests[0] else {})
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


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
    [OPERATORS, INTERPRETER, GEOMETRY, CONV, LARGE, EMULATED, NATIVE, LAUNCH, WINOGRAD, TRAINING, DIRECT],
    ids=["ops", "lane", "geometry", "conv", "large", "emulated", "native", "launch", "winograd", "training", "direct"],
)
def test_the_sound_copy_passes(checkout, tests):
    done = run_tests(checkout, tests)
    assert done.returncode == 0, done.stdout[-3000:]
    where = subprocess.run(
        [sys.executable, "-c", "import fastres.kernels as k, fastres._C as c; print(k.__file__, c.__file__)"],
        cwd=checkout,
        env=environment(checkout),
        capture_output=True,
        text=True,
    ).stdout
    assert where.count(str(checkout)) == 2, where  # the copy is what was tested


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_planted_bug_is_caught(checkout, mutant):
    sound = plant(checkout, mutant)
    try:
        build(checkout)  # compiles what differs from the last build: this mutant, or the one before it
        done = run_tests(checkout, mutant.tests)
        caught = done.returncode == 1 or done.returncode < 0  # a failed test, or a crash
        assert caught, f"{mutant.name} survived: exit {done.returncode}\n{done.stdout[-3000:]}"
    finally:
        (checkout / mutant.path).write_text(sound)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", "-m", "full", *sys.argv[1:]]))
