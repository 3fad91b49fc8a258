"""The paper's experiments: published numbers, responses, runs that are cached and go on, tables and plots."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastres
from fastres import models
from fastres.lab import loop
from fastres.lab.errors import LabError
from fastres.lab.loop_state import Point, RunResult
from fastres.lab.networks import build, names
from fastres.lab.paper import degradation, imagenet, registry, report, responses, runs, tables
from fastres.lab.paper.presets import CLAIMS, PARAMETERS, PRESETS, PUBLISHED, PaperError, find, preset
from fastres.lab.paper.runs import Context, Evaluation, Place
from fastres.lab.paper.tables import Comparison, Curve, Outcome, Panel, Table, spread
from fastres.lab.recipes import recipe
from nets import randomize_bn
from train_runs import write_images

CI = preset("ci")


# ---- what was published ----------------------------------------------------------------------------------------------


def test_published_numbers_are_the_papers():
    """Typed a second time, from the paper's tables."""
    assert {each.network for each in PUBLISHED} <= set(names()) and set(CLAIMS) == set(registry.EXPERIMENTS)
    table3 = {("plain34", None): (28.54, 10.02), ("resnet34", "A"): (25.03, 7.76), ("resnet34", "B"): (24.52, 7.46)}
    table3 |= {("resnet34", "C"): (24.19, 7.40), ("resnet50", "B"): (22.85, 6.71), ("resnet101", "B"): (21.75, 6.05)}
    table3 |= {("resnet152", "B"): (21.43, 5.71)}
    found = {(each.network, each.shortcut): each for each in find(source="Table 3")}
    assert {key: (round(100 * p.top1, 6), round(100 * p.top5, 6)) for key, p in found.items()} == table3
    table4 = {("resnet34", "B"): (21.84, 5.71), ("resnet34", "C"): (21.53, 5.60), ("resnet50", "B"): (20.74, 5.25)}
    table4 |= {("resnet101", "B"): (19.87, 4.60), ("resnet152", "B"): (19.38, 4.49)}
    found = {(each.network, each.shortcut): each for each in find(source="Table 4")}
    assert {key: (round(100 * p.top1, 6), round(100 * p.top5, 6)) for key, p in found.items()} == table4
    table2 = {"plain18": 27.94, "plain34": 28.54, "resnet18": 27.88, "resnet34": 25.03}
    assert {each.network: 100 * each.top1 for each in find(source="Table 2")} == pytest.approx(table2)
    table6 = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43, 1202: 7.93}
    assert {p.network: 100 * p.top1 for p in find(source="Table 6")} == pytest.approx(
        {f"resnet{depth}": error for depth, error in table6.items()}
    )


@pytest.mark.parametrize("network", [name for name in PARAMETERS if name != "resnet1202"])
def test_published_parameters(network):
    classes = 1000 if network in ("resnet18", "resnet34") else 10
    with torch.device("meta"):
        made = [build(network, classes, 3, shortcut=kind) for kind in "ABC"]
    assert tuple(sum(p.numel() for p in net.parameters()) for net in made) == PARAMETERS[network]


# ---- protocols -------------------------------------------------------------------------------------------------------


def test_digits_protocol_is_fixed():
    """The published protocol of this repository: change it, and the results in benchmarks/results are of another."""
    digits = PRESETS["digits"]
    assert (digits.depths, digits.seeds, digits.data, digits.size) == ((20, 56, 110), (0, 1, 2), "digits8", 8)
    found = digits.recipe
    assert (found.batch_size, found.iterations, found.lr, found.milestones) == (128, 640, 0.1, (320, 480))
    assert (found.momentum, found.weight_decay, found.decay, found.warmup_lr) == (0.9, 1e-4, "all", None)
    assert digits.recipe_110 is None  # one schedule
    specs = degradation.specs(digits)
    assert len(set(specs)) == 18 and {spec.recipe for spec in specs} == {found}


def test_cifar10_protocol_is_the_papers():
    cifar = PRESETS["cifar10"]
    assert cifar.recipe == recipe("cifar10")  # the paper's: test_lab_data.py
    assert cifar.spec("resnet110", 0).recipe.warmup_lr == 0.01 and cifar.spec("resnet56", 0).recipe.warmup_lr is None
    assert cifar.seeds == (0, 1, 2, 3, 4)


def test_experiments_share_runs():
    digits = PRESETS["digits"]
    base = set(degradation.specs(digits))
    assert set(responses.specs(digits)) == base
    new = {name: set(registry.experiment(name).specs(digits)) - base for name in ("shortcuts", "depth", "skips")}
    assert [len(new[name]) for name in ("shortcuts", "depth", "skips")] == [6, 6, 12]


# ---- layer responses -------------------------------------------------------------------------------------------------


def stds_by_hand(model, images):
    """What Fig. 7 asks for, from the formula of the blocks, with nothing fused."""
    found = []

    def layer(x, conv, bn):
        y = nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        y = (y - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
        y = y * bn.weight[:, None, None] + bn.bias[:, None, None]
        found.append(float(y.std(correction=0)))
        return y

    x = layer(images, model.conv1, model.bn1).relu()
    for block in (*model.layer1, *model.layer2, *model.layer3):
        y = layer(layer(x, block.conv1, block.bn1).relu(), block.conv2, block.bn2)
        x = (y + (x if getattr(block, "downsample", None) is None else block.downsample(x))).relu()
    return found


def trained_net(make):
    torch.manual_seed(0)
    net = make(8)
    for _ in range(3):
        net(torch.randn(8, 3, 8, 8) * 2 + 1)
    return randomize_bn(net, statistics=False).double()


def test_responses_are_what_an_unfused_network_has():
    net = trained_net(models.cifar_resnet)
    images = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    found = responses.responses(net, images.split(4))
    assert list(found)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"] and len(found) == 7
    with torch.no_grad():
        assert list(found.values()) == pytest.approx(stds_by_hand(net.eval(), images), rel=1e-9)


def test_responses_leave_the_network_fused_and_in_its_mode():
    net = trained_net(models.cifar_plain).float()
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = net.eval()(images)
        responses.responses(net.train(), [images])
        assert net.training and not any(module._forward_hooks for module in net.modules())
        assert torch.equal(net.eval()(images), before)
        with torch.profiler.profile() as trace:
            net.train()(images)
    assert "aten::batch_norm" not in {event.key for event in trace.key_averages()}


def test_responses_of_a_swapped_network_are_those_of_the_stock_one():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4)
    images = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    net(images[0])
    stock = responses.responses(net, images)
    fastres.swap(net, strict=True)
    assert responses.responses(net, images) == pytest.approx(stock, rel=1e-5)
    assert len(stock) == 16  # conv1 is 7x7


def test_responses_refuse():
    with pytest.raises(ValueError, match="batches: got none"):
        responses.responses(models.cifar_resnet(8), [])
    with pytest.raises(ValueError, match="without 3x3"):
        responses.responses(nn.Linear(2, 2), [])


# ---- runs ------------------------------------------------------------------------------------------------------------

QUICK = replace(CI, depths=(8, 14), more_depths=(8, 14), skip_depths=(20,), deepest=20)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("sklearn")
    return Place(tmp_path_factory.mktemp("paper"), "cpu")


def test_runs_are_made_once_and_report(place, monkeypatch):
    told = []
    specs = degradation.specs(QUICK)
    results = runs.execute([*specs, *specs], place, lambda *all: told.append(all))
    assert len(results) == 8 and all(runs.finished(place.out, spec) for spec in specs)
    done, total, text = told[-1]
    assert done == total == sum(map(runs.cost, specs)) and text.startswith("8 of 8 runs")
    assert [a <= b for (a, _, _), (b, _, _) in zip(told, told[1:], strict=False)].count(False) == 0

    monkeypatch.setattr(loop, "_Training", None)  # nothing is trained again
    assert runs.execute(specs, place) == results


def test_a_stopped_run_goes_on(place, tmp_path):
    spec = QUICK.spec("resnet8", 0)
    loop.run(spec, runs.folder(tmp_path, spec), device="cpu", stop_after=2)
    assert not runs.finished(tmp_path, spec)
    (result,) = runs.execute([spec], replace(place, out=tmp_path)).values()
    (whole,) = runs.execute([spec], place).values()
    assert result.iterations == 6
    assert [replace(p, seconds=0.0) for p in result.history] == [replace(p, seconds=0.0) for p in whole.history]


def test_runs_side_by_side_are_the_same_runs(place, tmp_path):
    specs = [QUICK.spec("resnet8", 0), QUICK.spec("plain8", 0)]
    beside = runs.execute(specs, Place(tmp_path, "cpu", workers=2))
    alone = runs.execute(specs, place)
    for spec in specs:
        assert [p.train_loss for p in beside[spec].history] == [p.train_loss for p in alone[spec].history]


def test_a_run_that_fails_side_by_side_is_the_callers_error(tmp_path):
    specs = [replace(QUICK.spec(name, 0), data="cifar10") for name in ("resnet8", "plain8")]
    with pytest.raises(LabError, match="data root: got none"):
        runs.execute(specs, Place(tmp_path, "cpu", workers=2))


# ---- outcomes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["degradation", "shortcuts", "responses", "depth", "skips"])
def test_experiment_gives_tables_plot_and_json(name, place, tmp_path):
    experiment = registry.experiment(name)
    context = Context(QUICK, place, runs.execute(experiment.specs(QUICK), place))
    outcome = experiment.outcome(context)
    assert outcome.findings and outcome.panels
    for table in outcome.tables:
        assert all(len(row) == len(table.head) for row in table.rows)
    drawn = pytest.importorskip("matplotlib") is not None
    where = {"command": "fastres paper", "gpu": None, "cpu": {"model": "a CPU"}, "commit": None, "time": "2026-01-01"}
    where["versions"] = {"torch": torch.__version__}
    paths = report.write(experiment, QUICK, outcome, where, tmp_path, drawn)
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    data = json.loads(paths[0].read_text())
    assert data["schema"] == report.SCHEMA and data["claims"] and data["data"] and data["plot"] == paths[2].name
    assert data["tables"][0]["title"] in paths[1].read_text()
    assert report.page(tmp_path).read_text().count("## ") >= 1
    page = report.page(tmp_path, "html").read_text()
    assert "data:image/png;base64," in page and data["tables"][0]["title"] in page


def fake(network, errors, preset=QUICK):
    """Results of one network whose last test errors are given, a seed each."""
    results = []
    for seed, error in zip(preset.seeds, errors, strict=True):
        history = [Point(i, 0.1, error, error, error, 1.0, 0.0) for i in (3, 6)]
        results.append(RunResult(preset.spec(network, seed), 6, 1, 1.0, 10, error, error, error, history))
    return results


def test_degradation_says_what_it_finds_either_way(place):
    for sign, verdict in ((1, "yes"), (-1, "no")):
        errors = {"plain8": 0.3, "plain14": 0.3 + sign * 0.1, "resnet8": 0.3, "resnet14": 0.3 - sign * 0.1}
        results = {r.spec: r for name, e in errors.items() for r in fake(name, (e, e))}
        found = degradation.outcome(Context(QUICK, place, results)).findings
        assert f"plain: test error rises with depth - {verdict}" in found[2]
        assert f"residual: test error falls with depth - {verdict}" in found[3]
    noisy = {"plain8": (0.1, 0.5), "plain14": (0.2, 0.5), "resnet8": (0.3, 0.3), "resnet14": (0.3, 0.3)}
    results = {r.spec: r for name, e in noisy.items() for r in fake(name, e)}
    found = degradation.outcome(Context(QUICK, place, results)).findings
    assert "plain: test error rises with depth - not decided" in found[2]
    assert "residual: test error falls with depth - not decided" in found[3]


def test_spread_and_comparison():
    values = [0.1, 0.2, 0.4]
    mean, deviation = (float(v) for v in spread(values).split(" ± "))
    assert mean == pytest.approx(23.33) and deviation == pytest.approx(100 * statistics.stdev(values), abs=0.01)
    assert spread([]) == "-" and spread([0.5]) == "50.00"
    assert Comparison("a", [1.0], "b", [2.0]).holds(True) == "yes"
    assert Comparison("a", [1.0], "b", [1.0]).holds(True) == "not decided"


def test_curves_of_seeds():
    curve = tables.over_seeds(fake("plain8", (0.1, 0.3)), "test_error", "plain", 2)
    assert curve.x == (3.0, 6.0) and curve.y == pytest.approx((0.2, 0.2))
    assert (curve.low, curve.high) == ((0.1, 0.1), (0.3, 0.3))


def test_one_step_measures_memory():
    small, large = (
        degradation.one_step("resnet20", replace(CI, recipe=replace(CI.recipe, batch_size=b)), "cpu") for b in (32, 512)
    )
    assert small["batch"] == 32 and small["parameters"] == 269_434 and small["loss"] > 0
    # what a training step has to keep of 19 layers: at least a tensor each, 4 bytes an entry
    least = 4 * 512 * (7 * 16 * 64 + 6 * 32 * 16 + 6 * 64 * 4)
    assert large["memory_bytes"] > least


@pytest.mark.full
def test_1202_layers_take_a_step():
    step = degradation.one_step("resnet1202", replace(CI, recipe=replace(CI.recipe, batch_size=2)), "cpu")
    assert step["parameters"] == 19_421_274 - 288 and step["loss"] > 0


# ---- ImageNet --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set of ImageNet's layout: two classes, an image each."""
    return write_images(tmp_path_factory.mktemp("imagenet"), {"train": 1, "val": 1}, (260, 300))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("views", [("1-crop", "10-crop"), pytest.param(("multi-scale",), marks=pytest.mark.full)])
def test_imagenet_evaluates_a_checkpoint(pictures, tmp_path, views):
    net = models.resnet18(num_classes=2)
    net.load_state_dict(net.state_dict())
    torch.save(net.state_dict(), tmp_path / "net.pth")
    evaluation = Evaluation("resnet18", tmp_path / "net.pth", None, views)
    outcome = imagenet.outcome(Context(CI, Place(tmp_path, "cpu", data_root=pictures), {}, evaluation))
    (table,) = outcome.tables
    assert {row[0] for row in table.rows} == set(views)
    assert all(outcome.data["errors"][view]["top1"] in (0.0, 0.5, 1.0) for view in views)
    if "1-crop" in views:
        row = next(row for row in table.rows if row[0] == "1-crop")
        assert row[3] == "fb.resnet.torch" and row[4] == "30.43"
        assert float(row[6]) == pytest.approx(100 * outcome.data["errors"]["1-crop"]["top1"] - 30.43, abs=0.006)


def test_imagenet_knows_what_to_compare_with():
    assert [each.top1 for each in imagenet.rows_for("resnet50", "10-crop", "B")] == [0.2285]
    assert [each.top1 for each in imagenet.rows_for("resnet34", "10-crop", "A")] == [0.2503, 0.2503]
    assert [each.top1 for each in imagenet.rows_for("plain34", "10-crop", None)] == [0.2854, 0.2854]
    assert imagenet.rows_for("resnet50", "10-crop", "C") == []
    with pytest.raises(PaperError, match="views: got 5-crop"):
        imagenet.check(Evaluation("resnet50", imagenet.__file__, None, ("5-crop",)))


# ---- tables, plots, report -------------------------------------------------------------------------------------------


def test_table_escapes(tmp_path):
    table = Table("a < b", ("x|y", "z"), (("1|2", "<b>"),), ("note & more",))
    assert "| 1\\|2 | <b> |" in table.markdown()
    page = report._html(table.markdown(), tmp_path)
    assert "<td>1|2</td>" in page and "&lt;b&gt;" in page and "a &lt; b" in page and "note &amp; more" in page
    assert Table.from_dict(json.loads(json.dumps(Outcome((table,), ()).to_dict()))["tables"][0]) == table


def test_draw_refuses_no_panels_and_draws_one(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="panels: got none"):
        report.draw((), tmp_path / "x.png", "", "")
    panel = Panel("a", "x", "y", (Curve("c", (1.0, 2.0), (0.1, 0.2), (0.0, 0.1), (0.2, 0.3)),), percent=True)
    report.draw((panel,), tmp_path / "x.png", "title", "note")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_report_refuses(tmp_path):
    with pytest.raises(PaperError, match="without results"):
        report.page(tmp_path)
    with pytest.raises(PaperError, match="format: got 'pdf'"):
        report.page(tmp_path, "pdf")
    (tmp_path / "paper-depth-ci.json").write_text("{")
    with pytest.raises(PaperError, match=r"paper-depth-ci.json: got .*expected a result"):
        report.page(tmp_path)
