"""The backend `cuda` without a GPU: its module, its refusals as data, its place in the order, what info shows of it."""

from __future__ import annotations

import pytest
import torch

import fastres
from emulation import on_gpu
from fastres import _dispatch, _extension, _info
from fastres.functional import add_relu, bn_act
from fastres.ops import _tensors

OPERATORS = ("add_relu", "bn_act")
needs_module = pytest.mark.skipif(
    _extension.why_not_cuda() is not None, reason=f"fastres._C_cuda is not here: {_extension.why_not_cuda()}"
)


# ---- the module


@needs_module
def test_build_info_says_how_it_was_built():
    info = _extension.build_info_cuda()
    assert info["schema_version"] == _extension.SCHEMA_VERSION and info["torch_target"] == "2.11"
    assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert info["architectures"] and "-DNDEBUG" in info["flags"] and info["compiler"].split()[0] in ("gcc", "clang")


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_kernel_attributes_are_none_without_a_gpu_and_nothing_is_left_behind():
    assert _extension.kernel_attributes() == {}
    assert not torch.cuda.is_initialized()


@needs_module
def test_native_schemas_match_the_binary():
    """Every native operator that Python declares for these operators has its CUDA kernel in the binary."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    for op in OPERATORS:
        for name in (op, f"{op}_backward"):
            assert f"fastres::_{name}_native" in registered
    assert "fastres::_conv_act_native" in registered  # also where the build has no kernel for it: it then says so


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("FASTRES_DISABLE", raising=False)
    reason = _extension._Native("fastres._C_cuda", "cuda").why_not()
    assert reason == "fastres._C_cuda needs a CUDA build of torch; this one has none"


@pytest.mark.parametrize("setting", ["ext", "cuda", "all"])
def test_it_can_be_disabled(monkeypatch, setting):
    monkeypatch.setenv("FASTRES_DISABLE", setting)
    assert "disabled by FASTRES_DISABLE" in _extension._Native("fastres._C_cuda", "cuda").why_not()


# ---- refusals


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 0), "8.0;9.0a;10.0+PTX", True),
        ((8, 6), "8.0;9.0a;10.0+PTX", True),
        ((8, 9), "8.0", True),
        ((9, 0), "8.0;9.0a;10.0+PTX", True),
        ((9, 0), "8.0", False),
        ((9, 0), "8.0+PTX", True),
        ((10, 0), "9.0a", False),
        ((10, 3), "8.0;9.0a;10.0+PTX", True),
        ((12, 0), "8.0;9.0a;10.0+PTX", True),
        ((12, 0), "8.0;9.0a;10.0", False),
        ((10, 3), "10.0a", False),
        ((7, 5), "8.0;9.0a;10.0+PTX", False),
        ((8, 0), "8.6+PTX", False),
        ((9, 0), "8.0 9.0a", True),
    ],
)
def test_which_gpus_a_build_fits(capability, architectures, fits):
    reason = _extension.why_not_architecture(capability, architectures)
    assert (reason is None) == fits
    if not fits:
        wanted = f"no code for compute capability {capability[0]}.{capability[1]}: built for {architectures}"
        assert wanted in reason


def test_refusals_are_sentences(gpu):
    gpu((9, 0))
    assert _tensors.why_not_cuda(on_gpu()) == []
    for dtype in _tensors.KERNEL_DTYPES:
        assert _tensors.why_not_cuda(on_gpu(dtype)) == []
    assert _tensors.why_not_cuda(torch.empty(1)) == ["x is on cpu, the kernel runs on cuda"]
    assert _tensors.why_not_cuda(on_gpu(torch.float64)) == ["dtype torch.float64 runs through the reference"]
    gpu((7, 5))
    (reason,) = _tensors.why_not_cuda(on_gpu())
    assert "no code for compute capability 7.5" in reason
    gpu((9, 0), why_not="fastres._C_cuda is not part of this build")
    assert _tensors.why_not_cuda(on_gpu()) == ["fastres._C_cuda is not part of this build"]


@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_comes_before_triton_and_triton_takes_what_it_refuses(name, gpu):
    operator = _dispatch.OPERATORS[name]
    assert operator.order["cuda"] == ("cuda", "triton")
    gpu((9, 0))
    assert _dispatch._choose(operator, "auto", on_gpu()).name == "cuda"
    gpu((9, 0), architectures="8.0")
    expected = "triton" if not _tensors.why_not_triton(on_gpu()) else "reference"
    assert _dispatch._choose(operator, "auto", on_gpu()).name == expected
    with pytest.raises(_dispatch.BackendError, match="backend 'cuda' refuses: fastres._C_cuda has no code for"):
        _dispatch._choose(operator, "cuda", on_gpu())
    assert _dispatch._choose(operator, "auto", on_gpu(torch.float64)).name == "reference"


def test_a_named_backend_raises_on_a_cpu_tensor():
    x = torch.randn(2, 3, 4, 4)
    for call in (lambda: add_relu(x, x, backend="cuda"), lambda: bn_act(x, None, None, training=True, backend="cuda")):
        with pytest.raises(_dispatch.BackendError, match="'cuda' refuses: x is on cpu, the kernel runs on cuda"):
            call()
    for name in OPERATORS:
        assert fastres.explain(name, x).refusals["cuda"] == ["x is on cpu, the kernel runs on cuda"]


# ---- info


def test_info_shows_the_module(monkeypatch):
    build = {"cuda": "13.0", "architectures": "8.0;9.0a;10.0+PTX"}
    monkeypatch.setattr(_extension, "why_not_cuda", lambda: None)
    monkeypatch.setattr(_extension, "build_info_cuda", lambda: build)
    found = fastres.info()
    assert found["cuda_extension"] == {"why_not": None, "build": build, "kernels": {}}
    assert "fastres._C_cuda  loaded: cuda 13.0, architectures 8.0;9.0a;10.0+PTX" in str(found)
    monkeypatch.setattr(_extension, "why_not_cuda", lambda: "fastres._C_cuda is not part of this build")
    found = fastres.info()
    assert found["cuda_extension"]["build"] == {} and "not part of this build" in str(found)


def test_info_shows_the_kernels_where_a_context_exists(monkeypatch):
    kernel = dict(registers=80, shared_bytes=8704, local_bytes=0, threads=256, blocks_per_multiprocessor=3)
    monkeypatch.setattr(
        _extension, "kernel_attributes", lambda: {"bn_statistics<half, 8>": kernel | {"architecture": 90}}
    )
    assert _info._kernels().keys() == {"bn_statistics<half, 8>"}
    line = _info._kernel_line(_info._kernels()["bn_statistics<half, 8>"])
    assert line == "80 registers, 8704 B shared, 0 B local, 3 blocks of 256, sm_90"
    found = fastres.info()
    found["cuda_extension"]["kernels"] = _info._kernels()
    assert "kernels on the GPU" in str(found) and "3 blocks of 256" in " ".join(str(found).split())


def test_info_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_info, "_gpus", lambda: [{"name": "a GPU", "memory_mib": None, "capability": "9.0"}])
    monkeypatch.setattr(_info, "_cuda", lambda: {"version": "13.0", "initialized": False, "reason": None})
    monkeypatch.setattr(_extension, "why_not_cuda", lambda: "fastres._C_cuda is not part of this build")
    assert any(fix.startswith("fastres._C_cuda: install the CUDA 13.0 toolkit") for fix in fastres.info()["fixes"])
