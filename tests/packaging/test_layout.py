"""The house: imports run one way and in no circle, `import fastres` stays light, a library never prints, an operator
has all its files and is named nowhere else, no file is long without a reason.

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
# cli -> lab, compile, pipelines, inference, swap -> graph, models -> nn -> ops -> {kernels, _extension, _dispatch}
RANK = {
    "__main__": 0,
    "cli": 1,
    "lab": 2,
    "compile": 2,
    "ray": 2,
    "pipelines": 3,
    "inference": 4,
    "swap": 5,
    "verify": 6,  # lab, inference and swap use it
    "graph": 7,
    "models": 7,
    "nn": 8,
    "functional": 9,
    "ops": 10,
    "_info": 10,
    "kernels": 11,
    "_extension": 11,
    "_C": 11,
    "_dispatch": 11,
    "_copies": 12,
    "_files": 12,
    "_log": 12,
    "_stamp": 12,
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
TEXTS = {name: path.read_text() for name, path in SOURCES.items()}


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


def circles(edges):
    """The groups of modules each of which reaches all others of its group; `edges`: {module: modules it imports}."""

    def reached(module):
        found, front = set(), list(edges[module])
        while front:
            at = front.pop()
            if at not in found:
                found.add(at)
                front += edges[at]
        return found

    reach = {module: reached(module) for module in edges}
    groups = {frozenset({m, *(n for n in reach[m] if m in reach[n])}) for m in edges if m in reach[m]}
    return sorted(sorted(group) for group in groups)


def within_folders(sources):
    """{module: modules of its own folder that it imports}, of {module: source text}."""
    edges = {}
    for name, text in sources.items():
        found = {module for _, imported in imports(name, text) for module in (imported, f"{imported}.__init__")}
        edges[name] = {m for m in found & sources.keys() - {name} if folder(m) == folder(name)}
    return edges


def test_every_module_has_a_place():
    assert {folder(name) for name in SOURCES} - {""} <= set(RANK)


def test_imports_run_one_way():
    wrong = [line for name, text in TEXTS.items() for line in violations(name, text)]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_a_folder_make_no_circle():
    """Those inside functions count too: they hide a circle and do not open it."""
    found = circles(within_folders(TEXTS))
    assert not found, "\n".join(" <-> ".join(group) for group in found)


def test_a_circle_is_found():
    texts = {"a": "import fastres.nn.b", "b": "def f():\n    from fastres.nn.c import x", "c": "from .a import x"}
    texts["d"] = texts["c"]  # it leads into the circle and is not of it
    sources = {f"fastres.nn.{name}": text for name, text in texts.items()}
    assert circles(within_folders(sources)) == [[f"fastres.nn.{name}" for name in "abc"]]


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


def test_kernels_import_torch_and_triton_alone():
    kernels = {name: text for name, text in TEXTS.items() if folder(name) == "kernels"}
    roots = {imported.split(".")[0] for name, text in kernels.items() for _, imported in imports(name, text)}
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


def test_a_library_never_prints_and_is_python_3_10():
    for name, text in TEXTS.items():
        calls = [n for n in ast.walk(ast.parse(text, feature_version=(3, 10))) if isinstance(n, ast.Call)]
        printed = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert folder(name) == "cli" or printed == [], name


def test_no_file_is_long_without_a_reason():
    """Above 400 lines one of the first 15 says why ("Longer than 400 lines: ...")."""
    folders, suffixes = ("fastres", "kernels", "csrc", "benchmarks", "tests"), (".py", ".cpp", ".h", ".cu", ".cuh")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    long = {path: lines for path in files if len(lines := path.read_text().splitlines()) > 400}
    bare = [path for path, lines in long.items() if "400 lines" not in " ".join(lines[:15])]
    assert not bare, "\n".join(f"{path.relative_to(ROOT)}: {len(long[path])} lines" for path in bare)


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_has_one_name_in_every_folder(op):
    files = [f"kernels/{op}.py", f"csrc/cpu/{op}.cpp", f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"]
    if op == "conv_act":  # oneDNN is its CPU kernel
        files.remove(f"csrc/cpu/{op}.cpp")
    else:
        files.append(f"csrc/cuda/{op}.cu")
    assert [file for file in files if not (ROOT / file).exists()] == []


def code_lines(path):
    """A source file's lines without comments and docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S).splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines()]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return lines


# Where an operator stands outside its own files: how many lines of code at most, and why. A new operator adds a line to
# the registry and to the public names; a new fusion none.
NAMED = {
    "fastres/ops/__init__.py": (4, "the registry"),
    "fastres/functional.py": (2, "the public names"),
    "fastres/nn/steps.py": (8, "the modules' calls"),
    "fastres/nn/conv_steps.py": (2, "the modules' calls"),
    "fastres/nn/norms.py": (1, "the modules' calls"),
    "fastres/verify/floor.py": (5, "how exact an operator is"),
    "fastres/ops/conv_act.py": (1, "its ReLU's gradient is add_relu's"),
    "kernels/configs.py": (7, "tile sizes by kernel"),
    "csrc/module.cpp": (2, "docstrings of the list of conv_act's kernels"),
    "csrc/cuda/kernels.cu": (1, "the list of conv_act's kernels"),
    "csrc/cuda/bn_act_backward.cu": (2, "a ReLU's gradient alone is add_relu's"),
    "fastres/graph/normalize.py": (3, "an operator's call, read"),
    "fastres/compile.py": (2, "which convolutions it has written"),
    "fastres/inference/report.py": (3, "counts by kind"),
    "fastres/graph/recipe.py": (1, "which steps run on integers"),
}


def own(op, path):
    """The files of one operator: by its name, and the parts of a convolution by conv_."""
    stem = path.stem.removeprefix("_")
    return stem.startswith(op) or stem.startswith("conv_" if op == "conv_act" else f"{op.split('_')[0]}_")


def test_an_operator_is_named_in_few_places():
    files = [path for folder in ("fastres", "kernels", "csrc") for path in sorted((ROOT / folder).rglob("*.*"))]
    found = {}
    for path in files:
        name = str(path.relative_to(ROOT))
        if path.suffix not in (".py", ".cpp", ".h", ".cu", ".cuh") or name.startswith("fastres/graph/fusions/"):
            continue
        foreign = [op for op in OPERATORS if not own(op, path)]
        pattern = re.compile(rf"(?<![A-Za-z0-9_])_?({'|'.join(foreign)})") if foreign else None
        count = sum(bool(pattern.search(line)) for line in code_lines(path)) if pattern else 0
        if count:
            found[name] = count
    more = [f"{name}: {count} lines" for name, count in found.items() if count > NAMED.get(name, (0,))[0]]
    assert not more, "\n".join(more)
    assert NAMED.keys() - found.keys() == set(), "no longer needed in the list above"


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
