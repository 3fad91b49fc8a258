"""Builds fastres._C (the CPU kernels) and, where possible, fastres._C_cuda (the GPU kernels). Downloads nothing.

The metadata is in pyproject.toml. `FASTRES_BUILD_EXT` controls the extensions: 0 leaves both out, 1 makes a failed
compilation an error, cpu does the same but leaves fastres._C_cuda out, unset tries both. fastres._C_cuda needs nvcc and
a CUDA build of torch of the same major release, but no GPU; it is built for the architectures of
`TORCH_CUDA_ARCH_LIST`. Its convolutions need the headers of CUTLASS 4: PyPI's nvidia-cutlass, or a path in
`FASTRES_CUTLASS`. A build that leaves something out says why in one line and continues: operators then run through
Triton, cuDNN or their references, and `fastres info` says what is missing.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import zipfile
from glob import glob
from pathlib import Path
from unittest import mock

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
os.chdir(ROOT)

SETTING = os.environ.get("FASTRES_BUILD_EXT", "").strip()
if SETTING not in ("", "0", "1", "cpu"):
    raise SystemExit(
        f"fastres: FASTRES_BUILD_EXT: got {SETTING!r}, expected 0 (leave out), 1 (require), cpu (require fastres._C, "
        "leave fastres._C_cuda out) or unset (try)"
    )
REQUIRED = SETTING in ("1", "cpu")
CPU, CUDA = "fastres._C", "fastres._C_cuda"
INSTEAD = {CPU: "operators run through their references", CUDA: "operators on a GPU run through Triton"}

# csrc includes no ATen header: built for the stable ABI of this release, one binary loads in it and in later ones.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = ["-O2", "-fno-math-errno", "-fno-trapping-math", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi"]
CXX_FLAGS += DEFINES
SM90 = "/conv_sm90"  # files of kernels that only 9.0a can run
# NDEBUG: without it ptxas serializes wgmma. USE_CUDA: torch's header declares the current stream.
NVCC_FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden", *DEFINES]


def leave_out(module, reason, required=REQUIRED):
    """Say in one line that a module is left out, or end the build if it is required."""
    if required:
        raise SystemExit(f"fastres: FASTRES_BUILD_EXT={SETTING}, but {module} cannot be built: {reason}")
    print(f"fastres: {module} is left out, {INSTEAD[module]}: {reason}", flush=True)


def missing_tool():
    """The tool that a build of fastres._C lacks on this machine, as a sentence, or None."""
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


def toolkit_root():
    """CUDA's folder: CUDA_HOME, CUDA_PATH, or what nvcc reports: nvcc on PATH may be a link or a script."""
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if asked:
        return Path(asked)
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.M)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def cuda_tools(torch_cuda):
    """(root, folder of the static runtime, nvcc's release) of a toolkit for this torch, or the reason there is none."""
    if torch_cuda is None:
        return "this torch is built without CUDA"
    root = toolkit_root()
    if root is None:
        return f"no nvcc was found; install the CUDA {torch_cuda} toolkit, or name its folder in CUDA_HOME"
    nvcc = root / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{nvcc} does not exist; CUDA_HOME must name the folder of a CUDA {torch_cuda} toolkit"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        return f"{nvcc} --version reports no release"
    if release[1].split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"nvcc is CUDA {release[1]} ({root}), this torch CUDA {torch_cuda}: install a toolkit of that major release"
        )
    if not (root / "include" / "cuda_runtime.h").exists():
        return f"{root}/include has no cuda_runtime.h"
    for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return root, folder, release[1]
    return f"{root} has no libcudart_static.a"


def cutlass_headers():
    """(folders, version) of the headers of CUTLASS 4, or the reason there are none."""
    how = "pip install --no-deps nvidia-cutlass, or set FASTRES_CUTLASS to its wheel or a folder with include/cutlass"
    given = os.environ.get("FASTRES_CUTLASS")
    spec = None if given else importlib.util.find_spec("cutlass_library")
    if not given and (spec is None or spec.origin is None):
        return f"the headers of CUTLASS were not found: {how}"
    root = Path(given) if given else Path(spec.origin).parents[1]
    if root.is_file() and zipfile.is_zipfile(root):
        with zipfile.ZipFile(root) as wheel:
            root = ROOT / "build" / root.stem
            wheel.extractall(root, [name for name in wheel.namelist() if "/include/" in name])
    for source in (root, root / "cutlass_library/source"):
        found = source / "include/cutlass/version.h"
        if found.exists():
            break
    else:
        return f"{root} has no include/cutlass: {how}"
    text = found.read_text()
    version = [re.search(rf"define CUTLASS_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    if None in version or version[0][1] != "4":
        return f"{source} is not CUTLASS 4: {how}"
    return [str(source / "include"), str(source / "tools/util/include")], ".".join(part[1] for part in version)


def limit_jobs():
    """Limit parallel compilers to what fits in memory: a file of convolutions takes up to 5 GB. MAX_JOBS overrides."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, memory // 5))))


def cuda_extension(torch, extension):
    """The extension fastres._C_cuda, or None if it is left out."""
    if SETTING == "cpu":
        return leave_out(CUDA, "FASTRES_BUILD_EXT=cpu", required=False)
    sources = sorted(glob("csrc/cuda/**/*.cu", recursive=True))
    tools = cuda_tools(torch.version.cuda) if sources else "there are no sources under csrc/cuda"
    if isinstance(tools, str):  # not an error even if extensions are required: this machine cannot build it
        return leave_out(CUDA, tools, required=False)
    root, libraries, release = tools
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(root)  # torch guesses it from the location of nvcc, which may be a script elsewhere
    # PTX of 10.0a would run on no other chip; CUDA before 12.8 does not know 10.0.
    known = "8.0;9.0a;10.0+PTX" if tuple(map(int, release.split("."))) >= (12, 8) else "8.0;9.0a"
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or known
    cutlass = cutlass_headers()
    tiles = [source for source in sources if "/conv_sm" in source]
    sources = [source for source in sources if source not in tiles]
    defines, folders, version = [], [], ""
    if isinstance(cutlass, str):
        print(f"fastres: {CUDA} has no convolutions, they run through cuDNN or Triton: {cutlass}", flush=True)
    else:
        folders, version = cutlass
        hopper = "9.0a" in re.split(r"[; +]", architectures)
        sources += [source for source in tiles if hopper or SM90 not in source]
        defines = ["-DFASTRES_CONV_SM80", *(["-DFASTRES_CONV_SM90"] if hopper else [])]
        limit_jobs()
    with_cutlass = f" and CUTLASS {version}" if version else ""
    print(f"fastres: building {CUDA} with nvcc {release} ({root}){with_cutlass} for {architectures}", flush=True)
    about = [f'-DFASTRES_ARCHITECTURES="{architectures}"', f'-DFASTRES_FLAGS="{" ".join(NVCC_FLAGS)}"']
    about.append(f'-DFASTRES_CUTLASS="{version}"')
    return extension(
        CUDA,
        sources=["csrc/module.cpp", *sources],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cuda/*.h") + glob("csrc/cuda/*.cuh")),
        include=folders,
        extra_compile_args={"cxx": [*CXX_FLAGS, "-DFASTRES_CUDA", *about], "nvcc": [*NVCC_FLAGS, *defines]},
        # The static runtime: none has to be found at load time, and nobody shares its error state.
        library_dirs=[str(libraries)],
        libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
        extra_link_args=["-Wl,--exclude-libs,libcudart_static.a"],
    )


def extension_options():
    """setup()'s arguments for the extensions; empty if both are left out."""
    if SETTING == "0":
        return leave_out(CPU, "FASTRES_BUILD_EXT=0") or {}
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    reason = missing_tool() if sources else "there are no sources under csrc/"
    if reason:
        return leave_out(CPU, reason) or {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return leave_out(CPU, f"{error}; install torch and pybind11 and build with --no-build-isolation") or {}

    class Build(BuildExtension):
        def build_extensions(self):
            cxx = os.environ["CXX"]
            print(f"fastres: building {CPU} with {cxx} for torch >= 2.11 (here {torch.__version__})", flush=True)
            whole = self.extensions
            for one in whole:  # one at a time, so that one can fail without the other
                self.extensions = [one]
                try:
                    super().build_extensions()
                except Exception as error:  # distutils, ninja and torch each raise their own
                    self.forget(one)
                    leave_out(one.name, f"the compilation failed ({error}); the compiler's messages are above")
                    if one.name == CPU:
                        break
            self.extensions = whole

        def build_extension(self, ext):
            temporary, compile_all = self.build_temp, self.compiler.compile
            self.build_temp = os.path.join(temporary, ext.name)  # both compile csrc/module.cpp

            def compile_by_architecture(sources, output_dir, **options):
                hopper = [source for source in sources if SM90 in source]
                objects = []
                if hopper:  # first, they take longest; separate, other chips lack the instructions
                    with mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST="9.0a"):
                        objects += compile_all(hopper, output_dir=os.path.join(output_dir, "sm_90a"), **options)
                rest = [source for source in sources if source not in hopper]
                return objects + compile_all(rest, output_dir=output_dir, **options)

            self.compiler.compile = compile_by_architecture
            try:
                super().build_extension(ext)
            finally:
                self.build_temp, self.compiler.compile = temporary, compile_all

        def forget(self, failed):
            """Delete older binaries, from the build and next to the sources, so that none passes for this one."""
            for ext in self.extensions if failed.name == CUDA else self.distribution.ext_modules:
                ext.optional = True
                built = Path(self.get_ext_fullpath(ext.name))
                for stale in (built, ROOT / "fastres" / built.name):
                    stale.unlink(missing_ok=True)

    def extension(name, include=(), **options):
        # PyPI's pybind11 comes before torch's bundled copy, which rejects TORCH_TARGET_VERSION.
        return CppExtension(name, include_dirs=[str(ROOT / "csrc"), pybind11.get_include(), *include], **options)

    cpu = extension(
        CPU,
        sources=sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        extra_compile_args={"cxx": [*CXX_FLAGS, f'-DFASTRES_FLAGS="{" ".join(CXX_FLAGS)}"']},
    )
    cuda = cuda_extension(torch, extension)
    return {"ext_modules": [cpu] if cuda is None else [cpu, cuda], "cmdclass": {"build_ext": Build}}


setup(
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres.kernels",
        *("fastres.kernels." + p for p in find_packages("kernels")),
    ],
    package_dir={"fastres.kernels": "kernels"},
    **extension_options(),
)
