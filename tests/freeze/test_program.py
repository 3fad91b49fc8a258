"""Programs of frozen networks: the modules' bits, what a network must not do to have one, what ends one."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres.inference.program import Programs, _Recorder
from fastres.models import cifar_resnet
from swap_cases import scramble


def small():
    torch.manual_seed(0)
    return scramble(cifar_resnet(8)).eval()


def frozen(net=None, shape=(2, 3, 16, 16)):
    return fastres.freeze(
        small() if net is None else net, torch.randn(shape), verify=False, tune=False, capture="modules"
    )


def ran(model, *args, **kwargs):
    """(outputs, whether a program made them): no module runs then."""
    seen = []
    real = model.module.__class__.__call__

    def call(self, *a, **k):
        seen.append(self)
        return real(self, *a, **k)

    model.module.__class__.__call__ = call
    try:
        return model(*args, **kwargs), not seen
    finally:
        del model.module.__class__.__call__


def recorded(model):
    return next(found[0] for found in model._engine.programs._found.values() if found)


class Net(nn.Module):
    """A convolution, a BN, and what the test adds."""

    def __init__(self, end=lambda net, x, y: y):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.end = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), end
        self.register_buffer("calls", torch.zeros(()))
        self.eval()

    def forward(self, x, *args, **kwargs):
        return self.end(self, x, torch.relu(self.bn(self.conv(x))), *args, **kwargs)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_program_gives_the_modules_bits(dtype):
    model = fastres.freeze(small(), torch.randn(2, 3, 16, 16), dtype=dtype, verify=False, tune=False, capture="modules")
    assert model.report.program.endswith(" calls")
    for shape in ((2, 3, 16, 16), (5, 3, 16, 16), (1, 3, 24, 20), (2, 3, 16, 16)):
        for _ in range(3):
            x = torch.randn(shape)
            with torch.no_grad():
                wanted = model.module(model._prepare("", x))
            got, by_program = ran(model, x)
            assert torch.equal(got, wanted)
        assert by_program


def test_first_calls_of_a_shape_run_the_modules_and_the_example_is_ready():
    model = frozen()
    assert ran(model, torch.randn(2, 3, 16, 16))[1]
    assert [ran(model, torch.randn(3, 3, 16, 16))[1] for _ in range(4)] == [False, False, True, True]


def test_no_batch_is_kept_and_dead_tensors_are_let_go():
    model = frozen(nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(6)]).eval())
    program = recorded(model)
    text = program.__doc__
    assert text.count("del ") == 6, text
    assert not any(isinstance(v, torch.Tensor) and v.shape[:1] == (2,) for v in program.__globals__.values())


def test_recording_keeps_no_activation(monkeypatch):
    """A recording of a large batch takes the memory of a call, not that of all its activations together."""
    alive = []
    real = _Recorder.give_name

    def give_name(recorder, t):
        name = real(recorder, t)
        alive.append(len(recorder.names))
        return name

    monkeypatch.setattr(_Recorder, "give_name", give_name)
    model = frozen(nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(9)]).eval())
    assert recorded(model).__doc__.count("del ") == 9
    assert len(alive) >= 10 and max(alive) <= 3  # the input, what a call reads, what it makes


@pytest.mark.parametrize(
    ("end", "args"),
    [
        (lambda net, x, y: (y, {"a": y.mean(1), "b": [x, 3, None]}), ()),
        (lambda net, x, y: (x, net.conv.weight), ()),
        (lambda net, x, y: torch.cat([y, y.flip(0)]).split(1), ()),
        (lambda net, x, y: y.view(-1)[::2], ()),
        (lambda net, x, y: y.mul_(2).add_(y), ()),
        (lambda net, x, y: y.where(y > 0.5, float("-inf")), ()),
        (lambda net, x, y, twice: y + y if twice else y, (True,)),
    ],
)
def test_outputs_of_every_kind(end, args):
    x = torch.randn(2, 3, 8, 8)
    model = fastres.freeze(Net(end), (x, *args), verify=False, tune=False, capture="modules")
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            wanted = model.module(model._prepare("", x), *args)
        got, by_program = ran(model, x, *args)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        assert type(got) is type(wanted)
    assert by_program


def test_plain_arguments_are_part_of_the_signature():
    x = torch.randn(2, 3, 8, 8)
    model = fastres.freeze(Net(lambda net, x, y, k=1: y * k), x, verify=False, tune=False, capture="modules")
    base = model(x)
    for k in (1, 2, 2, 2, 3, 3, 3, True):
        assert torch.equal(model(x, k=k), base * k)


@pytest.mark.parametrize("channels_last", [True, False])
def test_both_layouts_have_programs(channels_last):
    model = frozen()
    model.use_channels_last(channels_last)
    model._engine.programs = Programs()
    for _ in range(3):
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            wanted = model.module(model._prepare("", x))
        got, by_program = ran(model, x)
        assert torch.equal(got, wanted)
    assert by_program, model.program


def test_nan_and_infinity_pass():
    model = frozen()
    x = torch.randn(2, 3, 16, 16)
    x[1, 0, 3, 3] = float("nan")
    for _ in range(3):
        y = model(x)
        assert y[1].isnan().all() and y[0].isfinite().all()


# ---- residuals written over ------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Blocks whose outputs are read again, or are views of one memory."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = scramble(cifar_resnet(8)), how
        self.eval()

    def forward(self, x):
        y = torch.relu(self.net.bn1(self.net.conv1(x)))
        a = self.net.layer1(y)
        if self.how == "kept":
            return y, a
        if self.how == "read later":
            return a + y
        if self.how == "a view":
            flat = y.flatten()
            return self.net.layer1(flat.view(y.shape)), flat.sum()
        return self.net.layer1(x.repeat(1, 6, 1, 1)[:, :16]), a


@pytest.mark.parametrize("how", ["kept", "read later", "a view", "slices"])
def test_a_residual_that_somebody_reads_is_not_written_over(how):
    torch.manual_seed(0)
    net = Pyramid(how)
    model = fastres.freeze(net, torch.randn(2, 3, 16, 16), verify=False, capture="modules")
    for _ in range(3):
        x = torch.randn(2, 3, 16, 16)
        before = x.clone()
        got, by_program = ran(model, x)
        with torch.no_grad():
            torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(x, before)
    assert by_program, model.program


def test_the_first_block_behind_a_pool_writes_over_its_residual():
    torch.manual_seed(0)
    net = scramble(fastres.models.resnet18(num_classes=4)).eval()
    model = fastres.freeze(net, torch.randn(2, 3, 64, 64), verify=False, capture="modules")
    program = recorded(model)
    calls = {name: str(f) for name, f in program.__globals__.items() if f" = {name}(" in program.__doc__}
    names = list(calls.values())
    if "mkldnn._convolution_pointwise.default" not in names:
        pytest.skip("oneDNN does not run the fused call on this machine")
    assert names.count("mkldnn._convolution_pointwise_.binary") >= 8
    assert "mkldnn._convolution_pointwise.binary" not in names


# ---- networks that have none -----------------------------------------------------------------------------------------


def reads_a_value(net, x, y):
    return y if float(y.sum()) > 0 else -y


def reads_memory(net, x, y):
    return y * float(x.numpy()[0, 0, 0, 0])


def draws(net, x, y):
    return F.dropout(y, 0.5, training=True)


def counts(net, x, y):
    net.calls.add_(1)
    return y * net.calls


def counts_through_a_view(net, x, y):
    net.calls.view(1).add_(1)
    return y


def counts_in_python(net, x, y):
    net.number = getattr(net, "number", 0) + 1
    return y * net.number


def finds(net, x, y):
    return y.nonzero()


def returns_an_object(net, x, y):
    return Answer(y)


class Answer:
    def __init__(self, y):
        self.y = y


@pytest.mark.parametrize(
    "end",
    [reads_a_value, reads_memory, draws, counts, counts_through_a_view, counts_in_python, finds, returns_an_object],
)
def test_networks_that_keep_running_their_modules(end):
    x = torch.randn(2, 3, 8, 8)
    model = fastres.freeze(Net(end), x, verify=False, tune=False, capture="modules")
    outputs = []
    for scale in (1, -1, 2, 3):
        got, by_program = ran(model, x * scale)
        outputs.append(got)
        assert not by_program
    assert model.program.startswith("none: it") or model.program.startswith("none: aten")
    if end in (counts, counts_through_a_view):
        assert "writes to a tensor that is not its own" in model.program
    if end is counts:
        assert [float(y.max() / outputs[0].max()) > 1 for y in outputs[1:]] == [True] * 3


# ---- what ends a program ---------------------------------------------------------------------------------------------


def write(model):
    model.module.conv1.weight.mul_(2)


def write_bias(model):
    model.module.fc.bias.add_(1)


def replace(model):
    model.module.fc.weight = nn.Parameter(torch.zeros_like(model.module.fc.weight))


def set_data(model):
    model.module.fc.weight.data = model.module.fc.weight.data * 2


def surgery(model):
    model.module.fc = nn.Identity()


def load(model):
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


def cast(model):
    model.double()


def hook(model):
    model.module.layer1.register_forward_hook(lambda module, args, y: y + 1)


def pre_hook(model):
    model.module.layer1[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


@pytest.mark.parametrize("change", [write, write_bias, replace, set_data, surgery, load, cast, hook, pre_hook])
def test_changes_are_followed(change):
    model, x = frozen(), torch.randn(2, 3, 16, 16)
    before, by_program = ran(model, x)
    assert by_program
    with torch.no_grad():
        change(model)
    for _ in range(4):
        x = torch.randn(2, 3, 16, 16)
        got = model(x)
        with torch.no_grad():
            wanted = model.module(model._prepare("", x))
        assert torch.equal(got, wanted)
        assert got.shape != before.shape or not torch.allclose(got.float(), before)


def test_hooks_fire_and_programs_come_back_when_they_go():
    model, x, fired = frozen(), torch.randn(2, 3, 16, 16), []
    handle = model.module.layer2.register_forward_hook(lambda *args: fired.append(1))
    model(x), model(x), model(x)
    assert len(fired) == 3
    handle.remove()
    assert [ran(model, x)[1] for _ in range(3)][-1]
    handle = nn.modules.module.register_module_forward_hook(lambda *args: fired.append(1))
    try:
        model(x)
    finally:
        handle.remove()
    assert len(fired) > 10


def test_refresh_takes_new_weights_in():
    net = small()
    model, x = frozen(net), torch.randn(2, 3, 16, 16)
    before = model(x)
    with torch.no_grad():
        net.fc.bias.add_(1)
    model.refresh()
    for _ in range(3):
        torch.testing.assert_close(model(x), before + 1)


# ---- copies, threads, modes ------------------------------------------------------------------------------------------


def test_copies_and_pickles_are_empty_and_work():
    model, x = frozen(), torch.randn(2, 3, 16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(twin._engine.programs) == 0 and len(model._engine.programs) == 1
        assert torch.equal(twin(x), model(x)) and torch.equal(twin(x), model(x)) and len(twin._engine.programs) == 1


def test_signatures_are_bounded():
    model = frozen()
    for n in range(1, 15):
        for _ in range(2):
            model(torch.randn(n, 3, 16, 16))
    assert len(model._engine.programs) <= 8


def test_several_threads_at_once():
    model = frozen()
    wrong = []

    def work(n):
        torch.manual_seed(n)
        for _ in range(6):
            x = torch.randn(n, 3, 16, 16)
            with torch.no_grad():
                if not torch.equal(model(x), model.module(model._prepare("", x))):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_autocast_is_not_written_down():
    x = torch.randn(2, 3, 16, 16)
    inside, outside = frozen(), frozen()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert inside(x).dtype is torch.bfloat16
            assert outside(x).dtype is torch.bfloat16
    wanted = outside.module(outside._prepare("", x)).detach()
    for model in (inside, outside):
        for _ in range(3):
            assert model(x).dtype is torch.float32
            torch.testing.assert_close(model(x), wanted)


def test_modes_see_the_operators_and_no_program():
    model, x = frozen(), torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(model(x), y)


def test_an_argument_that_is_no_key():
    programs = Programs()
    net = Net(lambda net, x, y, options: y * options["k"])

    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        for k in (1, 2, 3):
            assert torch.equal(programs.run(net, (x, {"k": k}), {}), net(x, {"k": k}))
            assert torch.equal(programs.run(net, (x,), {"options": {"k": torch.tensor(k)}}), net(x, {"k": k}))
