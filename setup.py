"""Builds fastres._C (the CPU kernels) beside the pure-Python package. Downloads nothing.

The metadata is in pyproject.toml. `FASTRES_BUILD_EXT` decides about the extension: 0 leaves it out, 1 requires it,
unset tries. A build that leaves it out says why in one line and goes on: every operator then runs through its
reference, and `fastres info` says what is missing.
"""

import os
import shlex
import shutil
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
os.chdir(ROOT)

SETTING = os.environ.get("FASTRES_BUILD_EXT", "").strip()
if SETTING not in ("", "0", "1"):
    raise SystemExit(f"fastres: FASTRES_BUILD_EXT: got {SETTING!r}, expected 0 (leave out), 1 (require) or unset (try)")
REQUIRED = SETTING == "1"

# csrc includes no ATen header: with the stable ABI of this release, one binary loads in it and in every later one.
TORCH_TARGET = "0x020b000000000000"
CXX_FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]


def leave_out(reason):
    """Says in one line that the extension is left out, or ends the build where it is required."""
    if REQUIRED:
        raise SystemExit(f"fastres: FASTRES_BUILD_EXT=1, but fastres._C cannot be built: {reason}")
    print(f"fastres: fastres._C is left out, operators run through their references: {reason}", flush=True)
    return {}


def missing_tool():
    """What a build of the extension lacks on this machine, or None."""
    asked = os.environ.get("CXX")
    compiler = next(filter(shutil.which, [shlex.split(asked)[0]] if asked else ["c++", "g++", "clang++"]), None)
    if compiler is None:
        return f"no C++ compiler ({asked or 'c++, g++ or clang++'}) was found; install g++, or name one in CXX"
    os.environ.setdefault("CXX", compiler)
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        version = sysconfig.get_python_version()
        return f"Python's headers are missing ({headers}/Python.h); install python{version}-dev"
    return None


def extension_options():
    """setup()'s arguments for the extension; empty when it is left out."""
    if SETTING == "0":
        return leave_out("FASTRES_BUILD_EXT=0")
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    if not sources:
        return leave_out("there are no sources under csrc/")
    reason = missing_tool()
    if reason:
        return leave_out(reason)
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return leave_out(f"{error}; install torch and pybind11 and build with --no-build-isolation")

    class Build(BuildExtension):
        def build_extensions(self):
            cxx = os.environ["CXX"]
            print(f"fastres: building fastres._C with {cxx} for torch >= 2.11 (here {torch.__version__})", flush=True)
            try:
                super().build_extensions()
            except Exception as error:  # distutils, ninja and torch each raise their own
                for ext in self.extensions:
                    ext.optional = True
                    # No older binary may pass for this one: neither the one built before, nor one beside the sources.
                    built = Path(self.get_ext_fullpath(ext.name))
                    for stale in (built, ROOT / "fastres" / built.name):
                        stale.unlink(missing_ok=True)
                leave_out(f"the compilation failed ({error}); the compiler's messages are above")

    extension = CppExtension(
        "fastres._C",
        sources=sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        # PyPI's pybind11 comes before torch's bundled copy, which refuses TORCH_TARGET_VERSION.
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args={"cxx": [*CXX_FLAGS, f'-DFASTRES_CXX_FLAGS="{" ".join(CXX_FLAGS)}"']},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres.kernels",
        *("fastres.kernels." + p for p in find_packages("kernels")),
    ],
    package_dir={"fastres.kernels": "kernels"},
    **extension_options(),
)
