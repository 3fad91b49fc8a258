"""fastres.lab.loop: a run in its folder, warm-up, precision, parts of a batch, what cannot be used."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sklearn")

from fastres.lab import loop  # noqa: E402
from fastres.lab.datasets import InMemory, Part, load  # noqa: E402
from fastres.lab.errors import CheckpointError, DivergedError, LabError, OutputError, RunError  # noqa: E402
from fastres.lab.loop import Point, RunResult, RunSpec, run, trained  # noqa: E402
from fastres.lab.recipes import TrainRecipe, recipe  # noqa: E402
from train_runs import QUICK, SPEC, assert_equal, timeless, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_its_result(whole):
    result, folder, steps = whole
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out")}
    assert names == {".lock", "spec.json", "checkpoint.pt", "log.csv", "result.json"}
    assert [point.iteration for point in result.history] == [3, 6, 9, 12]
    assert [point.test_error is None for point in result.history] == [True, False, True, False]
    assert [point.lr for point in result.history] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert (result.iterations, result.images, result.parameters) == (12, 384, 75_002)
    assert result.test_error == result.history[-1].test_error and result.train_error == result.history[-1].train_error
    assert result.best_test_error == min(result.history[1].test_error, result.history[3].test_error)
    assert [step.step for step in steps] == list(range(1, 13)) and steps[-1].images == 384
    seconds = [point.seconds for point in result.history]
    assert seconds == sorted(seconds) and result.seconds >= seconds[-1] > 0
    rows = (folder / "log.csv").read_text().splitlines()
    assert rows[0] == "iteration,lr,train_loss,train_error,test_error,gradient_norm,seconds" and len(rows) == 5
    data = json.loads((folder / "result.json").read_text())
    assert data["schema"] == "fastres.run/1" and data["versions"]["torch"] and data["cpu"]["model"]
    assert RunResult.from_dict(data) == result


def test_called_again_it_returns_the_result_and_trains_nothing(whole, monkeypatch):
    result, folder, _ = whole
    monkeypatch.setattr(loop, "_Training", None)
    assert run(SPEC, folder, device="cpu") == result


def test_the_loop_is_sgd_on_the_data_sets_batches(tmp_path):
    """The same twelve steps written out in plain PyTorch, with stock modules: the same bits."""
    spec = replace(SPEC, swap=False, channels_last=False)
    result = run(spec, tmp_path, device="cpu")
    data = load("digits")
    net = loop.network(spec, data)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    losses, norms = [], []
    for t, (x, y) in enumerate(data.batches(QUICK, 0, 0, Part(), torch.device("cpu"))):
        optimizer.param_groups[0]["lr"] = 0.1 if t < 8 else 0.1 / 10
        loss = F.cross_entropy(net(x.contiguous()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append(float(torch.cat([p.grad.flatten() for p in net.parameters()]).norm()))
    assert_equal(weights(tmp_path), net.state_dict())
    for number, point in enumerate(result.history):
        assert point.train_loss == pytest.approx(sum(losses[3 * number : 3 * number + 3]) / 3)
        assert point.gradient_norm == pytest.approx(norms[3 * number + 2], rel=1e-5)


def test_the_result_is_what_the_trained_network_gives(whole):
    result, folder, _ = whole
    images, labels = load("digits").test()
    net = trained(folder)
    assert not net.training
    assert float((net(images).argmax(1) != labels).double().mean()) == pytest.approx(result.test_error, abs=1e-9)


def test_another_seed_is_another_run_and_the_callers_random_state_is_left_alone(whole, tmp_path):
    before = torch.get_rng_state()
    other = run(replace(SPEC, seed=1), tmp_path, device="cpu", stop_after=3)
    assert other.history[0].train_loss != whole[0].history[0].train_loss and other.test_error is None
    assert torch.equal(torch.get_rng_state(), before)


def test_stock_modules_give_the_same_run_and_no_fused_call(whole, tmp_path):
    from swap_cases import fused_calls

    stock = run(replace(SPEC, swap=False), tmp_path, device="cpu")
    assert stock.history[0].train_loss == pytest.approx(whole[0].history[0].train_loss, rel=1e-3)
    x = torch.randn(2, 1, 16, 16)
    assert fused_calls(trained(tmp_path).train(), x) == 0 < fused_calls(trained(whole[1]).train(), x)


def test_weight_decay_on_convolutions_alone(tmp_path):
    net = loop.network(SPEC, load("digits"))
    decayed, plain = loop._groups(net, replace(QUICK, decay="convolutions"))
    assert {p.dim() for p in decayed["params"]} == {4} and {p.dim() for p in plain["params"]} == {1, 2}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0)
    (everything,) = loop._groups(net, QUICK)
    assert len(everything["params"]) == len(list(net.parameters())) == len(decayed["params"]) + len(plain["params"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision(whole, tmp_path, dtype):
    spec = replace(SPEC, dtype=dtype)
    run(spec, tmp_path / "a", device="cpu", stop_after=7)
    resumed = run(spec, tmp_path / "a", device="cpu")
    through = run(spec, tmp_path / "b", device="cpu")
    assert timeless(resumed) == timeless(through)
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert through.history[0].train_loss == pytest.approx(whole[0].history[0].train_loss, rel=0.02)
    assert weights(tmp_path / "a")["conv1.weight"].dtype == torch.float32
    if dtype == "fp16":
        assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["scaler"]["scale"] > 0


def test_warm_up_ends_when_the_training_error_is_below_its_bound(tmp_path):
    warm = replace(QUICK, warmup_lr=0.01, warmup_until_error=0.86, log_every=2, iterations=12, milestones=())
    spec = replace(SPEC, recipe=warm)
    result = run(spec, tmp_path / "a", device="cpu")
    first = next(i for i, point in enumerate(result.history) if point.train_error < 0.86)
    assert 0 < first < len(result.history) - 1, [point.train_error for point in result.history]
    assert [point.lr for point in result.history] == [0.01] * (first + 1) + [0.1] * (len(result.history) - first - 1)
    for stop in (result.history[first].iteration - 1, result.history[first].iteration + 1):  # remembered
        run(spec, tmp_path / str(stop), device="cpu", stop_after=stop)
        assert timeless(run(spec, tmp_path / str(stop), device="cpu")) == timeless(result)


def test_tensorboard_where_it_is_installed(whole):
    events = list(whole[1].glob("events.out.*"))
    if importlib.util.find_spec("tensorboard") is None:
        assert events == []
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(whole[1]))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train_loss")]
    assert losses == [(p.iteration, pytest.approx(p.train_loss)) for p in whole[0].history]
    assert "gradient_norm/layer1.0.conv1.weight" in found.Tags()["scalars"]


# ---- parts of a batch ------------------------------------------------------------------------------------------------


def test_bn_batch_takes_statistics_over_parts(tmp_path):
    """One iteration with bn_batch 8: the mean of the gradients of four parts; statistics of the first part."""
    spec = replace(SPEC, recipe=replace(QUICK, bn_batch=8, weight_decay=0.0, momentum=0.0))
    run(spec, tmp_path, device="cpu", stop_after=1)
    data = load("digits")
    net = loop.network(spec, data)
    x, y = next(data.batches(spec.recipe, 0, 0, Part(), torch.device("cpu")))
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    first = net.bn1.running_mean.clone()
    for k in range(4):
        F.cross_entropy(net(x[8 * k : 8 * k + 8]), y[8 * k : 8 * k + 8]).div(4).backward()
        if k == 0:
            first = net.bn1.running_mean.clone()
    found = weights(tmp_path)
    for name, p in net.named_parameters():
        assert torch.allclose(found[name], start[name] - 0.1 * p.grad, atol=1e-6), name
    assert torch.allclose(found["bn1.running_mean"], first, atol=1e-6)
    assert int(found["bn1.num_batches_tracked"]) == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(error, message, spec=SPEC, folder=None, **settings):
    with pytest.raises(error, match=message) as caught:
        run(spec, folder, **{"device": "cpu", **settings})
    assert "\n" not in str(caught.value)


def test_another_run_in_the_folder(whole, tmp_path):
    folder = whole[1]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(RunError, "holds another run: seed 0, not 1; use another", replace(SPEC, seed=1), folder)
    other = replace(SPEC, network="plain8", options=(("init", "fan_in"),), recipe=replace(QUICK, lr=0.2))
    refused(RunError, "network resnet8, not plain8; recipe.lr 0.1, not 0.2; options.init None, not", other, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def _changed(edit=None, **changes):
    def change(path):
        content = torch.load(path, weights_only=True)
        content.update(changes)
        if edit is not None:
            edit(content)
        torch.save({name: value for name, value in content.items() if value is not None}, path)

    return change


BAD = {
    "optimizer": (_changed(optimizer={"state": {}, "param_groups": []}), "got loaded state dict"),
    "momentum": (
        _changed(lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3))),
        r"got a momentum of shape \[3\], expected",
    ),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read"),
    "text": (lambda path: path.write_text("hello"), "cannot be read"),
    "whole module": (lambda path: torch.save(nn.ReLU(), path), "cannot be read"),
    "tensor": (lambda path: torch.save(torch.zeros(1), path), "got 'Tensor', expected the schema"),
    "schema": (_changed(schema="fastres.checkpoint/9"), "got 'fastres.checkpoint/9', expected the schema"),
    "part missing": (_changed(optimizer=None), "got 'optimizer', expected"),
    "progress": (_changed(progress={"iteration": 1, "epoch": 2}), "got .*unexpected keyword argument 'epoch'"),
    "iteration": (_changed(progress={"iteration": 99}), "got iteration 99 and 3 sums"),
    "shape": (
        _changed(lambda c: c["model"].update({"fc.bias": torch.zeros(3)})),
        "got .*size mismatch for fc.bias.*expected a checkpoint of resnet8",
    ),
    "another run": (_changed(spec=replace(SPEC, seed=3).to_dict()), "got another run's: seed 3, not 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_one_clear_line(tmp_path, case):
    run(SPEC, tmp_path, device="cpu", stop_after=4)
    change, message = BAD[case]
    change(tmp_path / "checkpoint.pt")
    damaged = (tmp_path / "checkpoint.pt").read_bytes()
    refused(CheckpointError, f"checkpoint .*: {message}", folder=tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == damaged


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_damaged_log_is_written_again_from_the_checkpoint(whole, tmp_path, damage):
    run(SPEC, tmp_path, device="cpu", stop_after=7)
    log = tmp_path / "log.csv"
    log.unlink() if damage == "gone" else log.write_text(log.read_text()[:40])
    assert timeless(run(SPEC, tmp_path, device="cpu")) == timeless(whole[0])
    rows, wanted = ([row.rpartition(",")[0] for row in open(folder / "log.csv")] for folder in (tmp_path, whole[1]))
    assert rows == wanted


@pytest.mark.parametrize("name", ["spec.json", "result.json"])
@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"schema": "fastres.run/1", "seed": 1}'])
def test_a_bad_run_file_is_one_clear_line(whole, tmp_path, name, text):
    for file in ("spec.json", "result.json"):
        (tmp_path / file).write_bytes((whole[1] / file).read_bytes())
    (tmp_path / name).write_text(text)
    refused(RunError, str(tmp_path), folder=tmp_path)


def test_two_runs_at_once_in_one_folder(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr("fastres.lab.loop_state.time.sleep", lambda seconds: None)
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(RunError, "another process is training in it", folder=tmp_path)


def test_what_cannot_be_used_leaves_no_folder(tmp_path):
    folder = tmp_path / "run"
    refused(LabError, "data: got 'mnist'", replace(SPEC, data="mnist"), folder)
    refused(LabError, "device: got 'tpu'", SPEC, folder, device="tpu")
    with pytest.raises(RunError, match="dtype: got 'fp8', expected fp32, bf16, fp16"):
        replace(SPEC, dtype="fp8")
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    refused(OutputError, "cannot be written", folder=tmp_path / "file" / "run")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    images = torch.rand(40, 1, 8, 8)
    images[7, 0, 3, 3] = float("nan")
    labels = torch.arange(40) % 2
    made = InMemory("digits", 2, (images.nan_to_num(), labels), (images[:4].nan_to_num(), labels[:4]))
    made._train = (images, labels)
    monkeypatch.setattr(loop.datasets, "load", lambda *arguments: made)
    spec = replace(SPEC, recipe=TrainRecipe("made", 8, 20, 0.1, (), log_every=1))
    refused(DivergedError, "iteration [1-6]: the training loss is nan", spec, tmp_path)


def test_spec_and_result_go_through_json():
    spec = RunSpec("resnet50-v1", "imagenet", recipe("imagenet"), 7, (("shortcut", "C"), ("ceil_pool", True)), "bf16")
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    point = Point(1, 0.1, 2.0, 0.5, None, None, 1.0)
    result = RunResult(spec, 1, 256, 1.0, 5, None, 0.5, None, [point])
    assert RunResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert dataclasses.asdict(result)["history"][0]["lr"] == 0.1
