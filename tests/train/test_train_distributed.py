"""Swapped networks in DistributedDataParallel, two gloo processes on the loopback: buckets as views, unused parameters,
norms in eval mode against one process on the joined batch, per-rank statistics, two forwards, SyncBatchNorm.
"""

import copy
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from swap_cases import TINY_CALLS, assert_same, fused_calls, images, tiny
from train_cases import FREEZES, OPTIONS, TOLERANCES, gradients, outcome, state, twins

pytestmark = pytest.mark.xdist_group("two processes of swapped networks")  # one start for all
RANKS = 2


class Branched(nn.Module):
    """The tiny network with a layer that only some batches reach."""

    def __init__(self, dtype):
        super().__init__()
        self.net, self.spare = tiny(dtype), nn.Linear(5, 5).to(dtype)

    def forward(self, x, spare=False):
        y = self.net(x)
        return self.spare(y) if spare else y


def build(dtype, options):
    """(swapped, stock), the same in every process."""
    return twins(lambda: Branched(dtype), dtype, options)


def data(dtype, count=3, n=8):
    generator = torch.Generator().manual_seed(7)
    g = {"generator": generator}
    return [(torch.randn(n, 3, 16, 16, dtype=dtype, **g), torch.randint(5, (n,), **g)) for _ in range(count)]


def fit(model, module, batches, twice=False):
    """SGD over `batches`, the spare layer in every second one; losses, last gradients, state."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    found = {}
    for i, (x, labels) in enumerate(batches):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, spare=bool(i % 2)), labels)
        if twice:
            loss = loss + F.cross_entropy(model(x.flip(3), spare=bool(i % 2)), labels)
        loss.backward()
        optimizer.step()
        found[f"loss{i}"] = loss.detach()
    return found | gradients(module) | state(module)


def wrap(module, **settings):
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        module, find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=0.001, **settings
    )


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {}
    for number, options in enumerate(OPTIONS):
        for dtype in TOLERANCES:
            mine = [(x[rank::RANKS], labels[rank::RANKS]) for x, labels in data(dtype)]
            for kind in ("eval norms", "rank statistics", "two forwards"):
                found = {}
                for label, module in zip(("ours", "theirs"), build(dtype, options), strict=True):
                    if kind == "eval norms":
                        FREEZES["norms in eval"](module)
                    # eager's own module cannot run twice before a backward where its buffers are broadcast
                    found[label] = fit(
                        wrap(module, broadcast_buffers=kind == "eval norms"), module, mine, kind == "two forwards"
                    )
                results[f"{number} {dtype} {kind}"] = found
        results[f"{number} sync"] = sync_batch_norm(options)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def sync_batch_norm(options):
    """Converted after the swap and before it: what a training step does, and that evaluation is the stock one."""
    from fastres.swap import swap

    found = {}
    for order in ("after", "before"):
        net, stock = build(torch.float32, options)
        net, stock = (nn.SyncBatchNorm.convert_sync_batchnorm(model) for model in (net, stock))
        if order == "before":
            net = copy.deepcopy(stock)
            swap(net, **options)
        x = images(dtype=torch.float32)
        training = []
        for model in (net, stock):
            result = outcome(partial(model, x))
            training.append(repr(result) if isinstance(result, Exception) else "a result")
        found[order] = {
            "calls": fused_calls(copy.deepcopy(net).eval(), x),
            "training": training,
            "evaluation": {"y": net.eval()(x).detach()},
            "wanted": {"y": stock.eval()(x).detach()},
        }
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Each process's results; one start for all tests, since starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=RANKS, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


every_case = pytest.mark.parametrize(
    ("number", "dtype"), [(i, d) for i in range(len(OPTIONS)) for d in TOLERANCES], ids=str
)


@every_case
def test_row25_norms_in_eval_mode_equal_one_process_on_the_joined_batch(ranks, number, dtype):
    """Gradients averaged over the ranks are those of the joined batch, since nothing is taken over a rank's batch."""
    net, _ = build(dtype, OPTIONS[number])
    FREEZES["norms in eval"](net)
    wanted = fit(net, net, data(dtype))
    for rank in range(RANKS):
        found = ranks[rank][f"{number} {dtype} eval norms"]
        assert_same(found["ours"], found["theirs"], 100 * TOLERANCES[dtype])
        rest = {n: t for n, t in found["ours"].items() if not n.startswith("loss")}
        assert_same(rest, {n: wanted[n] for n in rest}, 100 * TOLERANCES[dtype])
    first, second = (ranks[rank][f"{number} {dtype} eval norms"]["ours"] for rank in range(RANKS))
    joined = {n: (t + second[n]) / 2 for n, t in first.items() if n.startswith("loss")}
    assert_same(joined, {n: wanted[n] for n in joined}, 100 * TOLERANCES[dtype])


@every_case
@pytest.mark.parametrize("kind", ["rank statistics", "two forwards"])
def test_row25_each_rank_keeps_its_own_statistics_as_stock_does(ranks, number, dtype, kind):
    """Parameters and gradients are equal on both ranks, statistics differ, all of it as in stock DDP."""
    found = [ranks[rank][f"{number} {dtype} {kind}"] for rank in range(RANKS)]
    for each in found:
        assert_same(each["ours"], each["theirs"], 100 * TOLERANCES[dtype])
        assert int(each["ours"]["net.stem.1.num_batches_tracked"]) == 3 * (1 + (kind == "two forwards"))
    for name, t in found[0]["ours"].items():
        if "running" in name:
            assert not torch.equal(t, found[1]["ours"][name]), name
        elif name.startswith("grad") or "num_batches" in name or "loss" not in name:
            assert torch.equal(t, found[1]["ours"][name]), name


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("order", ["after", "before"])
def test_row46_sync_batchnorm_runs_as_in_the_stock_network(ranks, number, order):
    """A SyncBatchNorm is never fused; in training on a CPU it raises, swapped or not, and in eval mode it is exact."""
    for rank in range(RANKS):
        found = ranks[rank][f"{number} sync"][order]
        assert found["calls"] == 0 < TINY_CALLS
        assert found["training"][0] == found["training"][1] and "expected input tensor to be on" in found["training"][0]
        assert_same(found["evaluation"], found["wanted"], 0)
