"""fastres.info(): the data, the page of text, the refusals, the fixes, and that it leaves CUDA alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fastres
from fastres import _dispatch, _extension, _info


def test_info_is_plain_data_with_every_section():
    found = fastres.info()
    data = found.to_dict()
    assert type(data) is dict and json.loads(json.dumps(data)) == data
    sections = "fastres python platform versions cpu gpus cuda extension cuda_extension dtypes operators"
    assert set(data) == {*sections.split(), "environment", "fixes"}
    assert data["fastres"] == fastres.__version__
    assert torch.__version__.startswith(data["versions"]["torch"])
    assert data["cpu"]["model"] and data["cpu"]["cores"] >= 1 and data["cpu"]["threads"] == torch.get_num_threads()


def test_info_refusals_are_the_dispatch_s_own():
    operators = fastres.info()["operators"]["cpu"]
    assert operators.keys() == _dispatch.OPERATORS.keys() >= {"add_relu", "bn_act", "conv_act"}
    x = torch.empty(2, 8, 4, 4)
    for name, backends in operators.items():
        assert backends["reference"] == []
        for backend, reasons in backends.items():
            operator = _dispatch.OPERATORS[name]
            in_fp32 = [reason for reason in reasons if not reason.startswith(("float16: ", "bfloat16: "))]
            assert in_fp32 == _dispatch.ordinary_refusals(operator, operator.backends[backend], x)


def test_info_names_the_dtype_that_alone_is_refused(monkeypatch):
    operator = _dispatch.OPERATORS["add_relu"]
    picky = _dispatch.Backend(
        "picky",
        lambda x: ["always"] + (["no fp16"] if x.dtype is torch.float16 else []),
        operator.backends["reference"].forward,
        operator.backends["reference"].backward,
    )
    monkeypatch.setitem(operator.backends, "picky", picky)
    assert fastres.info()["operators"]["cpu"]["add_relu"]["picky"] == ["always", "float16: no fp16"]


def test_info_text_fits_a_terminal_and_shows_the_data():
    text = str(fastres.info())
    assert max(map(len, text.splitlines())) <= 79
    assert all(line == line.rstrip() for line in text.splitlines())
    for part in ("versions", "machine", "extension", "operators on cpu", "add_relu", "reference", "environment"):
        assert part in text


def test_info_shows_the_environment_in_force(settings):
    settings(FASTRES_DISABLE="cpu,triton", FASTRES_BACKEND=None)
    found = fastres.info()
    assert found["environment"]["FASTRES_DISABLE"] == "cpu,triton" and "FASTRES_BACKEND" not in found["environment"]
    assert found["operators"]["cpu"]["bn_act"]["cpu"] == ["disabled by FASTRES_DISABLE"]
    assert any("FASTRES_DISABLE" in fix for fix in found["fixes"]) and "cpu,triton" in str(found)


def test_info_tells_how_to_fix_what_is_missing(monkeypatch):
    monkeypatch.setattr(_extension, "why_not_cpu", lambda: "fastres._C is not built")
    monkeypatch.setattr(_info, "version", lambda name: None if name in ("matplotlib", "typer") else "1.0")
    found = fastres.info()
    assert found["extension"] == {"why_not": "fastres._C is not built", "build": {}}
    fixes = " ".join(found["fixes"])
    assert "pip install --no-build-isolation ." in fixes and 'pip install "fastres[cli,viz]"' in fixes
    assert "not installed" in str(found) and "to fix" in str(found)


def test_info_has_nothing_to_fix_when_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(_extension, "why_not_cpu", lambda: None)
    monkeypatch.setattr(_extension, "build_info", lambda: {"compiler": "g++ 12"})
    monkeypatch.setattr(_info, "version", lambda name: "1.0")
    monkeypatch.setattr(_info.shutil, "which", lambda name: None)
    monkeypatch.delenv("FASTRES_DISABLE", raising=False)
    found = fastres.info()
    assert found["fixes"] == [] and "to fix" not in str(found) and "loaded: compiler g++ 12" in str(found)


def test_info_names_hidden_gpus_and_cpu_builds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert fastres.info()["cuda"]["reason"] == "none visible: CUDA_VISIBLE_DEVICES=''"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert fastres.info()["cuda"]["reason"] == "none: no NVIDIA GPU found"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert fastres.info()["cuda"]["reason"] == "none: this torch is built without CUDA"


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is initialized, so torch names the GPUs itself")
def test_info_names_gpus_without_touching_them(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 9.0'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = fastres.info()
    assert found["gpus"] == [{"name": "NVIDIA H200", "memory_mib": 143771, "capability": "9.0"}]
    assert "NVIDIA H200, 140 GiB, compute capability 9.0" in str(found)
    assert list(found["operators"]) == ["cpu"] and not torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # nvidia-smi lists one: no guess which
    assert [gpu["name"] for gpu in fastres.info()["gpus"]] == ["unknown until CUDA is initialized"] * 2
    smi.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert _info._nvidia_smi() == []


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("max 100000", 8),
        ("9900000 100000", 8),
        ("?", 8),
    ],
)
def test_usable_cores_heed_a_containers_quota(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(_info.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(_info, "_CPU_QUOTA", str(tmp_path / "cpu.max"))
    assert _info.usable_cores() == 8  # no such file
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert _info.usable_cores() == cores


def test_info_initializes_no_cuda_and_imports_no_triton():
    code = (
        "import sys, torch, fastres\n"
        "fastres.info()\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules, 'triton was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_info_asks_the_operators_about_the_gpu_when_told_to():
    found = fastres.info(init_cuda=True)
    assert found["operators"]["cuda"]["add_relu"]["reference"] == []
    assert found["gpus"][0]["name"] == torch.cuda.get_device_name(0)
