"""The CPU kernels of convolutions under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastres._extension import build_info

pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]
ROOT = Path(__file__).resolve().parents[2]
CALLS = """
import sys
sys.path[:0] = {paths!r}
import test_conv_1x1 as product, test_conv_act_winograd as own, test_conv_direct as direct, test_conv_winograd as frozen
from fastres._extension import native_cpu
assert {folder!r} in native_cpu().__file__
for shape in frozen.SHAPES:
    frozen.test_integers_are_exact_so_that_no_index_is_off(shape)
for shape in product.SHAPES:
    product.test_integers_are_exact_so_that_no_index_is_off(shape)
for case in direct.CASES:
    direct.test_integers_are_exact_so_that_no_index_is_off(*case)
for last in (True, False):
    own.test_integer_gradients_are_exact(last)
own.test_integers_are_exact_and_strides_are_eagers("channels_last")
for dtype in own.DTYPES:
    own.test_nothing_outside_its_tensors_is_read(dtype)
print("clean")
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_address_and_undefined_behavior(tmp_path_factory, isa):
    compiler = shutil.which("g++")
    runtime = compiler and subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not runtime or not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("no g++ with AddressSanitizer")
    if build_info()["isa_runtime"] == "baseline":
        pytest.skip("this machine has neither")
    folder = tmp_path_factory.getbasetemp() / "sanitized"
    if not folder.exists():
        clean = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("csrc", "fastres", "kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=clean)
        for name in ("setup.py", "pyproject.toml", "LICENSE", "LICENSE.CUTLASS", "README.md"):
            shutil.copy(ROOT / name, folder / name)
    if not list((folder / "fastres").glob("_C.*.so")):
        flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=alignment -O1"
        environment = os.environ | {
            "FASTRES_BUILD_EXT": "cpu",
            "CFLAGS": flags,
            "LDFLAGS": "-fsanitize=address,undefined",
        }
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    paths = [str(folder), *(str(ROOT / "tests" / name) for name in ("ops", "helpers"))]
    environment = os.environ | {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FASTRES_ISA": isa,
        "OMP_NUM_THREADS": "2",
    }
    code = CALLS.format(paths=paths, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("clean"), done.stderr[-4000:]
