"""The cost of `import fastres` on top of `import torch`, in fresh processes timed from first line to last import.

`fastres_beyond_torch` is the difference within one process, free of the noise of importing torch. The verdict: fastres
imports no Triton and creates no CUDA context.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from measure import Case, Prepared, Verdict

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
before = set(sys.modules)
if {fastres}:
    import fastres
both_s = time.perf_counter() - start
new = set(sys.modules) - before
print(json.dumps({{
    "torch": torch_s, "both": both_s, "beyond": both_s - torch_s, "new": len(new), "cuda": torch.cuda.is_initialized(),
    "triton": sorted(name for name in new if name.partition(".")[0] == "triton"),
}}))
"""


def imported(fastres: bool) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT.format(fastres=fastres)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@dataclass(frozen=True)
class ImportCase(Case):
    what: ClassVar[str] = "import"
    id: ClassVar[str] = "import"
    mode: ClassVar[str] = "a fresh process"
    baselines: ClassVar[tuple[str, ...]] = ("torch",)
    ours: ClassVar[tuple[str, ...]] = ("torch_and_fastres",)
    compiled: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[tuple[str, ...]] = ("fastres_beyond_torch",)

    def facts(self) -> dict[str, Any]:
        return {"layout": None, "dtype": None}

    def prepare(self, device: torch.device, peers: tuple[str, ...]) -> Prepared:
        last: dict[str, Any] = {}

        def both() -> float:
            last.update(imported(fastres=True))
            return last["both"]

        calls = {
            "torch": lambda: imported(fastres=False)["torch"],
            "torch_and_fastres": both,
            "fastres_beyond_torch": lambda: imported(fastres=True)["beyond"],
        }

        def judge(results):
            wrong = [f"imports {', '.join(last['triton'])}"] if last["triton"] else []
            wrong += ["creates a CUDA context"] if last["cuda"] else []
            return {"torch_and_fastres": Verdict(not wrong, None, "; ".join(wrong))}

        return Prepared(calls, judge, timer=lambda call: call())


CASES = [ImportCase()]


def test_import(case, peer, run_peer):
    run_peer(case, peer)
