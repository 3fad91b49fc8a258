"""Installations for the tests of packaging: a copy of the sources, fresh environments, a swap run in one of them."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
needs_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests lie outside a source tree")
needs_compiler = pytest.mark.skipif(
    not (HAS_COMPILER and HAS_HEADERS), reason="no C++ compiler or no Python.h on this machine"
)

# Run by an installation from a folder without sources: imports, both operators and a swap, against eager.
SMOKE = """
import copy, sys
import torch
from torch import nn
import fastres, fastres._C
from fastres import functional as F

try:
    import triton
except ImportError:  # CPU builds of torch do not bring it, and nothing of the core needs it
    print("kernels: no triton")
else:
    import fastres.kernels.add_relu, fastres.kernels.bn_act
    print("kernels: imported")

assert fastres._C.build_info()["schema_version"] == fastres._extension.SCHEMA_VERSION
assert fastres._extension.why_not_cpu() is None, fastres._extension.why_not_cpu()
torch.manual_seed(0)
x, r = torch.randn(2, 4, 19, 7, 5)
assert fastres.explain("bn_act", x).chosen == "cpu", fastres.explain("bn_act", x)
torch.testing.assert_close(F.add_relu(x, r, backend="cpu"), torch.relu(x + r), rtol=0, atol=0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
shape = (2, 3, 8, 8)
try:
    from torchvision.models.resnet import BasicBlock
except Exception:  # torchvision is absent, or fails to import beside this torch
    pass
else:
    net, shape = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)), (2, 16, 8, 8)
fast = copy.deepcopy(net)
report = fastres.swap(fast, strict=True)
assert [row.status for row in report.rows if row.status == "swapped"], report
for training in (True, False):
    net.train(training), fast.train(training)
    x = torch.randn(*shape)
    a, c = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, want = fast(a), net(c)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
    ours.sum().backward(), want.sum().backward()
    torch.testing.assert_close(a.grad, c.grad, rtol=1e-4, atol=1e-4)
for name, value in net.state_dict().items():
    torch.testing.assert_close(fast.state_dict()[name], value, rtol=1e-5, atol=1e-5)
print("fastres", fastres.__file__)
print("torch", torch.__version__, "python", sys.version.split()[0])
"""

# The same without the extension: the reference runs, and info says what is missing.
SMOKE_PURE = """
import torch, fastres
from fastres import functional as F

x, r = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
assert fastres.explain("add_relu", x).chosen == "reference", fastres.explain("add_relu", x)
torch.testing.assert_close(F.add_relu(x, r), torch.relu(x + r), rtol=0, atol=0)
net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
want = net(x)
assert fastres.swap(net, strict=True)
torch.testing.assert_close(net(x), want)
print("fastres", fastres.__file__)
print(fastres.info())
"""

GIT_LIST = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]


def run(*command, cwd, check=True, **environment):
    """Runs a command in a clean environment; the output, stdout and stderr together, and the exit status."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FASTRES_", "PYTEST_", "PYTHONPATH"))}
    env |= {"OMP_NUM_THREADS": "1", "MAX_JOBS": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env |= {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    done.output = done.stdout
    return done


def copy_sources(target):
    """A copy of the files that a clone of this tree would have, with those not yet committed."""
    listed = subprocess.run(GIT_LIST, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # an unpacked sdist
        skip = {".venv", "build", "dist", "__pycache__"}
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".so"]
        names = [str(path) for path in files if not skip & set(path.parts)]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def make_venv(path, share_packages=True, interpreter=sys.executable):
    """A fresh environment: with pip and nothing else, or seeing the packages of the running one, its pip too."""
    run(interpreter, "-m", "venv", *(["--without-pip"] if share_packages else []), path, cwd=path.parent)
    python = path / "bin" / "python"
    if share_packages:
        # A folder named in a .pth file is searched, but its own .pth files, such as an editable install's, are not run.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(run(python, "-c", code, cwd=path).output.strip())
        shared = dict.fromkeys([str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib")])
        (site / "shared.pth").write_text("\n".join(shared) + "\n")
    return python


def install(python, *what, cwd, **environment):
    """`pip install` into the environment of `python`."""
    return run(python, "-m", "pip", "install", "-q", *what, cwd=cwd, **environment)


def install_fastres(python, *what, cwd, **environment):
    """The same for fastres alone, also where another fastres is among the shared packages.

    Where FASTRES_CUTLASS names a folder without CUTLASS, the convolutions, minutes of nvcc, are left out.
    """
    options = ["--no-deps", "--no-build-isolation", "--force-reinstall"]
    return install(python, *options, *what, cwd=cwd, **environment)


def smoke(python, tmp_path, code=SMOKE, inside=None):
    """Runs `code` from an empty folder and checks where fastres was imported from."""
    away = tmp_path / "away"
    away.mkdir(exist_ok=True)
    output = run(python, "-W", "ignore", "-c", code, cwd=away).output
    imported = next(line.split(" ", 1)[1] for line in output.splitlines() if line.startswith("fastres /"))
    assert Path(imported).is_relative_to(inside or python.parents[1]), imported
    return output


def pip_wheel(source, out, **environment):
    """Builds a wheel; returns its path and the build's output."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, source]
    output = run(*command, cwd=out.parent, **environment).output
    (wheel,) = out.glob("fastres-*.whl")
    return wheel, output
