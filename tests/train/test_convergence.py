"""Training with swapped blocks beside eager: short runs hold the bounds, planted faults do not, the result is whole."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "convergence.py").is_file():  # an installed wheel, tested without its sources
    pytest.skip("benchmarks/ is not here", allow_module_level=True)
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

import convergence  # noqa: E402
import convergence_report as report  # noqa: E402
import fastres  # noqa: E402
from convergence import EXACT, GUIDE, WAYS, Recipe, StockCifarResNet, Way, train_together  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "convergence-cpu-torch2.11.0.json"
STEPS = 12


@pytest.fixture(scope="module")
def tiny():
    return convergence.images(8)


def run(data, steps=STEPS, ways=WAYS, seed=0):
    return train_together(lambda: StockCifarResNet(1), data, seed, Recipe(steps, 16, 0.1), ways)


def fp32(prepare):
    """float64, eager and what `prepare` makes of the network in the swapped one's place."""
    return {name: WAYS[name] for name in (EXACT, "eager fp32")} | {"swapped fp32": Way("fp32", prepare)}


def failed(runs, dtypes=("fp32",)):
    return {v["what"] for v in report.verdicts("tiny", runs, 360, dtypes) if not v["passed"]}


@pytest.fixture(scope="module")
def short(tiny):
    return run(tiny)


@pytest.mark.parametrize("dtype", report.DTYPES)
def test_a_short_run_holds_the_bounds(short, dtype):
    assert [v["what"] for v in report.verdicts("tiny", [short], 360, (dtype,)) if v["question"] != "a"]
    assert not failed([short], (dtype,))


def test_the_first_steps_are_the_same(short):
    """Before a rounding is amplified: the whole runs, not only single steps."""
    eager, swapped = (short["ways"][f"{way} fp32"] for way in ("eager", "swapped"))
    assert swapped["distances"]["parameters"][0] <= 2 * eager["distances"]["parameters"][0] < 1e-6
    assert swapped["distances"]["statistics"][0] <= 2 * eager["distances"]["statistics"][0] < 1e-6
    torch.testing.assert_close(swapped["loss"][:2], eager["loss"][:2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", report.DTYPES)
def test_less_memory_changes_no_bit(tiny, short, dtype):
    name = f"swapped {dtype}"
    ways = {way: WAYS[way] for way in (EXACT, GUIDE, f"eager {dtype}")}
    again = run(tiny, ways=ways | {name: convergence.swapped(dtype, memory="min")})
    assert not failed([again], (dtype,))
    assert again["ways"][name] == short["ways"][name]


def test_the_same_seed_gives_the_same_run(tiny):
    assert run(tiny, 3) == run(tiny, 3)
    assert run(tiny, 3) != run(tiny, 3, seed=1)


FAULTS = {
    "wrong momentum": lambda net: [setattr(m, "momentum", 0.101) for m in net.modules() if hasattr(m, "momentum")],
    "scaled gradient": lambda net: [p.register_hook(lambda gradient: 1.01 * gradient) for p in net.parameters()],
    "one dead weight": lambda net: net.layer2[0].bn1.weight.register_hook(torch.zeros_like),
    "wrong eps": lambda net: setattr(net.layer3[0].bn2, "eps", 1.1e-5),
}
SEEN = "statistics", "gradients", "gradients", "logits"


@pytest.mark.parametrize(("fault", "seen"), zip(FAULTS, SEEN, strict=True))
def test_a_planted_fault_is_seen(tiny, fault, seen):
    def faulty(net):
        fastres.swap(net, strict=True)
        FAULTS[fault](net)

    assert f"{seen}: error, median" in failed([run(tiny, 6, fp32(faulty))])


def test_nothing_swapped_is_an_error(tiny):
    def alone(net):
        fastres.swap(net, include="nowhere", strict=True)

    with pytest.raises(ValueError, match="nothing to swap"):
        run(tiny, 3, fp32(alone))


def test_worse_results_fail():
    def way(loss, accuracy, distance=1e-3):
        errors = {kind: [1e-6] * 3 for kind in ("loss", "logits", "gradients", "statistics")}
        distances = {kind: [distance] * 3 for kind in ("parameters", "statistics")}
        return {"loss": [loss] * 30, "test_accuracy": accuracy, "errors": errors, "distances": distances}

    def runs(loss, accuracy, distance=1e-3):
        pairs = [(way(0.1 + 0.01 * i, 0.95), way(loss + 0.01 * i, accuracy, distance)) for i in range(3)]
        return [{"ways": {"eager fp32": eager, "swapped fp32": swapped}} for eager, swapped in pairs]

    assert not failed(runs(0.1, 0.95))
    assert not failed(runs(0.105, 0.95 - 1 / 360))
    assert failed(runs(0.2, 0.95)) == {"final loss"}
    assert failed(runs(0.1, 0.94)) == {"held-out accuracy"}
    assert failed(runs(0.1, 0.95, 3e-3)) == {f"{k}: distance at the end, RMS" for k in ("parameters", "statistics")}


def test_files_of_a_result(short, tmp_path):
    settings = convergence.settings("cifar-resnet20", STEPS)
    where = convergence.environment(torch.device("cpu"), "python benchmarks/convergence.py")
    data = report.document({"cifar-resnet20": [short, short | {"seed": 1}]}, {"cifar-resnet20": settings}, where)
    paths = report.write(convergence.rounded(data), tmp_path)
    assert report.check(json.loads(paths[0].read_text()))["verdicts"]
    page = paths[1].read_text()
    passed = sum(verdict["passed"] for verdict in data["verdicts"])
    assert page.count("| passed |") == passed and page.count("| FAILED |") == len(data["verdicts"]) - passed
    assert len(report.text(data)) == len(data["verdicts"])
    if len(paths) == 3:
        assert paths[2].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected the key 'schema'"):
        report.check({"schema": "another"})


def test_a_finished_run_is_read_back(tmp_path):
    path, wanted = tmp_path / "run.json", convergence.settings("resnet18", 20)
    assert convergence.cached(path, wanted) is None
    path.write_text(json.dumps({"settings": wanted, "run": {"seed": 0}}))
    assert convergence.cached(path, wanted) == {"seed": 0}
    assert convergence.cached(path, convergence.settings("resnet18", 21)) is None


@pytest.mark.skipif(not RESULT.is_file(), reason="results are not part of the source distribution")
def test_the_committed_result_holds_its_bounds():
    data = report.check(json.loads(RESULT.read_text()))
    assert set(data["runs"]) == set(convergence.NETWORKS)
    for name, runs in data["runs"].items():
        steps = data["settings"][name]["steps"]
        assert [one["seed"] for one in runs] == [0, 1, 2] and steps == 200
        for one in runs:
            assert set(one["ways"]) == set(WAYS) and all(len(way["loss"]) == steps for way in one["ways"].values())
        again = report.verdicts(name, runs, 360)
        assert again == [v for v in data["verdicts"] if v["network"] == name]
        assert len(again) == 2 * 12
    assert all(verdict["passed"] for verdict in data["verdicts"])
    assert data["environment"]["commit"] and RESULT.with_suffix(".png").is_file()


@pytest.mark.full
@pytest.mark.parametrize("name", list(convergence.NETWORKS))
def test_sixty_steps_hold_the_bounds(name):
    network = convergence.NETWORKS[name]
    data, recipe = convergence.images(network.size), network.recipe(60)
    runs = [train_together(network.make, data, seed, recipe) for seed in range(2)]
    held = [v for v in report.verdicts(name, runs, 360) if v["question"] != "c"]  # 60 steps are no end
    assert len(held) == 2 * 10 and all(v["passed"] for v in held), [v for v in held if not v["passed"]]
    assert runs[0]["ways"]["swapped fp32"]["loss"][-1] < runs[0]["ways"]["swapped fp32"]["loss"][0] / 2
