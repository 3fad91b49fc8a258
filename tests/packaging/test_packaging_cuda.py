"""Packaging of fastres._C_cuda: whether setup.py builds it, and why not. A wheel's code: test_packaging.py."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_packaging import HAS_COMPILER, HAS_HEADERS, copy_sources, needs_tree, run

pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("tree"))


@needs_tree
class TestCudaConfiguration:
    """What setup.py says about fastres._C_cuda; `--version` configures and builds nothing."""

    def says(self, tree, check=True, **environment):
        done = run(sys.executable, "setup.py", "--version", cwd=tree, check=check, **environment)
        return [line for line in done.output.splitlines() if line.startswith("fastres: ") and "_C_cuda" in line]

    def toolkit(self, tmp_path, release, files=("include/cuda_runtime.h", "lib64/libcudart_static.a")):
        nvcc = tmp_path / "bin/nvcc"
        for path in (nvcc, *(tmp_path / name for name in files)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        nvcc.chmod(0o755)
        return tmp_path

    @pytest.fixture(autouse=True)
    def _cuda_torch(self):
        if torch.version.cuda is None or not (HAS_COMPILER and HAS_HEADERS):
            pytest.skip("this torch is built without CUDA, or there is no C++ compiler")

    def test_no_toolkit(self, tree, tmp_path):
        (line,) = self.says(tree, CUDA_HOME=str(tmp_path))
        assert (
            "left out, operators on a GPU run through Triton" in line and f"{tmp_path}/bin/nvcc does not exist" in line
        )
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
        if shutil.which("nvcc", path=path) is None and not Path("/usr/local/cuda/bin/nvcc").exists():
            (line,) = self.says(tree, PATH=path, CUDA_HOME="")
            assert "no nvcc was found" in line

    def test_another_major_release(self, tree, tmp_path):
        """Left out with a reason, also where the extension is required: this machine cannot be meant to build it."""
        other = "12.4" if not torch.version.cuda.startswith("12.") else "13.0"
        (line,) = self.says(tree, CUDA_HOME=str(self.toolkit(tmp_path, other)), FASTRES_BUILD_EXT="1")
        assert f"nvcc is CUDA {other}" in line and f"this torch CUDA {torch.version.cuda}" in line

    def test_an_incomplete_toolkit(self, tree, tmp_path):
        home = self.toolkit(tmp_path, torch.version.cuda, files=())
        (line,) = self.says(tree, CUDA_HOME=str(home))
        assert "no cuda_runtime.h" in line
        (home / "include").mkdir()
        (home / "include/cuda_runtime.h").touch()
        (line,) = self.says(tree, CUDA_HOME=str(home))
        assert "no libcudart_static.a" in line

    def test_architectures(self, tree, tmp_path):
        home = str(self.toolkit(tmp_path, torch.version.cuda))
        (line,) = self.says(tree, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="", FASTRES_CUTLASS=str(self.cutlass(tmp_path)))
        with_both = f"with nvcc {torch.version.cuda} ({home}) and CUTLASS 4.9.1 for 8.0;9.0a;10.0+PTX"
        assert f"building fastres._C_cuda {with_both}" in line
        (line,) = self.says(tree, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="8.6")
        assert line.endswith(" for 8.6")

    def cutlass(self, folder, major=4):
        header = folder / "cutlass_library/source/include/cutlass/version.h"
        header.parent.mkdir(parents=True)
        header.write_text(f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR 9\n#define CUTLASS_PATCH 1\n")
        return folder

    def test_cutlass_from_a_wheel(self, tree, tmp_path):
        home, folder = str(self.toolkit(tmp_path, torch.version.cuda)), self.cutlass(tmp_path / "unpacked")
        wheel = Path(shutil.make_archive(str(tmp_path / "nvidia_cutlass-4"), "zip", folder))
        (line,) = self.says(tree, CUDA_HOME=home, FASTRES_CUTLASS=str(wheel.rename(wheel.with_suffix(".whl"))))
        assert "and CUTLASS 4.9.1 for" in line
        assert (tree / "build/nvidia_cutlass-4/cutlass_library/source/include/cutlass/version.h").exists()

    def test_without_cutlass_the_rest_is_built(self, tree, tmp_path):
        home = str(self.toolkit(tmp_path, torch.version.cuda))
        for folder, why in (
            (tmp_path / "nothing", "has no include/cutlass"),
            (self.cutlass(tmp_path / "old", major=3), "is not CUTLASS 4"),
        ):
            lines = self.says(tree, CUDA_HOME=home, FASTRES_CUTLASS=str(folder), FASTRES_BUILD_EXT="1")
            assert "fastres._C_cuda has no convolutions, they run through cuDNN or Triton" in lines[0]
            assert why in lines[0] and "pip install --no-deps nvidia-cutlass" in lines[0]
            assert "building fastres._C_cuda with nvcc" in lines[1] and "CUTLASS" not in lines[1]

    def test_the_cpu_module_alone(self, tree, tmp_path):
        home = str(self.toolkit(tmp_path, torch.version.cuda))
        (line,) = self.says(tree, CUDA_HOME=home, FASTRES_BUILD_EXT="cpu")
        assert "left out" in line and "FASTRES_BUILD_EXT=cpu" in line

    def test_nvcc_on_path_may_be_a_script_elsewhere(self, tree, tmp_path):
        """Its own folder is not the toolkit's: nvcc itself is asked."""
        real = shutil.which("nvcc")
        if real is None:
            pytest.skip("no nvcc")
        (tmp_path / "nvcc").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        (tmp_path / "nvcc").chmod(0o755)
        (line,) = self.says(tree, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", CUDA_HOME="", CUDA_PATH="")
        if "building" in line:  # else its major is not torch's
            root = Path(line.split("(")[1].split(")")[0])
            assert (root / "include/cuda_runtime.h").exists() and tmp_path not in root.parents
