"""Frozen models where models are used: Hugging Face pipelines, DataLoader workers, threads, inference mode, copies."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastres
from fastres import models
from fastres.inference import FrozenModel, freeze, gate
from fastres.inference.json_values import FrozenFileError
from fastres.inference.likeness import give_likeness, likeness_from_json


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = models.cifar_resnet(8, num_classes=5)
    for _ in range(3):
        made(torch.randn(8, 3, 16, 16))
    return made.eval()


@pytest.fixture(scope="module")
def frozen(net):
    return freeze(net, torch.randn(2, 3, 16, 16), tune=False)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    """(a small ResNet of transformers, an image processor made in code, two photographs)."""
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("sklearn.datasets")
    images = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5, layer_type="basic"
    )
    config.id2label = dict(enumerate(["temple", "flower", "cat", "dog", "bus"]))
    made = transformers.ResNetForImageClassification(config)
    made(torch.randn(8, 3, 64, 64))  # in training mode: statistics that are not the initial ones
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    return made.eval(), processor, [images.fromarray(photo) for photo in datasets.load_sample_images().images]


@pytest.fixture
def said():
    """Whatever transformers logs at WARNING or above; Python's warnings are errors meanwhile."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("transformers")
    log.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield records
    log.removeHandler(handler)


@pytest.mark.parametrize("example", ["tensor", "mapping"])
def test_image_classification_pipeline_gives_the_source_s_answers(hub, said, example):
    from transformers import pipeline

    source, processor, photos = hub
    images = torch.randn(2, 3, 64, 64)
    fast = freeze(source, images if example == "tensor" else {"pixel_values": images}, tune=False)
    pipes = [pipeline("image-classification", model=model, image_processor=processor) for model in (source, fast)]
    assert repr(pipes[0]) == repr(pipes[1])
    wanted = pipes[0](photos * 2)
    assert {answer["label"] for answer in wanted[0]} == set(source.config.id2label.values())
    for options in ({}, {"batch_size": 2}, {"batch_size": 3}, {"batch_size": 2, "num_workers": 2}):
        for got, want in zip(pipes[1](photos * 2, **options), wanted, strict=True):
            assert [answer["label"] for answer in got] == [answer["label"] for answer in want]
            for mine, theirs in zip(got, want, strict=True):
                assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)
    assert pipes[1](photos[0], top_k=1)[0]["label"] == wanted[0][0]["label"]
    assert said == []


def test_a_pipeline_of_a_bfloat16_network(hub, said):
    from transformers import pipeline

    source, processor, photos = hub
    fast = freeze(source, torch.randn(2, 3, 64, 64), dtype=torch.bfloat16, tune=False)
    pipe = pipeline("image-classification", model=fast, image_processor=processor)
    assert pipe.dtype is torch.bfloat16 and pipe.device == torch.device("cpu")
    want = pipeline("image-classification", model=source, image_processor=processor)(photos[0])
    got = {answer["label"]: answer["score"] for answer in pipe(photos[0])}
    assert all(got[answer["label"]] == pytest.approx(answer["score"], abs=0.02) for answer in want)
    assert said == []


def test_outputs_are_the_source_s(hub):
    source = hub[0]
    fast = freeze(source, torch.randn(2, 3, 64, 64), tune=False)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        want = source(x)
    for got in (fast(x), fast(pixel_values=x), fast(x, return_dict=True)):
        assert type(got) is type(want) and list(got) == list(want)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    (logits,) = fast(x, return_dict=False)
    torch.testing.assert_close(logits, want.logits, rtol=1e-4, atol=1e-5)
    hidden = fast(x, output_hidden_states=True).hidden_states
    with torch.no_grad():
        assert [t.shape for t in hidden] == [t.shape for t in source(x, output_hidden_states=True).hidden_states]


def test_a_frozen_transformers_model_looks_like_one_and_is_a_frozen_model(hub):
    source = hub[0]
    fast = freeze(source, torch.randn(2, 3, 64, 64), tune=False)
    assert isinstance(fast, FrozenModel) and type(fast).__name__ == "ResNetForImageClassification"
    assert type(fast) is type(freeze(source, torch.randn(2, 3, 64, 64), tune=False, verify=False))
    assert fast.main_input_name == "pixel_values" and fast.name_or_path == source.name_or_path
    assert not fast.can_generate() and fast.device == source.device and fast.dtype == source.dtype
    assert repr(fast).startswith("FrozenModel of ResNetForImageClassification(")
    labels = dict(source.config.id2label)
    try:
        source.config.id2label[0] = "changed"
        assert fast.config.id2label == labels and type(fast.config) is type(source.config)  # a snapshot
    finally:
        source.config.id2label = labels
    x = torch.randn(2, 3, 64, 64)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin) is type(fast) and twin.config.id2label == labels and twin.config is not fast.config
        assert torch.equal(twin(x).logits, fast(x).logits)


def test_a_saved_one_does_too(hub, said, tmp_path):
    from transformers import pipeline

    source, processor, photos = hub
    fast = freeze(source, torch.randn(2, 3, 64, 64), tune=False)
    fast.save(tmp_path / "net.fastres")
    loaded = fastres.load(tmp_path / "net.fastres")
    assert type(loaded) is type(fast) and loaded.main_input_name == "pixel_values" and loaded.num_labels == 5
    assert type(loaded.config) is type(fast.config) and loaded.config.to_dict() == fast.config.to_dict()
    answers = [
        pipeline("image-classification", model=model, image_processor=processor)(photos, batch_size=2)
        for model in (fast, loaded)
    ]
    assert answers[0] == answers[1] and said == []
    loaded.save(tmp_path / "again.fastres")
    assert fastres.load(tmp_path / "again.fastres").config.id2label == source.config.id2label


@pytest.mark.parametrize(
    ("likeness", "message"),
    [
        (3, "does not say what its source was like"),
        ({"attributes": {}, "class": "no name"}, "are no names of attributes and a class"),
        ({"attributes": {3: 4}}, "are no names of attributes and a class"),
        ({"attributes": {}, "config": ["resnet"]}, "is no configuration"),
        (
            {"attributes": {}, "config": ["no such network", {}]},
            "'no such network' of transformers, cannot be made here",
        ),
        ({"attributes": {}, "config": ["resnet", {"layer_type": "os.system"}]}, "cannot be made here"),
    ],
)
def test_a_made_up_likeness_is_refused(likeness, message):
    pytest.importorskip("transformers")
    with pytest.raises(FrozenFileError, match=message):
        likeness_from_json(likeness)


def test_a_made_up_likeness_takes_the_place_of_nothing(frozen):
    twin = copy.deepcopy(frozen)
    names = ("forward", "save", "module", "_recipe", "__class__", "report", "new")
    give_likeness(twin, likeness_from_json({"attributes": dict.fromkeys(names, 1), "class": "FrozenModel"}))
    assert twin.new == 1 and twin._likeness == ("new",) and isinstance(twin, FrozenModel)
    assert torch.equal(twin(torch.ones(1, 3, 16, 16)), frozen(torch.ones(1, 3, 16, 16)))


def test_transforms_of_timm_are_those_of_the_source(tmp_path):
    timm = pytest.importorskip("timm")
    source = timm.create_model("resnet10t", num_classes=5).eval()
    fast = freeze(source, torch.randn(2, 3, 32, 32), tune=False)
    assert timm.data.resolve_model_data_config(fast) == timm.data.resolve_model_data_config(source)
    assert fast.num_classes == 5 and fast.pretrained_cfg is not source.pretrained_cfg
    fast.save(tmp_path / "net.fastres")
    loaded = fastres.load(tmp_path / "net.fastres")
    assert loaded.pretrained_cfg == source.pretrained_cfg and type(loaded) is FrozenModel


def test_plain_data_of_the_source_never_takes_the_place_of_ours():
    class Names(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.report, self.dtype, self.device, self.training_steps = "mine", "mine", "mine", 7
            self.sizes, self.table, self._hidden, self.object = [1, (2, 3)], {"a": [1]}, 1, object()
            self.function, self.deep = len, [object()]

    source = Names().eval()
    fast = freeze(source, torch.randn(2, 3, 8, 8), tune=False)
    assert fast.report.folded == 1 and fast.dtype is torch.float32 and fast.device == torch.device("cpu")
    assert fast.training_steps == 7 and fast.sizes == [1, (2, 3)] and fast.table == {"a": [1]}
    assert fast.table is not source.table
    assert not any(hasattr(fast, name) for name in ("_hidden", "object", "function", "deep"))
    assert type(fast) is FrozenModel


# ---- DataLoader ------------------------------------------------------------------------------------------------------


class Features(Dataset):
    """Images, run through a network where the DataLoader asks for them."""

    def __init__(self, network: nn.Module, images: torch.Tensor) -> None:
        self.network, self.images = network, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.network(self.images[index : index + 1])[0]


class Collate:
    """Stacks images and runs them at once."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self.network(torch.stack(images))


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("fork", "dataset"),
        ("fork", "collate"),
        ("spawn", "collate"),
        pytest.param("spawn", "dataset", marks=pytest.mark.full),
    ],
)
def test_in_the_workers_of_a_dataloader(net, frozen, method, where):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    images = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        want = net(images)
    options = {"batch_size": 3, "num_workers": 2, "multiprocessing_context": method, "timeout": 240}
    if where == "dataset":
        loader = DataLoader(Features(frozen, images), **options)
    else:
        loader = DataLoader(images, collate_fn=Collate(frozen), **options)
    got = list(loader)
    assert [len(part) for part in got] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(images), want, rtol=1e-4, atol=1e-5)  # and here, as before


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_a_pickle_runs_without_its_source_and_says_what_it_cannot(frozen, net, tmp_path):
    x = torch.randn(3, 3, 16, 16)
    torch.save(frozen, tmp_path / "frozen.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = torch.load(tmp_path / "frozen.pt", weights_only=False)
        twin = copy.deepcopy(frozen)
    assert torch.equal(loaded(x), frozen(x)) and torch.equal(loaded(x[:0]), frozen(x[:0]))
    assert loaded.report.folded == 7 and not loaded.training
    other = torch.randn(2, 3, 12, 12)
    with pytest.raises(RuntimeError, match=r"input: got \[2, 3, 12, 12\].*captured for \[N, 3, 16, 16\].*is gone"):
        loaded(other)
    with torch.no_grad():
        torch.testing.assert_close(twin(other), net(other), rtol=1e-4, atol=1e-5)  # copies keep the source
    with torch.no_grad():
        for t in loaded.parameters():
            t.zero_()
    assert not loaded(x).any() and frozen(x).any()


# ---- threads ---------------------------------------------------------------------------------------------------------


def in_threads(work, count):
    """`work(i)` in `count` threads that start together; the first exception is raised here."""
    start, errors = threading.Barrier(count), []

    def run(i):
        try:
            start.wait(60)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for one another"
    if errors:
        raise errors[0]


@pytest.fixture
def switching():
    """Threads take turns much more often than they would."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("sizes", ["one size", "other sizes"])
@pytest.mark.parametrize(("capture", "tune"), [("graph", False), ("graph", True), ("modules", False)])
def test_eight_threads_get_the_bits_of_one(net, switching, capture, tune, sizes):
    first = freeze(net, torch.randn(2, 3, 16, 16), capture=capture, tune=tune)
    edges = [16] * 6 + ([16, 16] if sizes == "one size" else [12, 20])  # graphs of these two are made meanwhile
    inputs = [torch.randn(n + 1, 3, edge, edge) for n, edge in enumerate(edges)]
    single = copy.deepcopy(first)
    want = [single(x) for x in inputs]
    for turn in range(4):
        shared = copy.deepcopy(first)  # fresh: threads record its programs and pack its weights at once

        def work(i, shared=shared, turn=turn):
            for step in range(10):
                which = (i + step * turn) % 8
                with torch.inference_mode(i % 3 == 0):
                    assert torch.equal(shared(inputs[which]), want[which]), (turn, i, step, which)

        in_threads(work, 8)


def test_threads_freeze_while_others_run(net, frozen, switching):
    x = torch.randn(4, 3, 16, 16)
    want = frozen(x)
    done = threading.Event()

    def work(i):
        if i < 2:
            try:
                for _ in range(2):
                    made = freeze(net, torch.randn(2, 3, 8 + 4 * i, 16), tune=False, verify=False)
                    assert made.report.capture == "graph" and made.report.folded == 7
            finally:
                done.set()
        while not done.is_set():
            assert torch.equal(frozen(x), want)

    in_threads(work, 6)


def test_a_capture_waits_for_calls_and_calls_for_the_capture():
    order, inside, captured = [], threading.Event(), threading.Event()

    def work(i):
        if i == 0:
            with gate.Running(), gate.Running():
                inside.set()
                assert not captured.wait(0.3)
                order.append("call")
        elif i == 1:
            inside.wait(10)
            with gate.capturing(), gate.capturing(), gate.Running():
                captured.set()
                assert not gate.is_captured_elsewhere()
                order.append("capture")
                late.wait(0.3)
                order.append("captured")
        else:
            captured.wait(10)
            assert gate.is_captured_elsewhere()
            with gate.Running():
                late.set()
                order.append("late call")

    late = threading.Event()
    in_threads(work, 3)
    assert order == ["call", "capture", "captured", "late call"]
    assert not gate._running and gate._captor is None


def test_calls_that_each_need_a_capture_do_not_wait_for_one_another():
    both = threading.Barrier(4)

    def work(i):
        with gate.Running():
            both.wait(10)  # all four are inside
            with gate.capturing():
                pass
        with gate.Running():
            pass

    in_threads(work, 4)
    assert not gate._running and gate._captor is None


def test_a_child_process_finds_no_lock_taken():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    taken, over = threading.Event(), threading.Event()

    def hold():
        with gate.capturing():
            taken.set()
            over.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of newer Pythons, about forking with threads
        child = os.fork()
    if child == 0:
        with gate.Running(), gate.capturing():
            os._exit(17)
    over.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


# ---- inference mode --------------------------------------------------------------------------------------------------


def test_under_inference_mode(net, frozen):
    x = torch.randn(3, 3, 16, 16)
    shared = copy.deepcopy(frozen)
    with torch.inference_mode():
        inside = [shared(x.clone()) for _ in range(3)]  # modules, then a recording, then the program
        assert all(t.is_inference() for t in inside)
    outside = [shared(x) for _ in range(3)]
    assert all(torch.equal(t, frozen(x)) for t in inside + outside)
    assert not any(t.is_inference() or t.requires_grad for t in outside)
    head = nn.Linear(5, 2)
    head(outside[-1]).sum().backward()  # a plain tensor to whatever comes behind
    assert head.weight.grad is not None


def test_frozen_under_inference_mode_it_is_as_any(net):
    source = copy.deepcopy(net)
    with torch.inference_mode():
        fast = freeze(source, torch.randn(2, 3, 16, 16), tune=False)
        inside = fast(torch.ones(1, 3, 16, 16))
    assert torch.equal(fast(torch.ones(1, 3, 16, 16)), inside)
    assert not any(t.is_inference() for t in fast.state_dict().values())
    with torch.no_grad():
        source.fc.bias.add_(1)
    assert fast.is_stale()
    fast.refresh()
    torch.testing.assert_close(fast(torch.ones(1, 3, 16, 16)), inside + 1)
    x = torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        want = source(x)
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)  # captured in there
    torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)
