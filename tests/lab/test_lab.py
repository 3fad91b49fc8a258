"""fastres.lab: timing statistics, data, checkpoints, devices, result files, the chart."""

from __future__ import annotations

import json
import sys
from itertools import count

import pytest
import torch
from torch import nn

from cli_cases import png_size
from fastres.lab.checkpoints import load_checkpoint
from fastres.lab.devices import pick_device
from fastres.lab.errors import CheckpointError, DeviceError, MissingExtra, OutputError
from fastres.lab.timing import interleave, paired_ratio, wall_timer

# ---- timing: fake clocks, so every number is exact -------------------------------------------------------------------


class Bench:
    """Functions that take scripted times on a clock of their own, and a log of the calls."""

    def __init__(self, **seconds: object) -> None:
        self.now, self.calls = 0.0, []
        self.fns = {name: self._function(name, value) for name, value in seconds.items()}
        self.timer = wall_timer(lambda: self.now)

    def _function(self, name, seconds):
        calls = count()

        def function() -> None:
            self.calls.append(name)
            self.now += seconds(next(calls)) if callable(seconds) else seconds

        return function


def test_interleave_runs_rounds_in_rotating_order():
    bench = Bench(a=1.0, b=2.0, c=4.0)
    samples = interleave(bench.fns, rounds=3, warmup=1, timer=bench.timer)
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(bench.calls) == "abc" + "abc" + "bca" + "cab"  # warm-up, then each round starts one further


def test_interleave_keeps_warmup_out_of_the_samples():
    bench = Bench(a=lambda call: 100.0 if call < 2 else 1.0)
    assert interleave(bench.fns, rounds=2, warmup=2, timer=bench.timer) == {"a": [1.0, 1.0]}


def test_interleave_budget_stops_the_slow_one_and_rounds_stay_paired():
    bench = Bench(fast=lambda call: 1.0 + call, slow=10.0)
    samples = interleave(bench.fns, rounds=8, warmup=0, budget_s=25.0, min_rounds=2, timer=bench.timer)
    assert samples["slow"] == [10.0] * 3  # 20 s after two rounds: under the budget; 30 s after three: over
    assert samples["fast"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]  # entry i is round i; 28 s stop it
    assert paired_ratio(samples["fast"], samples["slow"]).n == 3


def test_interleave_minimum_rounds_and_budget_per_name():
    bench = Bench(a=1.0, b=1.0)
    samples = interleave(bench.fns, 9, 0, {"a": 0.0, "b": 5.0}, min_rounds=4, timer=bench.timer)
    assert (len(samples["a"]), len(samples["b"])) == (4, 5)


def test_interleave_reports_progress_and_ends_when_all_budgets_are_spent():
    bench, rounds = Bench(a=1.0), []
    interleave(bench.fns, 99, 0, 3.0, min_rounds=1, timer=bench.timer, on_round=rounds.append)
    assert rounds == [1, 2, 3]


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"rounds": 1, "warmup": -1}, {"rounds": 1, "min_rounds": 0}])
def test_interleave_refuses(bad):
    with pytest.raises(ValueError, match="expected"):
        interleave({}, **bad)
    with pytest.raises(ValueError, match="at least one pair"):
        paired_ratio([1.0], [])


def test_paired_ratio_divides_out_what_slows_a_whole_round():
    slowdown = [1.0, 5.0, 2.0, 1.0, 9.0, 1.0, 3.0]
    ratio = paired_ratio([3.0 * s for s in slowdown], [2.0 * s for s in slowdown])
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"),
    [  # the tables of the median's order-statistic interval: ranks k+1 and n-k, exact binomial coverage
        (1, 1, 1, 0.0),
        (5, 1, 5, 0.9375),
        (6, 1, 6, 0.96875),
        (9, 2, 8, 0.9609375),
        (15, 4, 12, 0.96484375),
        (20, 6, 15, 0.958610534668),
    ],
)
def test_paired_ratio_interval(n, low, high, coverage):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()
    ratio = paired_ratio([float(rank + 1) for rank in order], [1.0] * n)
    assert (ratio.low, ratio.high, ratio.n) == (low, high, n)
    assert ratio.coverage == pytest.approx(coverage)
    assert ratio.median == (n + 1) / 2


def test_ratio_as_text_claims_an_interval_only_at_95_percent():
    assert str(paired_ratio([3.0] * 6, [2.0] * 6)) == "1.50x [1.50, 1.50]"
    assert str(paired_ratio([3.0] * 5, [2.0] * 5)) == "1.50x (too few rounds)"


# ---- data ------------------------------------------------------------------------------------------------------------


def test_digits_split_is_stratified_disjoint_and_fixed():
    pytest.importorskip("sklearn")
    from fastres.lab import datasets as data

    a, b = data.digits(), data.digits()
    assert torch.equal(a.train_images, b.train_images) and torch.equal(a.test_labels, b.test_labels)
    assert a.train_images.shape == (1437, 1, 16, 16) and a.test_images.shape == (360, 1, 16, 16)
    share = torch.bincount(a.test_labels, minlength=10) / torch.bincount(
        torch.cat([a.train_labels, a.test_labels]), minlength=10
    )
    assert (share - 0.2).abs().max() < 0.01  # every digit gives a fifth to the held-out set
    assert a.train_images.mean().abs() < 1e-4 and (a.train_images.std() - 1).abs() < 1e-4
    both = torch.cat([a.train_images, a.test_images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 1797  # no digit twice, none in both sets
    assert not torch.equal(data.digits(seed=1).test_labels, a.test_labels)


def test_photographs_are_the_two_real_ones_normalized():
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    from fastres.lab.datasets import photographs

    names, images = photographs()
    assert names == ["china.jpg", "flower.jpg"]
    assert images.shape == (2, 3, 224, 224) and images.dtype == torch.float32
    red = images[:, 0] * 0.229 + 0.485
    assert 0 <= red.min() and red.max() <= 1 and red.std() > 0.1


def test_missing_package_names_the_extra(monkeypatch):
    from fastres.lab import datasets as data

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r'pip install "fastres\[train\]"'):
        data.digits()
    with pytest.raises(MissingExtra, match=r"scikit-learn.*pip install"):
        data.photographs()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "old"])
def test_checkpoint_loads(tmp_path, wrapper):
    """Also an old one, from before norms counted their batches."""
    source, target = small_net(), small_net()
    state = source.state_dict()
    if wrapper == "old":
        del state["1.num_batches_tracked"]
    torch.save({wrapper: state, "epoch": 90} if wrapper in ("model", "state_dict") else state, tmp_path / "net.pth")
    load_checkpoint(tmp_path / "net.pth", target, "net")
    assert torch.equal(source[0].weight, target[0].weight)


def _truncated(path):
    torch.save(small_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:500])


def _changed(**changes):
    return lambda path: torch.save({**small_net().state_dict(), **changes}, path)


BAD_CHECKPOINTS = {
    "missing file": (lambda path: None, "got no such file"),
    "folder": (lambda path: path.mkdir(), "got a folder"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("hello, I am no checkpoint"), "cannot be read"),
    "truncated": (_truncated, "cannot be read"),
    "whole module": (lambda path: torch.save(small_net(), path), "objects other than tensors"),
    "list": (lambda path: torch.save([1, 2], path), "got a list"),
    "number under a name": (_changed(**{"0.weight": 3}), "got a int under '0.weight'"),
    "other net": (
        lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
        "6 missing such as '0.weight', '0.bias', '1.weight', 2 unknown such as 'weight', 'bias'",
    ),
    "one name too many": (_changed(extra=torch.zeros(1)), "1 unknown such as 'extra'"),
    "shape": (_changed(**{"0.bias": torch.zeros(5)}), r"got shape \[5\] for '0.bias', expected \[4\]"),
    "sparse": (_changed(**{"0.bias": torch.zeros(4).to_sparse()}), "sparse"),
    "complex": (_changed(**{"0.bias": torch.zeros(4, dtype=torch.complex64)}), "complex64"),
    "NaN": (_changed(**{"0.bias": torch.full((4,), float("nan"))}), "NaN or infinity in '0.bias'"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_one_clear_line_and_changes_nothing(tmp_path, case):
    make, message = BAD_CHECKPOINTS[case]
    path = tmp_path / "weights.pth"
    make(path)
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, net, "net")
    text = str(caught.value)
    assert text.startswith(f"weights {path}: ") and "expected" in text and "\n" not in text
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"0.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="objects other than tensors"):
        load_checkpoint(tmp_path / "bomb.pth", small_net(), "net")
    assert not (tmp_path / "ran").exists()


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.device_count() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:99", "cuda:x", "cuda"])
def test_pick_device_refuses(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="no GPU that torch can use" if name == "cuda" else "got"):
        pick_device(name)


# ---- result files ----------------------------------------------------------------------------------------------------


def test_prepare_folder_refuses_before_any_work(tmp_path):
    from fastres.lab.results import prepare_folder

    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        prepare_folder(tmp_path / "file" / "out", ["demo.json"])
    (tmp_path / "out" / "demo.json").mkdir(parents=True)
    with pytest.raises(OutputError, match="got a folder"):
        prepare_folder(tmp_path / "out", ["demo.json"])


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path):
    from fastres.lab.results import write_atomically

    path = tmp_path / "result"
    write_atomically(path, lambda file: file.write(b"old"))

    def full_disk(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, full_disk)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["result"]


def test_write_json_is_strict(tmp_path):
    from fastres.lab.results import write_json

    write_json(tmp_path / "a.json", {"x": [1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.5]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_environment_is_json_and_names_the_machine():
    from fastres.lab.results import environment

    data = json.loads(json.dumps(environment(torch.device("cpu"), "fastres demo")))
    assert data["command"] == "fastres demo" and data["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert data["cpu"]["model"] and data["threads"] == torch.get_num_threads() and data["gpu"] is None


# ---- chart -----------------------------------------------------------------------------------------------------------


def test_throughput_chart_is_a_png_with_every_bar_in_it(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from fastres.lab.results import FAILED, OURS, THEIRS, Bar, throughput_chart

    bars = [Bar("eager", 10, "1.00x", False), Bar("frozen", 20, "2.00x", True), Bar("bad", 15, "1.5x", True, False)]
    path = tmp_path / "chart.png"
    throughput_chart(bars, path, "title", "footnote")
    width, height = png_size(path)
    assert width >= 1000 and height >= 300
    pixels = (imread(path)[..., :3] * 255).round()
    lengths = {}
    for color in (OURS, THEIRS, FAILED):
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        lengths[color] = (abs(pixels - rgb).sum(-1) < 3).any(0).sum()  # columns of the picture that hold the color
    assert lengths[OURS] == pytest.approx(2 * lengths[THEIRS], rel=0.03)
    assert lengths[FAILED] > lengths[THEIRS]
    with pytest.raises(ValueError, match="bars"):
        throughput_chart([], path, "title")
    with pytest.raises(OutputError, match="cannot be written"):
        throughput_chart(bars, tmp_path / "no" / "chart.png", "title")
