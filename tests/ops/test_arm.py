"""The CPU kernels for 64-bit ARM: all of them pass the compiler, and what they share runs in an emulator.

Needs Debian's g++-aarch64-linux-gnu and qemu-user. No ARM processor has run them yet.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O2", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT}/csrc"]
SOURCES = sorted(path.name for path in ROOT.glob("csrc/cpu/*.cpp"))
PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <vector>
#include "cpu/conv_epilogue.h"
#include "cpu/product.h"

using namespace fastres;
namespace {
int failures = 0;
void expect(bool holds, const char* what, double got) {
  if (!holds && ++failures < 20) std::printf("%s: %g\n", what, got);
}
// Sums of small integers over two taps, exact in any order; rows, a tail of them, and depth by depth.
template <bool kByDepth>
void products() {
  constexpr int64_t kDepth = 5, kStride = 64, kTaps = 2, kTapAt = 8 * kStride;
  std::vector<float> v(2 * kTapAt * 8), u(kTaps * kDepth * kPanel<4>), m(64 * kPanel<4>);
  for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i % 7) - 3;
  for (size_t i = 0; i < u.size(); ++i) u[i] = static_cast<float>(i % 5) - 2;
  const int64_t taps[] = {0, kTapAt};
  for (int64_t rows : {1, 13, 14, 15, 31}) {
    const Panel panel{v.data(), kStride, u.data(), kDepth, nullptr, 0, taps, kTaps};
    product<4, kByDepth>(panel, rows, ToMemory{m.data(), false});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kPanel<4>; ++j) {
        float want = 0;
        for (int64_t t = 0; t < kTaps; ++t) {
          for (int64_t c = 0; c < kDepth; ++c) {
            const float* at = v.data() + taps[t] + (kByDepth ? c * kStride + r : r * kStride + c);
            want += *at * u[(t * kDepth + c) * kPanel<4> + j];
          }
        }
        expect(m[r * kPanel<4> + j] == want, "product", m[r * kPanel<4> + j] - want);
      }
    }
  }
}
template <class T>
void roundtrips(const char* name) {  // numbers that T holds come back
  for (int i = -300; i < 300; ++i) {
    Float<4> x = {i * 0.5f, i * 0.25f, i * 1.0f, -i * 2.0f}, y;
    T stored[4];
    store<4>(stored, x);
    y = load<4>(stored);
    const bool exact = std::abs(i) <= 128;
    for (int lane = 0; lane < 4; ++lane) {
      expect(exact ? y[lane] == x[lane] : std::fabs(y[lane] - x[lane]) < 4, name, y[lane]);
    }
  }
}
void epilogues() {
  const float scale[] = {2, 2, 2, 2}, bias[] = {-1, 0, 1, 2}, residual[] = {0, -9, 1, NAN};
  float y[4];
  const Epilogue<float> relu{scale, bias, residual, y, Act::kRelu};
  relu.put<4>(Float<4>{1, 2, 3, 4}, 0, 0);
  expect(y[0] == 1 && y[1] == 0 && y[2] == 8 && y[3] != y[3], "epilogue", y[1]);
}
}  // namespace
int main() {
  products<false>();
  products<true>();
  roundtrips<float>("float");
  roundtrips<BFloat16>("bfloat16");
  roundtrips<Half>("half");
  epilogues();
  std::puts(failures == 0 ? "right" : "wrong");
  return failures != 0;
}
"""
pytestmark = [pytest.mark.full, pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles(source):
    headers = Path(torch.__file__).parent / "include"
    includes = [f"-I{headers}", f"-I{headers}/torch/csrc/api/include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command = [COMPILER, *FLAGS, *includes, "-fsyntax-only", f"{ROOT}/csrc/cpu/{source}"]  # templates too, in seconds
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"no {EMULATOR}")
def test_products_types_and_epilogue_are_right_in_the_emulator(tmp_path):
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    built = subprocess.run(
        [COMPILER, *FLAGS, str(source), "-static", "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True)
    assert done.stdout == "right\n", done.stdout + done.stderr
