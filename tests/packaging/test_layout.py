"""The house: imports run one way, `import fastres` stays light, a library never prints, an operator has all its files.

Everything here reads the sources and runs none of them, but for `import fastres` in a fresh process.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "setup.py").exists():
    pytest.skip("the tests lie outside a source tree", allow_module_level=True)

# A module may import modules of a higher number and those of its own folder, nothing else of fastres:
# cli -> lab, inference, swap -> models -> nn -> ops -> {kernels, _extension, _dispatch}
RANK = {
    "__main__": 0,
    "cli": 1,
    "lab": 2,
    "compile": 2,  # beside lab
    "inference": 3,
    "swap": 4,
    "verify": 5,  # beside swap and inference, which may use it
    "models": 6,
    "nn": 7,
    "functional": 8,
    "ops": 9,
    "_info": 9,
    "kernels": 10,
    "_extension": 10,
    "_C": 10,
    "_dispatch": 10,
    "_log": 11,
}
NEVER_AT_IMPORT = ("triton", "torchvision", "timm", "transformers", "sklearn", "matplotlib", "rich", "typer")
OPERATORS = sorted(path.stem for path in (ROOT / "fastres/ops").glob("[!_]*.py"))


def module_name(path):
    """fastres/nn/layers.py -> fastres.nn.layers, kernels/bn_act.py -> fastres.kernels.bn_act."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastres")
    return ".".join(parts)


FILES = [path for folder in ("fastres", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = {module_name(path): path for path in FILES}


def imports(name, source):
    """The modules that the source of module `name` imports, anywhere in it, as (line, absolute name)."""
    package = name.removesuffix(".__init__") if name.endswith(".__init__") else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in SOURCES or f"{inner}.__init__" in SOURCES or alias.name in RANK
                yield node.lineno, inner if base.split(".")[0] == "fastres" and is_module else base


def folder(name):
    """The part of a module's name that RANK lists: fastres.nn.layers -> nn; the package itself -> ''."""
    parts = name.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(name, source):
    """What is wrong with the imports of one module, as sentences."""
    own = folder(name)
    if own == "":
        return []
    wrong = []
    for line, imported in imports(name, source):
        if imported.split(".")[0] == "kernels":
            wrong.append(f"{name}:{line} imports {imported}: its name is fastres.kernels")
        if imported.split(".")[0] != "fastres":
            continue
        other = folder(imported)
        if other == "":
            if RANK[own] > RANK["lab"]:
                wrong.append(f"{name}:{line} imports a public name from fastres; import the module that defines it")
        elif other != own and RANK.get(other, -1) <= RANK[own]:
            wrong.append(f"{name}:{line} imports {imported}: {own} -> {other} goes up")
    return wrong


def test_every_module_has_a_place():
    assert {folder(name) for name in SOURCES} - {""} <= set(RANK)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name):
    assert violations(name, SOURCES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fastres.ops.bn_act", "from fastres.nn import BNReLU"),
        ("fastres.ops.bn_act", "from fastres import nn"),
        ("fastres.ops.bn_act", "def f():\n    import fastres.swap"),
        ("fastres.nn.layers", "from ..models import resnet18"),
        ("fastres.nn.layers", "from fastres import bn_act"),
        ("fastres.models.cifar", "from fastres.functional import x\nfrom fastres.verify import verify"),
        ("fastres.swap.__init__", "from ..inference import freeze"),
        ("fastres._dispatch", "from fastres import _extension"),
        ("fastres.kernels.bn_act", "from fastres.ops import bn_act"),
        ("fastres.kernels.bn_act", "from ..ops import bn_act"),
        ("fastres.ops.bn_act", "import kernels.bn_act"),
    ],
)
def test_an_import_that_goes_up_is_found(name, source):
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize("name", [name for name in SOURCES if folder(name) == "kernels"])
def test_kernels_import_torch_and_triton_alone(name):
    roots = {imported.split(".")[0] for _, imported in imports(name, SOURCES[name].read_text())}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "triton", "fastres"}


def test_csrc_includes_the_stable_abi_alone():
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/", "pybind11/")
    files = [path for suffix in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in sorted((ROOT / "csrc").rglob(suffix))]
    assert files
    for path in files:
        for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M):
            foreign = include.startswith(("torch/", "ATen", "c10", "pybind11/")) and not include.startswith(allowed)
            assert not foreign, f"{path.relative_to(ROOT)} includes {include}, which is outside the stable ABI"
    assert not [path for path in files if path.name == "math.h"], "a header called math.h shadows the system's"


@pytest.mark.parametrize("name", [name for name in SOURCES if folder(name) != "cli"])
def test_a_library_never_prints(name):
    calls = [node for node in ast.walk(ast.parse(SOURCES[name].read_text())) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_python_3_10(name):
    ast.parse(SOURCES[name].read_text(), feature_version=(3, 10))


def test_known_operators():
    assert {"add_relu", "bn_act", "conv_act"} <= set(OPERATORS)


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_has_one_name_in_every_folder(op):
    files = [f"kernels/{op}.py", f"csrc/cpu/{op}.cpp", f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"]
    if op == "conv_act":  # oneDNN is its CPU kernel
        files.remove(f"csrc/cpu/{op}.cpp")
    else:
        files.append(f"csrc/cuda/{op}.cu")
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("op", OPERATORS)
def test_no_operator_is_named_in_the_dispatch(op):
    """Adding an operator edits no central table: only docstrings of _dispatch and _extension may mention one."""
    for file in ("fastres/_dispatch.py", "fastres/_extension.py"):
        tree = ast.parse((ROOT / file).read_text())
        documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docs = {ast.get_docstring(node, clean=False) for node in documented}
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} - docs
        assert not [text for text in strings if isinstance(text, str) and op in text], file


def test_importing_fastres_is_light():
    """It loads no triton, no optional package and no compiler stack, creates no CUDA context and warns of nothing."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import fastres
print(json.dumps({"loaded": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized()}))
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("FASTRES_")}
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    loaded = found["loaded"]
    roots = {name.split(".")[0] for name in loaded}
    assert "fastres.ops.bn_act" in loaded
    assert not found["cuda"]
    assert roots.isdisjoint(NEVER_AT_IMPORT)
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "fastres.kernels"))]
    assert len(loaded) < 150, f"{len(loaded)} modules beyond torch's"
