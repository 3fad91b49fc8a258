"""The comparison of three runs, tensor by tensor, and its report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .floor import floors, settings
from .runs import Run

RMS_RATIO = 2.0
MAX_RATIO = 4.0
BROKEN = 8.0, 0.1  # times the floor, and of the result: a 16-bit error that no rounding explains


# Error and eager RMS, error and eager maximum, the floor's RMS and maximum: a row's numbers.
_Numbers = tuple[float, float, float, float, float, float]
_NOTHING: _Numbers = (0.0,) * 6
_UNKNOWN: _Numbers = (math.nan,) * 6


@dataclass(frozen=True)
class Row:
    """The verdict on one tensor. Errors are absolute, against float64, over the elements that are finite in all runs.

    ``ratio`` is the candidate's error over eager's, both criteria in one: at most 2 passes. Where the floor is
    negligible it is ``max(error_rms / eager_rms, error_max / (2 * eager_max))``; ``inf`` if nothing can be compared.
    """

    name: str
    kind: str  # "output", "grad" or "buffer"
    shape: tuple[int, ...]
    dtype: str
    error_rms: float
    eager_rms: float
    error_max: float
    eager_max: float
    floor: float
    floor_max: float
    ratio: float
    passed: bool
    message: str = ""


@dataclass(frozen=True)
class Verification:
    """The referee's verdict: truthy if every row passed; ``str()`` is a table, ``to_dict()`` plain data."""

    rows: tuple[Row, ...]
    dtype: str
    training: bool | None
    backward: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def error_ratio(self) -> float:
        """The worst row's ratio; at most 2 passes."""
        return max((row.ratio for row in self.rows), default=0.0)

    @property
    def worst(self) -> Row | None:
        return max(self.rows, key=lambda row: row.ratio, default=None)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON (infinities become None)."""
        rows = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
            for row in self.rows
        ]
        ratio = self.error_ratio if math.isfinite(self.error_ratio) else None
        about = {"dtype": self.dtype, "training": self.training, "backward": self.backward, "notes": list(self.notes)}
        return {"passed": self.passed, "error_ratio": ratio, **about, "rows": rows}

    def table(self, limit: int | None = None) -> str:
        """The rows as text, failures first, then the largest ratios; at most ``limit`` of them."""
        ordered = sorted(self.rows, key=lambda row: (row.passed, -row.ratio))
        shown = ordered if limit is None else ordered[:limit]
        width = max([len(row.name) for row in shown] + [4])
        mode = {True: "training mode, ", False: "eval mode, ", None: ""}[self.training]
        failed = sum(not row.passed for row in self.rows)
        lines = [
            f"verify: {'passed' if self.passed else 'FAILED'}; {mode}{self.dtype}, {len(self.rows)} tensors"
            f"{f', {failed} failed' if failed else ''}; worst error ratio {self.error_ratio:.3g} (at most 2)",
            f"  {'name':<{width}}  kind    error rms  eager rms  floor rms  error max  eager max   ratio",
        ]
        for row in shown:
            numbers = (row.error_rms, row.eager_rms, row.floor, row.error_max, row.eager_max)
            lines.append(
                f"  {row.name:<{width}}  {row.kind:<6}  "
                + "  ".join(f"{number:9.2e}" for number in numbers)
                + f"  {row.ratio:6.3g}"
                + ("" if row.passed else f"  FAILED {row.message}")
            )
        if len(ordered) > len(shown):
            lines.append(f"  ... and {len(ordered) - len(shown)} more with smaller ratios")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table(limit=16)


@dataclass
class Reference:
    """The float64 runs: unchanged, with each undecided ReLU gate flipped, and perturbed by 4 ulp of each eps."""

    exact: Run
    switched: list[Run] = field(default_factory=list)
    perturbed: dict[float, list[Run]] = field(default_factory=dict)

    def moved(self, eps: float) -> list[Run]:
        """The runs perturbed for this eps, or else for the coarsest."""
        return self.perturbed.get(eps) or (self.perturbed[max(self.perturbed)] if self.perturbed else [])


def compare(reference: Reference, eager: Run, candidate: Run, ulps: float) -> list[Row]:
    """A row for each output and gradient of ``eager``, and for each buffer that it or the candidate moved."""
    rows = []
    for kind, name, eager_t in eager.tensors():
        exact_t, ours = reference.exact.get(kind, name), candidate.get(kind, name)
        if kind == "buffer" and name not in eager.moved | candidate.moved:
            continue
        if eager_t is None:  # no gradient in eager: the candidate must not have one either
            if ours is not None and bool(ours.any()):
                rows.append(_refused(name, kind, ours, "a gradient where eager has none"))
        elif ours is None:
            missing = "no gradient" if kind == "grad" else f"the candidate has no such {kind}"
            rows.append(_refused(name, kind, eager_t, missing))
        elif ours.shape != eager_t.shape:
            got, expected = list(ours.shape), list(eager_t.shape)
            rows.append(_refused(name, kind, ours, f"shape {got}, eager's is {expected}"))
        elif ours.dtype != eager_t.dtype and kind != "buffer":
            rows.append(_refused(name, kind, ours, f"dtype {_dtype(ours)}, eager's is {_dtype(eager_t)}"))
        elif not eager_t.dtype.is_floating_point or exact_t is None:
            different = "" if torch.equal(ours, eager_t) else "not equal to eager's"
            rows.append(_row(name, kind, ours, _NOTHING, math.inf if different else 0.0, different))
        else:
            eps = torch.finfo(eager_t.dtype).eps
            switched = [run.get(kind, name) for run in reference.switched if kind == "grad"]
            results = settings(exact_t, [t for t in switched if t is not None])
            moved = [run.get(kind, name) for run in reference.moved(eps)]
            rows.append(_judge(name, kind, results, eager_t, ours, [t for t in moved if t is not None], eps, ulps))
    extra = candidate.outputs.keys() - eager.outputs.keys()
    rows += [_refused(name, "output", candidate.outputs[name], "eager has no such output") for name in sorted(extra)]
    return rows


def _judge(
    name: str,
    kind: str,
    exact: list[Tensor],  # float64: the exact result under each setting of the undecided gates
    eager: Tensor,
    ours: Tensor,
    perturbed: list[Tensor],  # float64
    eps: float,
    ulps: float,
) -> Row:
    theirs, mine = eager.double(), ours.double()
    for pattern, test in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        wrong = int((test(mine) != test(theirs)).sum())
        if wrong:
            return _refused(name, kind, ours, f"{pattern} in {wrong} other places than in eager's")
    finite = torch.isfinite(exact[0]) & torch.isfinite(theirs)
    if not bool(finite.all()):
        exact, perturbed = [t[finite] for t in exact], [t[finite] for t in perturbed]
        perturbed = [t for t in perturbed if bool(torch.isfinite(t).all())]
        theirs, mine = theirs[finite], mine[finite]
    floor_rms, floor_max = floors(exact[0], perturbed, eps, ulps)
    error_rms, error_max = min(_size(mine - t) for t in exact)
    eager_rms, eager_max = min(_size(theirs - t) for t in exact)
    explained = max(BROKEN[0] * floor_rms, BROKEN[1] * _size(exact[0])[0])
    broken = eps > 2**-12 and floor_rms > 0 and eager_rms > explained
    rms = _over(error_rms, RMS_RATIO * (floor_rms if broken else eager_rms) + floor_rms)
    worst = _over(error_max, MAX_RATIO * (floor_max if broken else eager_max) + floor_max)
    ratio = RMS_RATIO * max(rms, worst)
    message = "" if ratio <= RMS_RATIO else "RMS error" if rms >= worst else "largest error"
    if broken and message:
        message += "; eager's own is larger than rounding explains, so it is no measure"
    numbers = (error_rms, eager_rms, error_max, eager_max, floor_rms, floor_max)
    return _row(name, kind, ours, numbers, ratio, message)


def _size(error: Tensor) -> tuple[float, float]:
    if not error.numel():
        return 0.0, 0.0
    return float(error.square().mean().sqrt()), float(error.abs().amax())


def _over(error: float, allowed: float) -> float:
    if error == 0:
        return 0.0
    return error / allowed if allowed else math.inf


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _row(name: str, kind: str, t: Tensor, numbers: _Numbers, ratio: float, message: str) -> Row:
    return Row(name, kind, tuple(t.shape), _dtype(t), *numbers, ratio, ratio <= RMS_RATIO, message)


def _refused(name: str, kind: str, t: Tensor, message: str) -> Row:
    return Row(name, kind, tuple(t.shape), _dtype(t), *_UNKNOWN, math.inf, False, message)
