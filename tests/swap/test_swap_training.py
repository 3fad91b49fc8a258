"""Swapped models in training: DDP, fully_shard, checkpointing, update_bn, optimizers, freezing, accumulation."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastres
from fastres.swap import swap
from swap_cases import TINY_CALLS, assert_same, assert_same_steps, fused_calls, images, pair, tiny, torchvision

vision = torchvision.models.resnet


def train(net, batches, lr=0.05):
    """SGD steps with momentum, and weight decay on all but the BN parameters; returns the losses and the state."""
    decay, rest = [], []
    for module in net.modules():
        for p in module.parameters(recurse=False):
            (rest if isinstance(module, nn.BatchNorm2d) else decay).append(p)
    groups = [{"params": decay, "weight_decay": 1e-3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net.train()(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {f"loss{i}": loss for i, loss in enumerate(losses)} | dict(net.state_dict())


def batches(count=3, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 3, 16, 16, dtype=torch.float64, generator=generator),
            torch.randint(5, (n,), generator=generator),
        )
        for _ in range(count)
    ]


def test_training_steps_are_the_same():
    net, stock = pair()
    swap(net)
    assert_same(train(net, batches()), train(stock, batches()), tolerance=1e-9)


def test_swap_and_revert_in_the_middle_of_training():
    net, stock = pair()
    results = {}
    for i, batch in enumerate(batches(4)):
        report = swap(net) if i % 2 else None
        results[i] = (train(net, [batch]), train(stock, [batch]))
        if report is not None:
            report.revert()
    for ours, theirs in results.values():
        assert_same(ours, theirs, tolerance=1e-9)


def test_update_bn_recomputes_the_statistics():
    net, stock = pair()
    swap(net)
    loader = [x for x, _ in batches()]
    for model in (net, stock):
        torch.optim.swa_utils.update_bn(loader, model)
    assert_same(net.state_dict(), stock.state_dict())
    assert int(net.stem[1].num_batches_tracked) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_row26_checkpoint_is_pytorchs(reentrant):
    """Gradients are the plain run's; statistics move twice, as they do for the stock block."""
    block, stock = pair(lambda: vision.BasicBlock(4, 4).double())
    swap(block)
    plain, x, results = copy.deepcopy(stock), torch.randn(3, 4, 6, 6, dtype=torch.float64), []
    for model, enabled in ((block, True), (stock, True), (plain, False)):
        leaf = x.clone().requires_grad_()
        with set_checkpoint_early_stop(False):
            y = checkpoint(model, leaf, use_reentrant=reentrant) if enabled else model(leaf)
            y.square().sum().backward()
        results.append(({"dx": leaf.grad} | {n: p.grad for n, p in model.named_parameters()}, model.state_dict()))
    assert_same(results[0][0], results[2][0])
    assert_same(results[0][1], results[1][1])
    assert int(block.bn2.num_batches_tracked) == 2


def test_row26_bn_once_on_a_swapped_block():
    block, stock = pair(lambda: vision.BasicBlock(4, 4).double())
    swap(block)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    once = fastres.nn.bn_once(block)
    checkpoint(block, x.clone().requires_grad_(), use_reentrant=False, context_fn=once).square().sum().backward()
    stock(x).square().sum().backward()
    assert_same(block.state_dict(), stock.state_dict())


def test_row25_gradient_accumulation_and_clipping():
    net, stock = pair()
    swap(net)
    norms = []
    for model in (net, stock):
        for x, y in batches():
            nn.functional.cross_entropy(model(x), y).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    torch.testing.assert_close(*norms)
    assert_same(*({n: p.grad for n, p in model.named_parameters()} for model in (net, stock)))


def test_finetuning_with_a_frozen_backbone():
    net, stock = pair()
    swap(net)
    for model in (net, stock):
        model.layer1.requires_grad_(False)
        model.layer1.eval()
    x = images()
    for model in (net, stock):
        model(x).square().sum().backward()
    assert net.layer1[0].conv1.weight.grad is None
    assert_same(
        *(
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad} | model.state_dict()
            for model in (net, stock)
        )
    )


def test_data_parallel_replicas_hold_their_parameters_as_attributes():
    """What `nn.DataParallel` makes of a module: no `_parameters`, plain tensors as attributes."""
    net, stock = pair(lambda: vision.BasicBlock(4, 4).double())
    swap(net)
    replica = net._replicate_for_data_parallel()
    for name, child in net._modules.items():
        if child is not None:
            twin = replica._modules[name] = child._replicate_for_data_parallel()
            for key, p in child._parameters.items():
                setattr(twin, key, None if p is None else p * 1)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert fused_calls(copy.deepcopy(net), x) == 2
    torch.testing.assert_close(replica(x), stock(x))
    assert_same_steps(net.eval(), stock.eval(), x, modes=(False,))


# ---- two processes ---------------------------------------------------------------------------------------------------


def start(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def distributed(rank, folder):
    """DDP of a swapped and of a stock model, each process on its half of every batch; then `fully_shard`."""
    from torch.nn.parallel import DistributedDataParallel

    start(rank, folder)
    net, stock = pair()
    swap(net)
    assert fused_calls(copy.deepcopy(net), images()) == TINY_CALLS
    mine = [(x[rank::2], y[rank::2]) for x, y in batches()]
    wrapped_first = DistributedDataParallel(tiny())
    assert swap(wrapped_first).rows[0].name == "module.stem"
    models = (DistributedDataParallel(net), DistributedDataParallel(stock), wrapped_first)
    ours, theirs, late = (train(model, mine) for model in models)
    torch.save({"ours": ours, "theirs": theirs, "late": late, "sharded": sharded(rank)}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def sharded(rank):
    """Swap, then fully_shard each block and the root: losses and full parameters, beside a stock model's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, results = init_device_mesh("cpu", (2,)), {}
    for label in ("ours", "theirs"):
        net = tiny()
        if label == "ours":
            swap(net)
        for block in (*net.layer1, *net.layer2):
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        late = swap(net)
        results[f"{label} rows"] = {row.name: row.reason for row in late.rows}
        results[f"{label} calls"] = fused_calls(copy.copy(net).eval(), images())
        state = train(net, [(x[rank::2], y[rank::2]) for x, y in batches()])
        results[label] = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}
    return results


def test_row25_two_processes_ddp_and_fully_shard(tmp_path):
    """One start of two gloo processes on the loopback for both, since starting them is what takes the time."""
    torch.multiprocessing.spawn(distributed, args=(str(tmp_path),), nprocs=2, join=True)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same(found["ours"], found["theirs"], tolerance=1e-9)
        assert_same(found["late"], found["theirs"], tolerance=1e-9)
        shards = found["sharded"]
        assert_same(shards["ours"], shards["theirs"], tolerance=1e-9)
        assert shards["ours calls"] == TINY_CALLS
        assert set(shards["ours rows"].values()) == {"ALREADY"}
        blocks = {name: reason for name, reason in shards["theirs rows"].items() if name in ("layer1.0", "layer2.1")}
        assert blocks == {"layer1.0": "FSDP", "layer2.1": "FSDP"}
