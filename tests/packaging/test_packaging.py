"""Packaging: the loader of the extension, builds without a compiler, and what a user installs.

The full lane builds a wheel and an sdist from a copy of the sources, installs them in fresh environments that see this
environment's packages (a .pth file, so that torch is not installed again), and runs a swap there from another folder;
then the same binary under torch 2.13.0, and other Pythons where they are found. `FASTRES_PYTHONS` (separated by
commas) names those interpreters, for example "python3.12"; by default python3.10, 3.12 and 3.13 are looked up.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import cuda_binary
from fastres import _extension
from installs import (
    ROOT,
    SMOKE_PURE,
    copy_sources,
    install,
    install_fastres,
    make_venv,
    needs_compiler,
    needs_tree,
    pip_wheel,
    run,
    smoke,
)

full = pytest.mark.full

# Under pytest-xdist with --dist loadgroup one worker runs this file's builds, and builds each thing once.
pytestmark = pytest.mark.xdist_group("packaging")

# A module that the loader accepts.
FRESH = f"def build_info(): return {{'schema_version': {_extension.SCHEMA_VERSION}}}"
HEADERS = "import sysconfig; print(sysconfig.get_path('include'))"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", out, tree, cwd=out)
    (archive,) = out.glob("fastres-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, so that it proves the sdist too; for every architecture."""
    everything = {"FASTRES_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": ""}
    return pip_wheel(sdist, tmp_path_factory.mktemp("wheel") / "out", **everything)[0]


# The loader


class TestLoader:
    """fastres._extension with modules written for the test."""

    @pytest.fixture
    def native(self, tmp_path, monkeypatch):
        package = tmp_path / "fastres_loader_probe"
        package.mkdir()
        (package / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(_extension, "__file__", str(package / "_extension.py"))
        monkeypatch.delenv("FASTRES_DISABLE", raising=False)
        for name in [name for name in sys.modules if name.startswith(package.name)]:
            monkeypatch.delitem(sys.modules, name)

        def make(source=None, backend="cpu"):
            if source is not None:
                (package / "_C.py").write_text(textwrap.dedent(source))
            return _extension._Native(f"{package.name}._C", backend)

        return make

    def test_loads_once(self, native, tmp_path):
        probe = native(
            f"""
            import time
            with open({str(tmp_path / "loads")!r}, "a") as log:
                log.write("x")
            time.sleep(0.1)
            def build_info():
                return {{"schema_version": {_extension.SCHEMA_VERSION}, "compiler": "none"}}
            """
        )
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: (probe.module(), probe.why_not()), range(8)))
        assert len({id(module) for module, _ in found}) == 1
        assert found[0][0] is not None and all(reason is None for _, reason in found)
        assert (tmp_path / "loads").read_text() == "x"
        assert probe.build_info()["compiler"] == "none"

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            (None, ["is not built", "pip install --no-build-isolation"]),
            ("def build_info(): return {'schema_version': 0}", ["is stale: built for operator schemas 0"]),
            ("raise ImportError('undefined symbol: _ZN3foo')", ["undefined symbol: _ZN3foo"]),
            ("import fastres_no_such_module", ["No module named 'fastres_no_such_module'"]),
        ],
        ids=["not built", "stale", "broken", "needs another"],
    )
    def test_what_cannot_be_loaded(self, native, source, words):
        probe = native(source)
        assert probe.module() is None and probe.build_info() == {}
        assert all(text in probe.why_not() for text in words)

    @pytest.mark.parametrize(
        ("built", "words"), [("12.8", "was built for CUDA 12.8, this torch for CUDA 13.0"), ("13.1", "")]
    )
    def test_built_for_another_cuda(self, native, monkeypatch, built, words):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        probe = native(FRESH.replace("}", f", 'cuda': '{built}'}}"), "cuda")
        assert words in (probe.why_not() or "") and (probe.module() is None) == bool(words)

    @pytest.mark.parametrize("setting", ["ext", "cpu", "all", "triton, cpu"])
    def test_disabled(self, native, monkeypatch, setting):
        probe = native(FRESH)
        monkeypatch.setenv("FASTRES_DISABLE", setting)
        assert probe.module() is None and "FASTRES_DISABLE" in probe.why_not()
        monkeypatch.delenv("FASTRES_DISABLE")
        assert probe.module() is not None and probe.why_not() is None

    def test_another_backend_disabled(self, native, monkeypatch):
        monkeypatch.setenv("FASTRES_DISABLE", "cuda,triton")
        assert native(FRESH).module() is not None

    def test_built_for_another_python(self, monkeypatch, tmp_path):
        (tmp_path / "_Cprobe.cpython-39-x86_64-linux-gnu.so").write_text("")
        monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
        monkeypatch.delenv("FASTRES_DISABLE", raising=False)
        reason = _extension._Native("fastres._Cprobe", "cpu").why_not()
        assert "built for another Python (_Cprobe.cpython-39-x86_64-linux-gnu.so" in reason


@needs_compiler
def test_the_extension_is_built_where_it_can_be():
    """Elsewhere the C++ tests skip; here they must not skip in silence."""
    if os.environ.get("FASTRES_BUILD_EXT") == "0" or os.environ.get("FASTRES_DISABLE"):
        pytest.skip("FASTRES_BUILD_EXT or FASTRES_DISABLE leaves it out")
    assert _extension.why_not_cpu() is None
    assert _extension.build_info()["schema_version"] == _extension.SCHEMA_VERSION
    assert _extension.native_cpu().kernel_attributes() == {}


def test_native_schemas_match_the_binary():
    """Every native operator that Python declares has its CPU kernel in the binary."""
    if _extension.native_cpu() is None:
        pytest.skip(_extension.why_not_cpu())
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    for op in ("add_relu", "add_relu_backward", "bn_act", "bn_act_backward"):
        assert f"fastres::_{op}_native" in names


# What a user installs


@full
@needs_tree
@needs_compiler
class TestInstalled:
    def test_wheel(self, wheel, tmp_path):
        assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
        python = make_venv(tmp_path / "venv")
        install_fastres(python, wheel, cwd=tmp_path)
        expected = "imported" if importlib.util.find_spec("triton") else "no triton"
        assert f"kernels: {expected}" in smoke(python, tmp_path)
        listed = run(python, "-m", "zipfile", "-l", wheel, cwd=tmp_path).output
        files = "/py.typed /kernels/bn_act.py fastres/_C. licenses/LICENSE licenses/LICENSE.CUTLASS entry_points.txt"
        for name in files.split():
            assert name in listed, f"{name} is not in {wheel.name}"
        for name in ("tests/", "benchmarks/", "csrc/"):
            assert f"\n{name}" not in listed, f"{name} is in {wheel.name}"
        assert "fastres 0.1.0" in run(python.parent / "fastres", "info", cwd=tmp_path).output

    def test_the_binary_finds_torch_by_name_alone(self, wheel, tmp_path):
        """No path of the machine that built it, and only the shared libraries that every torch brings."""
        shutil.unpack_archive(wheel, tmp_path / "files", "zip")
        (binary,) = (tmp_path / "files/fastres").glob("_C.*.so")
        if shutil.which("readelf") is None:
            pytest.skip("readelf is not installed")
        dynamic = run("readelf", "-d", binary, cwd=tmp_path).output
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
        needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
        torch_libraries = {name for name in needed if name.startswith(("libtorch", "libc10"))}
        assert torch_libraries <= {"libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so"}
        assert not [name for name in needed if "cuda" in name]

    def test_the_wheel_has_cuda_code_for_every_architecture(self, wheel, tmp_path):
        """And its binary finds torch by name alone, and CUDA's runtime in itself."""
        tool = cuda_binary.tool("cuobjdump")
        if torch.version.cuda is None or shutil.which("nvcc") is None or tool is None:
            pytest.skip("no nvcc, no CUDA build of torch or no cuobjdump")
        shutil.unpack_archive(wheel, tmp_path / "files", "zip")
        (binary,) = (tmp_path / "files/fastres").glob("_C_cuda.*.so")
        assert set(cuda_binary.kernels(str(binary))) == {"sm_80", "sm_90a", "sm_100"}
        assert ".sm_100.ptx" in run(tool, "--list-ptx", binary, cwd=tmp_path).output
        if shutil.which("readelf") is not None:
            dynamic = run("readelf", "-d", binary, cwd=tmp_path).output
            assert "RPATH" not in dynamic and "RUNPATH" not in dynamic and "libcudart" not in dynamic

    def test_install_from_the_tree(self, tree, tmp_path):
        python = make_venv(tmp_path / "venv")
        install_fastres(python, tree, cwd=tmp_path, FASTRES_BUILD_EXT="1", FASTRES_CUTLASS=str(tmp_path))
        smoke(python, tmp_path)

    def test_sdist_holds_the_tree(self, sdist, tree, tmp_path):
        """Sources, tests, benchmarks and docs of the tree are all in it; nothing built is."""
        shutil.unpack_archive(sdist, tmp_path)
        (unpacked,) = tmp_path.glob("fastres-*")
        there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
        folders = ("fastres", "kernels", "csrc", "tests", "docs", "requirements", "benchmarks", "examples")
        files = [path for folder in folders for path in (tree / folder).rglob("*") if path.is_file()]
        built = {str(path.relative_to(tree)) for path in files if path.suffix in (".so", ".pyc")}
        wanted = {str(path.relative_to(tree)) for path in files if "results" not in path.parts} - built
        assert wanted - there == set()
        assert not [name for name in there if name.endswith((".so", ".pyc"))]

    def test_editable(self, tmp_path):
        tree = copy_sources(tmp_path / "tree")
        python = make_venv(tmp_path / "venv")
        install_fastres(python, "-e", tree, cwd=tmp_path, FASTRES_BUILD_EXT="1", FASTRES_CUTLASS=str(tmp_path))
        smoke(python, tmp_path, inside=tree)
        (tree / "kernels/added_later.py").write_text("ANSWER = 42\n")
        away = tmp_path / "away"
        code = "from fastres.kernels.added_later import ANSWER; print(ANSWER)"
        assert run(python, "-c", code, cwd=away).output.strip() == "42"

    def test_the_suite_passes_against_an_installed_wheel(self, wheel, tree, tmp_path):
        """Bare pytest beside an installation: the operator tests import the wheel, not the sources."""
        python = make_venv(tmp_path / "venv")
        install_fastres(python, wheel, cwd=tmp_path)
        assert " passed" in run_operator_tests(python, tree, tmp_path)


@full
@needs_tree
class TestPure:
    """No extension: the install works, and says what is missing."""

    def test_left_out(self, tree, tmp_path):
        built, output = pip_wheel(tree, tmp_path / "wheel", FASTRES_BUILD_EXT="0")
        assert built.name.endswith("py3-none-any.whl")
        assert "fastres: fastres._C is left out" in output
        self.check(built, tmp_path)

    def test_no_compiler(self, tree, tmp_path):
        built, output = pip_wheel(tree, tmp_path / "wheel", CXX="/nonexistent/c++")
        assert "no C++ compiler (/nonexistent/c++) was found" in output
        self.check(built, tmp_path)

    @needs_compiler
    def test_failed_compilation(self, tree, tmp_path):
        built, output = pip_wheel(tree, tmp_path / "wheel", CXX=shutil.which("false"))
        assert "fastres._C is left out" in output and "compilation failed" in output
        self.check(built, tmp_path)

    def check(self, built, tmp_path):
        python = make_venv(tmp_path / "venv")
        install_fastres(python, built, cwd=tmp_path)
        output = smoke(python, tmp_path, SMOKE_PURE)
        assert "fastres._C is not built" in output and "C++ compiler" in output


# Other releases of torch, other Pythons


@full
@needs_tree
@needs_compiler
@pytest.mark.timeout(3600)
def test_a_wheel_in_an_empty_environment_runs_the_demo(tree, tmp_path):
    """`python -m build`, then pip alone, with the newest torch that it finds: demo, swap, operators' tests."""
    pytest.importorskip("build")
    build = [sys.executable, "-m", "build", "--no-isolation", "-o", tmp_path / "dist", tree]
    run(*build, cwd=tmp_path, FASTRES_BUILD_EXT="cpu")
    (wheel,), (_,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    python = make_venv(tmp_path / "venv", share_packages=False)
    install(python, f"{wheel}[cli,train,viz]", "pytest", "hypothesis", "expecttest", cwd=tmp_path)
    smoke(python, tmp_path)
    demo = run(python.parent / "fastres", "demo", "--quick", cwd=tmp_path / "away").output
    assert "frozen fp32" in demo and "swapped" in demo
    assert " passed" in run_operator_tests(python, tree, tmp_path)


def run_operator_tests(python, tree, tmp_path):
    """The operators' default tests against the fastres installed in `python`, from a folder without its sources."""
    beside = tmp_path / "beside"
    for name in ("tests", "benchmarks"):
        shutil.copytree(tree / name, beside / name)
    shutil.copy(tree / "pyproject.toml", beside)
    tests = sorted(path.relative_to(beside) for path in (beside / "tests").rglob("test_*.py"))
    chosen = [path for path in tests if path.stem in ("test_add_relu", "test_bn_act", "test_bn_act_contract")]
    assert len(chosen) >= 2
    where = run(python, "-c", "import fastres; print(fastres.__file__)", cwd=beside).output
    assert str(ROOT) not in where and str(beside) not in where
    return run(python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, cwd=beside).output


def find_python(version):
    """A runnable interpreter of this version, or None: on PATH, also behind a pyenv shim of a version not selected."""
    found = shutil.which(f"python{version}")
    for environment in ({}, {"PYENV_VERSION": version}):
        if found is None:
            return None
        done = subprocess.run(
            [found, "-c", "import sys; print(sys.executable)"],
            capture_output=True, text=True, env=os.environ | environment,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def other_pythons():
    asked = os.environ.get("FASTRES_PYTHONS")
    if asked is not None:
        return [name.strip() for name in asked.split(",") if name.strip()]
    return [f"python3.{minor}" for minor in (10, 12, 13) if minor != sys.version_info.minor]


@full
@needs_tree
@needs_compiler
def test_the_same_binary_under_torch_2_13(wheel, tree, tmp_path):
    """Built against this torch's stable ABI, loaded and run by 2.13.0: operators, gradients, a swap."""
    python = make_venv(tmp_path / "venv", share_packages=False)
    install(python, "torch==2.13.0", "safetensors", "numpy", "pytest", "hypothesis", "expecttest", cwd=tmp_path)
    install_fastres(python, wheel, cwd=tmp_path)
    assert "torch 2.13.0" in smoke(python, tmp_path)
    assert " passed" in run_operator_tests(python, tree, tmp_path)


@full
@needs_tree
@needs_compiler
@pytest.mark.parametrize("name", other_pythons())
def test_another_python(name, tree, tmp_path):
    """Built and run by another Python with this torch's release; its torch is installed for real (several GB)."""
    interpreter = shutil.which(name) if os.sep in name else find_python(name.removeprefix("python"))
    if interpreter is None:
        pytest.skip(f"{name} is not installed")
    try:
        python = make_venv(tmp_path / "venv", share_packages=False, interpreter=interpreter)
        include = run(python, "-c", HEADERS, cwd=tmp_path).output.strip()
        if not Path(include, "Python.h").exists():
            pytest.skip(f"{name} has no Python.h")
        release = torch.__version__.split("+")[0]
        build = ["setuptools>=77,<82", "wheel", "ninja", "pybind11>=2.13"]
        run_time = [f"torch=={release}", "safetensors", "numpy", "pytest", "hypothesis", "expecttest"]
        install(python, *build, *run_time, cwd=tmp_path)
        sources = copy_sources(tmp_path / "tree")
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # ninja's
        install_fastres(python, sources, cwd=tmp_path, FASTRES_BUILD_EXT="1", PATH=path)
        version = ".".join(run(python, "-V", cwd=tmp_path).output.split()[1].split(".")[:2])
        assert f"python {version}" in smoke(python, tmp_path)
        assert " passed" in run_operator_tests(python, tree, tmp_path)
    finally:
        shutil.rmtree(tmp_path / "venv", ignore_errors=True)
