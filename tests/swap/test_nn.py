"""The drop-in modules against their stock compositions: forward and backward, norms, hooks, state_dict, tracing."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import fastres
from fastres.nn import AddReLU, BasicBlock, BNAddReLU, BNReLU, Bottleneck, ConvBNReLU, bn_once, norm_act
from swap_cases import assert_same, assert_same_steps, fused_calls, projection, scramble, step

torchvision = pytest.importorskip("torchvision")


class Stock(nn.Module):
    """relu(bn(x) [+ residual])."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def forward(self, x, residual=None):
        y = self.bn(x)
        return torch.relu(y if residual is None else y + residual)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- forward, backward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
def test_bn_relu_matches_stock(residual):
    ours = scramble((BNAddReLU if residual else BNReLU)(5)).double()
    stock = Stock(copy.deepcopy(ours.bn))
    inputs = [double(3, 5, 4, 4) for _ in range(1 + residual)]
    assert fused_calls(ours, *inputs) == 1
    stock.load_state_dict(ours.state_dict())
    assert_same_steps(ours, stock, *inputs)


def test_bn_relu_on_each_backend(backend):
    ours = scramble(BNAddReLU(5))
    ours.backend = backend
    stock = Stock(copy.deepcopy(ours.bn))
    inputs = [torch.randn(3, 5, 4, 4) for _ in range(2)]
    assert_same_steps(ours, stock, *inputs, tolerance=2e-6)


def test_add_relu_module():
    class StockAdd(nn.Module):
        def forward(self, x, residual):
            return torch.relu(x + residual)

    x, r = double(3, 7), double(3, 7)
    assert_same(step(AddReLU(), x, r), step(StockAdd(), x, r), 0)
    torch.testing.assert_close(AddReLU()(x, r[:1]), torch.relu(x + r[:1]))  # broadcast: only eager's addition takes it


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (3, 5), "dilation": 2, "groups": 2},
        {"norm_layer": None},
        {"activation_layer": None},
        {"activation_layer": nn.ReLU6, "padding": 0},
        {"norm_layer": nn.InstanceNorm2d, "inplace": None, "bias": True},
    ],
)
def test_conv_bn_relu_is_conv2d_norm_activation(options):
    ours = scramble(ConvBNReLU(4, 6, **options)).double()
    stock = torchvision.ops.Conv2dNormActivation(4, 6, **options).double()
    assert [type(m) for m in ours] == [type(m) for m in stock]
    stock.load_state_dict(ours.state_dict())
    assert_same_steps(ours, stock, double(2, 4, 9, 9))


BLOCKS = [
    ("BasicBlock", {}),
    ("BasicBlock", {"stride": 2}),
    ("Bottleneck", {}),
    ("Bottleneck", {"stride": 2}),
    ("Bottleneck", {"groups": 2, "base_width": 32, "dilation": 2}),
]


@pytest.mark.parametrize(("name", "options"), BLOCKS)
def test_block_is_torchvisions(name, options):
    theirs = getattr(torchvision.models.resnet, name)
    planes = 8 // theirs.expansion * 2 if options else 8 // theirs.expansion
    shortcut = projection(8, planes * theirs.expansion, options.get("stride", 1)) if options else None
    stock = scramble(theirs(8, planes, downsample=shortcut, **options)).double()
    ours = getattr(fastres.nn, name)(8, planes, downsample=copy.deepcopy(shortcut), **options).double()
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [(n, type(m)) for n, m in ours.named_modules() if n] == [(n, type(m)) for n, m in stock.named_modules() if n]
    assert (ours.expansion, ours.stride) == (stock.expansion, stock.stride)
    ours.load_state_dict(stock.state_dict())
    x = double(3, 8, 8, 8)
    assert fused_calls(copy.deepcopy(ours), x) == len([n for n in dict(ours.named_children()) if n.startswith("bn")])
    assert_same_steps(ours, stock, x)


def test_block_refuses_what_torchvision_refuses():
    with pytest.raises(ValueError, match="groups, base_width: got 2, 64"):
        BasicBlock(8, 8, groups=2)
    with pytest.raises(NotImplementedError, match="dilation: got 2"):
        BasicBlock(8, 8, dilation=2)


def test_stride_in_1x1_is_the_papers_block():
    v1, v15 = Bottleneck(8, 4, 2, stride_in_1x1=True), Bottleneck(8, 4, 2)
    assert [m.stride for m in (v1.conv1, v1.conv2, v15.conv1, v15.conv2)] == [(2, 2), (1, 1), (1, 1), (2, 2)]
    assert list(v1.state_dict()) == list(v15.state_dict())


def test_torchvision_state_dict_loads_unchanged_and_back():
    resnet = torchvision.models.resnet
    theirs = scramble(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=4))
    ours = resnet.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4)
    assert type(ours.layer1[0]) is Bottleneck
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    ours.train()(x).sum().backward()
    theirs.load_state_dict(ours.state_dict())
    assert_same(theirs.state_dict(), ours.state_dict(), 0)


# ---- norms that are not exactly BatchNorm2d --------------------------------------------------------------------------


def test_row42_sync_batchnorm_conversion_keeps_the_relu():
    x, r = double(3, 4, 5, 5), double(3, 4, 5, 5)
    for module, inputs in ((BNReLU(4), [x]), (BNAddReLU(4), [x, r])):
        module = scramble(module).double()
        stock = Stock(copy.deepcopy(module.bn))
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        assert type(converted) is type(module) and type(converted.bn) is nn.SyncBatchNorm
        assert fused_calls(copy.deepcopy(converted), *inputs) == 0
        assert_same_steps(converted, stock, *inputs)
        assert (converted(*inputs) >= 0).all()


@pytest.mark.parametrize(
    ("norm", "calls"),
    [(torchvision.ops.FrozenBatchNorm2d, 2), (lambda c: nn.GroupNorm(2, c), 0), (nn.SyncBatchNorm, 0)],
)
def test_row42_block_with_another_norm(norm, calls):
    stock = torchvision.models.resnet.BasicBlock(4, 4, norm_layer=norm).double()
    ours = BasicBlock(4, 4, norm_layer=norm).double()
    for buffer in stock.buffers():
        buffer.copy_(torch.rand_like(buffer.double()) + 0.5)
    ours.load_state_dict(stock.state_dict())
    x = double(3, 4, 6, 6)
    assert fused_calls(copy.deepcopy(ours), x) == calls
    assert_same_steps(ours, stock, x)


def test_one_converted_norm_leaves_the_other_steps_fused():
    block = BasicBlock(4, 4).double()
    block.bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(block.bn1)
    assert fused_calls(block, double(3, 4, 6, 6)) == 1


@pytest.mark.parametrize("child", ["bn1", "relu", "bn2"])
def test_row40_hook_on_child_fires(child):
    block, seen = BasicBlock(4, 4).double(), []
    stock = copy.deepcopy(block)
    getattr(block, child).register_forward_hook(lambda m, a, y: seen.append(y))
    assert_same_steps(block, stock, double(3, 4, 6, 6))
    assert len(seen) == (4 if child == "relu" else 2)


def test_a_forward_patched_on_the_norm_runs():
    module = BNReLU(4).double()
    module.bn.forward = lambda x: x - 1
    x = double(3, 4, 5, 5)
    torch.testing.assert_close(module(x), torch.relu(x - 1))


# ---- the BatchNorm contract, through a module ------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "tracked", "buffers"), list(itertools.product([False, True], repeat=3)))
def test_row16_flags_and_buffers(train, tracked, buffers):
    """`track_running_stats` flipped after construction, with and without buffers, in both modes."""
    ours = scramble(BNReLU(4, track_running_stats=buffers)).double()
    ours.bn.track_running_stats = tracked
    stock = Stock(copy.deepcopy(ours.bn))
    assert fused_calls(copy.deepcopy(ours).train(train), double(3, 4, 5, 5)) == 1
    assert_same_steps(ours, stock, double(3, 4, 5, 5), modes=(train,))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_row15_momentum_over_five_steps(momentum):
    ours = BNReLU(4, momentum=momentum).double()
    stock = Stock(copy.deepcopy(ours.bn))
    for _ in range(5):
        assert_same_steps(ours, stock, double(3, 4, 5, 5), modes=(True,))
    assert int(ours.bn.num_batches_tracked) == 5


def test_row17_running_variance_is_unbiased():
    module = BNReLU(1, momentum=1.0).double()
    x = torch.tensor([1.0, 4.0], dtype=torch.float64).view(2, 1, 1, 1)
    y = module(x)
    assert module.bn.running_var.item() == 4.5  # n = 2: sum of squares over n - 1
    torch.testing.assert_close(y.flatten()[1], (x.flatten()[1] - 2.5) / (2.25 + 1e-5) ** 0.5)


def test_row18_eval_forward_then_train_then_backward():
    ours = scramble(BNReLU(4)).double().eval()
    stock = Stock(copy.deepcopy(ours.bn)).eval()
    x = double(3, 4, 5, 5)
    grads = []
    for module in (ours, stock):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        module.train()
        y.square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_row19_double_backward():
    ours = scramble(BNAddReLU(3)).double()
    inputs = [double(2, 3, 3, 3).requires_grad_() for _ in range(2)]
    for train in (True, False):
        ours.train(train)
        assert torch.autograd.gradgradcheck(lambda *a: ours(*a), inputs)  # noqa: B023


def test_affine_false_and_frozen_weight():
    assert_same_steps(m := BNReLU(4, affine=False).double(), Stock(copy.deepcopy(m.bn)), double(3, 4, 5, 5))
    frozen = BNReLU(4).double()
    frozen.bn.weight.requires_grad_(False)
    frozen(double(3, 4, 5, 5)).sum().backward()
    assert frozen.bn.weight.grad is None and frozen.bn.bias.grad is not None


def test_row4_one_value_per_channel_raises_before_anything_moves():
    module = BNReLU(4)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError):
        module(torch.randn(1, 4, 1, 1))
    assert_same(module.state_dict(), before, 0)


# ---- checkpointing, copies, tracing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BasicBlock, torchvision.models.resnet.BasicBlock])
def test_row26_bn_once_under_checkpoint(cls):
    from torch.utils.checkpoint import checkpoint

    block = scramble(cls(4, 4)).double()
    plain, twice = copy.deepcopy(block), copy.deepcopy(block)
    x, mean = double(3, 4, 6, 6), block.bn1.running_mean

    def run(module, **options):
        leaf = x.clone().requires_grad_()
        y = checkpoint(module, leaf, use_reentrant=False, **options) if options else module(leaf)
        y.square().sum().backward()
        return {"dx": leaf.grad} | {n: p.grad for n, p in module.named_parameters()} | module.state_dict()

    assert_same(run(block, context_fn=bn_once(block)), run(plain))
    assert block.bn1.running_mean is mean
    run(twice, preserve_rng_state=True)
    assert int(twice.bn1.num_batches_tracked) == 2  # PyTorch's own behavior, unless asked otherwise


def test_bn_once_refuses_a_function():
    with pytest.raises(TypeError, match="module: got function"):
        bn_once(lambda x: x)


def test_row37_copies_and_pickles():
    module = nn.Sequential(ConvBNReLU(3, 4), BasicBlock(4, 4), Bottleneck(4, 1)).double()
    module[1].backend = "reference"
    x = double(2, 3, 6, 6)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(m) for m in twin] == [type(m) for m in module] and twin[1].backend == "reference"
        assert_same(step(twin, x), step(copy.deepcopy(module), x), 0)


@pytest.mark.parametrize("train", [False, True])
def test_fx_traces_one_leaf_per_step(train):
    net = nn.Sequential(ConvBNReLU(3, 4), BasicBlock(4, 4), BNReLU(4)).double().train(train)
    graph = torch.fx.symbolic_trace(copy.deepcopy(net))
    assert [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"] == ["fused_bn_act"] * 4
    x = double(2, 3, 6, 6)
    assert_same({"y": graph(x)}, {"y": net(x)}, 0)
    buffers = dict(graph.named_buffers())  # those that the graph reads
    assert_same(buffers, {name: net.get_buffer(name) for name in buffers}, 0)


def test_fx_traces_add_relu():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.end = AddReLU()

        def forward(self, x, r):
            return self.end(x, r)

    graph = torch.fx.symbolic_trace(Add())
    assert [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"] == ["fused_add_relu"]
    x, r = double(2, 3), double(2, 3)
    torch.testing.assert_close(graph(x, r), torch.relu(x + r))


@pytest.mark.parametrize("train", [False, True])
def test_compiles_in_one_graph(train):
    net = scramble(nn.Sequential(ConvBNReLU(3, 4), BasicBlock(4, 4))).double().train(train)
    compiled, x = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager"), double(2, 3, 6, 6)
    torch.testing.assert_close(compiled(x), net(x))


def test_norm_act_takes_any_modules():
    x = double(2, 4, 3, 3)
    torch.testing.assert_close(norm_act(x, nn.Identity(), nn.SiLU(), x), torch.nn.functional.silu(2 * x))
    bn = nn.BatchNorm2d(4).double()
    torch.testing.assert_close(norm_act(x, bn), copy.deepcopy(bn)(x))
