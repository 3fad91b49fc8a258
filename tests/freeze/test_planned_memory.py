"""Planned memory: the outputs of a frozen network's own convolutions share one piece, and nobody can tell."""

import copy
import itertools
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fastres
from fastres._extension import native_cpu
from fastres.inference import arena as arenas
from fastres.inference.arena import Arenas, Places, Wish, place
from fastres.inference.executor import _bytes
from freeze_cases import Net, compare, settle

vision = pytest.importorskip("torchvision").models
pytestmark = pytest.mark.skipif(
    native_cpu() is None or not torch.backends.mkldnn.is_available(), reason="the C++ extension is not built"
)


def plans(frozen):
    return list(frozen._network.executor._plans.values())  # what no output shows


class Chain(Net):
    """Four convolutions that Winograd's kernels take; the test's function makes the forward of them."""

    def __init__(self, function):
        super().__init__(None)
        self.stem = nn.Conv2d(3, 64, 1)
        self.convs = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4))
        self.function = function

    def forward(self, x):
        return self.function(self.stem(x), *self.convs)


def images(batch=4, size=56):
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


CASES = {
    "a chain": lambda x, a, b, c, d: d(c(b(a(x).relu()).relu())),
    "read twice, far apart": lambda x, a, b, c, d: (lambda y: d(c(b(y).relu()).relu()) * y)(a(x)),
    "a transposed view, read at the end": lambda x, a, b, c, d: (lambda v: d(c(b(v.transpose(2, 3)))) + v)(
        a(x).transpose(2, 3)
    ),
    "a part": lambda x, a, b, c, d: (lambda y: torch.cat([d(c(b(y[:2]))), y[2:]]))(a(x)),
    "an output": lambda x, a, b, c, d: (lambda y: (y, d(c(b(y).relu()))))(a(x)),
    "an output that is a view": lambda x, a, b, c, d: (lambda y: (y.flatten(1), d(c(b(y).relu()))))(a(x)),
    "a residual written over": lambda x, a, b, c, d: (lambda y: d(torch.relu(c(b(y).relu()) + y)) + y.mean())(a(x)),
    "two residuals": lambda x, a, b, c, d: (lambda y: torch.relu(d(torch.relu(c(torch.relu(b(y) + y)) + y)) + y))(a(x)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_eagers_whoever_reads(case):
    torch.manual_seed(0)
    net = settle(Chain(CASES[case]))
    frozen = fastres.freeze(net, images(), tune=False, verify=False)
    for batch in (4, 3, 4):
        compare(net, frozen, images(batch), tol=1e-4)
    assert any(plan.places.size for plan in plans(frozen))


def test_memory_is_taken_again_and_outputs_are_the_callers():
    net = settle(Chain(CASES["a chain"]))
    frozen = fastres.freeze(net, images(), tune=False, verify=False)
    x = images()
    first = frozen(x)
    kept = first.clone()
    frozen(images())
    assert torch.equal(first, kept)
    (plan,) = plans(frozen)
    output = 4 * 64 * 56 * 56 * 4
    assert len(plan.places.wishes) == 3 and plan.places.size == 2 * output, "three outputs in the room of two"


def test_a_resnet_holds_a_few_outputs_at_a_time():
    frozen = fastres.freeze(settle(vision.resnet18()), images(8, 224), tune=False, verify=False)
    frozen(images(8, 224))
    (plan,) = plans(frozen)
    largest = max(wish.bytes for wish in plan.places.wishes)
    assert len(plan.places.wishes) >= 5 and plan.places.size <= 3 * largest


def test_threads_copies_pickles_and_refresh():
    net = settle(vision.resnet18(num_classes=10))
    frozen = fastres.freeze(net, images(2, 64), tune=False, verify=False)
    given = [images(n, s) for n, s in itertools.product((1, 2, 3), (64, 96))]
    with torch.no_grad():
        wanted = [net(x) for x in given]
    models = [frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))]

    def client(seed):
        draw = random.Random(seed)
        for _ in range(30):
            i, model = draw.randrange(len(given)), draw.choice(models)
            got = model(given[i])
            assert float((got - wanted[i]).abs().max()) < 1e-3 * float(wanted[i].abs().max()), i

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(client, seed) for seed in range(4)]:
            done.result()
    with torch.no_grad():
        net.fc.bias.add_(1.0)
    frozen.refresh()
    compare(net, frozen, given[0], tol=1e-4)
    with torch.inference_mode():
        inside = frozen(given[1])
    assert torch.allclose(inside, frozen(given[1]))


def test_an_error_in_a_call_leaves_the_next_one_right():
    net = settle(Chain(CASES["a chain"]))
    frozen = fastres.freeze(net, images(), tune=False, verify=False)
    x = images()
    frozen(x)
    (plan,) = plans(frozen)
    calls, broken = plan.calls, plan.calls[-1]._replace(function=lambda *args: 1 / 0)
    plan.calls = [*calls[:-1], broken]
    with pytest.raises(ZeroDivisionError):
        frozen(x)
    plan.calls = calls
    compare(net, frozen, x, tol=1e-4)


# ---- placing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_places_that_live_at_the_same_time_never_overlap(seed):
    draw = random.Random(seed)
    wishes = []
    for _ in range(draw.randrange(1, 40)):
        first = draw.randrange(50)
        size = (draw.randrange(1, 4), draw.randrange(1, 90), 3, 2)
        dtype = draw.choice((torch.float32, torch.bfloat16))
        wishes.append(Wish(size, torch.empty(size).stride(), dtype, first, first + draw.randrange(12)))
    offsets, total = place(wishes)
    for (a, at), (b, other) in itertools.combinations(zip(wishes, offsets, strict=True), 2):
        if a.first <= b.last and b.first <= a.last:
            assert at + a.bytes <= other or other + b.bytes <= at
    assert total == max(at + w.bytes for w, at in zip(wishes, offsets, strict=True))
    busiest = max(sum(w.bytes for w in wishes if w.first <= step <= w.last) for step in range(70))
    assert busiest <= total <= 2 * busiest
    views = Places(tuple(wishes), tuple(offsets), total).views(torch.empty(total, dtype=torch.uint8))
    assert [(tuple(v.shape), v.dtype) for v in views] == [(w.size, w.dtype) for w in wishes]


def test_kept_memory_has_a_bound(monkeypatch):
    monkeypatch.setattr(arenas, "_KEPT", 3 << 20)
    wish = Wish((1 << 18,), (1,), torch.float32, 0, 1)
    places, pool = Places((wish,), (0,), wish.bytes), Arenas()

    class Plan:
        pass

    taken = [pool.take(Plan(), places)[0] for _ in range(5)]
    for arena in taken:
        pool.give_back(arena)
    assert len(pool._free) == 3


# ---- a bound on weights made ready -----------------------------------------------------------------------------------


def test_max_weights_bounds_what_is_held_and_changes_no_answer():
    net, x = settle(vision.resnet18(num_classes=10)), images(2, 64)
    whole = fastres.freeze(net, x, tune=False, verify=False)
    whole(x)
    needed = whole._network.executor.bytes_held([x])
    for room in (0, 300_000, needed // 2, needed):
        frozen = fastres.freeze(net, x, tune=False, verify=False, max_weights=room)
        for given in (x, images(1, 64), images(3, 96)):
            compare(net, frozen, given, tol=1e-4)
        executor = frozen._network.executor
        held = [t for plan in executor._plans.values() for t in plan.held]
        assert _bytes(held) <= room and (room == 0) == (not held)
        assert frozen.report.held <= room
    assert pickle.loads(pickle.dumps(frozen)).plan.max_weights == needed


def test_max_weights_is_kept_in_a_file(tmp_path):
    frozen = fastres.freeze(settle(vision.resnet18()), images(1, 64), tune=False, verify=False, max_weights=10**6)
    frozen.save(tmp_path / "net")
    loaded = fastres.load(tmp_path / "net")
    assert loaded.plan.max_weights == 10**6
    loaded(images(1, 64))
    assert loaded._network.executor.bytes_held([images(1, 64)]) <= 10**6


@pytest.mark.parametrize("wrong", [-1, 1.5, "1MB", True])
def test_max_weights_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match="max_weights: got .*, expected a number of bytes, or None for no bound"):
        fastres.freeze(nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8), max_weights=wrong)
