"""Builds fastres._C (CPU kernels) beside the pure-Python package. Downloads nothing.

The metadata is in pyproject.toml. A missing compiler or missing Python headers leave the extension out, in one clear
line, and the install goes on: every operator then runs through its reference (`fastres info` says so).
"""

import os
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def extensions():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cxx_flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    return [
        CppExtension(
            "fastres._C",
            sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx_flags},
        )
    ], BuildExtension


ext_modules, build_ext = extensions()
setup(
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres.kernels",
        *("fastres.kernels." + p for p in find_packages("kernels")),
    ],
    package_dir={"fastres.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass={"build_ext": build_ext},
)
