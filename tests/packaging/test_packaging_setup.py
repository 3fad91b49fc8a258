"""What setup.py says of the two extensions: which it builds, which it leaves out, and why. Wheels: test_packaging.py.

`--version` configures everything and builds nothing, and one process says it for all cases.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from installs import HAS_COMPILER, HAS_HEADERS, copy_sources, needs_compiler, needs_tree, run

pytestmark = [pytest.mark.xdist_group("packaging"), needs_tree]
CUDA = torch.version.cuda
OTHER = "13.0" if (CUDA or "").startswith("12.") else "12.4"
RUNTIME = ("include/cuda_runtime.h", "lib64/libcudart_static.a")
EACH = """
import contextlib, io, json, os, runpy, sys
said, before = {}, dict(os.environ)
for name, environment in json.load(open(sys.argv[1])).items():
    os.environ.clear()
    os.environ.update(before | environment)
    sys.argv, out = ["setup.py", "--version"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path("setup.py", run_name="__main__")
        except SystemExit as end:
            print(end)
    said[name] = [line for line in out.getvalue().splitlines() if line.startswith("fastres: ")]
print(json.dumps(said))
"""


def toolkit(home, release=CUDA, files=RUNTIME):
    """CUDA_HOME of a toolkit whose nvcc names this release."""
    nvcc = home / "bin/nvcc"
    for path in (nvcc, *(home / name for name in files)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(home)}


def cutlass(home, major=4):
    """FASTRES_CUTLASS of a folder with CUTLASS's headers."""
    header = home / "cutlass_library/source/include/cutlass/version.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR 9\n#define CUTLASS_PATCH 1\n")
    return {"FASTRES_CUTLASS": str(home)}


def wheel(home):
    made = Path(shutil.make_archive(str(home / "nvidia_cutlass-4"), "zip", cutlass(home / "new")["FASTRES_CUTLASS"]))
    return {"FASTRES_CUTLASS": str(made.rename(made.with_suffix(".whl")))}


def script(home):
    """An nvcc on PATH that is a script elsewhere: its own folder is not the toolkit's."""
    (home / "bin").mkdir()
    (home / "bin/nvcc").write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    (home / "bin/nvcc").chmod(0o755)
    return {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "CUDA_HOME": "", "CUDA_PATH": ""}


# Each: what is made in a folder for the environment, then what the last line about the module says.
NO_COMPILER = {"CXX": "/nonexistent/c++"}
CPU = {
    "no compiler": (lambda home: NO_COMPILER, ["_C is left out", "/nonexistent/c++", "install g++"]),
    "no compiler, required": (
        lambda home: {**NO_COMPILER, "FASTRES_BUILD_EXT": "1"},
        ["FASTRES_BUILD_EXT=1, but fastres._C cannot be built", "/nonexistent/c++"],
    ),
    "switched off": (lambda home: {"FASTRES_BUILD_EXT": "0"}, ["left out", "FASTRES_BUILD_EXT=0"]),
    "unknown setting": (lambda home: {"FASTRES_BUILD_EXT": "yes"}, ["got 'yes', expected 0"]),
}
GPU = {
    "no toolkit": (
        lambda home: {"CUDA_HOME": str(home)},
        ["left out, operators on a GPU run through Triton", "{home}/bin/nvcc does not exist"],
    ),
    # left out also where the extension is required: this machine cannot be meant to build it
    "another major release": (
        lambda home: toolkit(home, OTHER) | {"FASTRES_BUILD_EXT": "1"},
        [f"nvcc is CUDA {OTHER}", f"this torch CUDA {CUDA}"],
    ),
    "no headers": (lambda home: toolkit(home, files=()), ["no cuda_runtime.h"]),
    "no runtime": (lambda home: toolkit(home, files=RUNTIME[:1]), ["no libcudart_static.a"]),
    "all architectures": (
        lambda home: toolkit(home) | cutlass(home / "cutlass") | {"TORCH_CUDA_ARCH_LIST": ""},
        ["building fastres._C_cuda with nvcc", f"{CUDA} ({{home}}) and CUTLASS 4.9.1 for 8.0;9.0a;10.0+PTX"],
    ),
    "one architecture": (lambda home: toolkit(home) | {"TORCH_CUDA_ARCH_LIST": "8.6"}, [" for 8.6"]),
    "a wheel of CUTLASS": (lambda home: toolkit(home) | wheel(home), ["and CUTLASS 4.9.1 for"]),
    "no CUTLASS": (
        lambda home: toolkit(home) | {"FASTRES_CUTLASS": str(home / "nothing"), "FASTRES_BUILD_EXT": "1"},
        ["has no include/cutlass", "pip install --no-deps nvidia-cutlass", "building fastres._C_cuda with nvcc"],
    ),
    "an older CUTLASS": (
        lambda home: toolkit(home) | cutlass(home / "cutlass", major=3) | {"FASTRES_BUILD_EXT": "1"},
        ["no convolutions, they run through cuDNN or Triton", "is not CUTLASS 4", "building fastres._C_cuda"],
    ),
    "the CPU module alone": (
        lambda home: toolkit(home) | {"FASTRES_BUILD_EXT": "cpu"},
        ["_C_cuda is left out", "FASTRES_BUILD_EXT=cpu"],
    ),
}
if shutil.which("nvcc"):
    GPU["a script"] = script, []


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def said(tree, tmp_path_factory):
    """(lines of setup.py, folder) by case."""
    folders = {name: tmp_path_factory.mktemp("case") for name in CPU | GPU}
    cases = {name: make(folders[name]) for name, (make, _) in (CPU | GPU).items()}
    (file := tmp_path_factory.mktemp("cases") / "cases.json").write_text(json.dumps(cases))
    found = json.loads(run(sys.executable, "-c", EACH, file, cwd=tree).output.splitlines()[-1])
    return {name: (lines, folders[name]) for name, lines in found.items()}


@pytest.mark.parametrize("name", CPU)
def test_the_cpu_module(said, name):
    ((line,), _) = said[name]
    assert all(words in line for words in CPU[name][1]), line


@pytest.mark.skipif(CUDA is None or not (HAS_COMPILER and HAS_HEADERS), reason="no CUDA build of torch or no compiler")
@pytest.mark.parametrize("name", GPU)
def test_the_cuda_module(said, tree, name):
    lines, home = said[name]
    lines = [line for line in lines if "_C_cuda" in line]
    assert all(words.format(home=home) in " ".join(lines) for words in GPU[name][1]), lines
    assert len(lines) == (2 if "CUTLASS" in name and "wheel" not in name else 1)
    if name == "a wheel of CUTLASS":
        assert (tree / "build/nvidia_cutlass-4/cutlass_library/source/include/cutlass/version.h").exists()
    if name == "a script" and "building" in lines[-1]:  # else its major is not torch's
        root = Path(lines[-1].split("(")[1].split(")")[0])
        assert (root / "include/cuda_runtime.h").exists() and home not in root.parents


@needs_compiler
def test_a_failed_compilation(tree, tmp_path):
    """`false` stands for a compiler that fails on every file. Where none is required: test_packaging.py."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    done = run(*command, cwd=tree, check=False, CXX=shutil.which("false"), FASTRES_BUILD_EXT="1")
    last = [line for line in done.output.splitlines() if line.startswith("fastres: ")][-1]
    assert done.returncode != 0 and "cannot be built: the compilation failed" in last
    assert not list(tmp_path.rglob("*.so"))
