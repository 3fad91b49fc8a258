"""What a frozen model shows of its source: Hugging Face pipelines, timm's transforms, plain data, and files of it."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastres
from fastres.inference import FrozenModel
from fastres.inference.file.likeness import likeness_from_json
from fastres.inference.file.values import FrozenFileError
from fastres.inference.hub import give_likeness
from freeze_cases import cifar, freeze, images


@pytest.fixture(scope="module")
def hub():
    """(a small ResNet of transformers, an image processor made in code, two photographs)."""
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("sklearn.datasets")
    pillow = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5, layer_type="basic"
    )
    config.id2label = dict(enumerate(["temple", "flower", "cat", "dog", "bus"]))
    made = transformers.ResNetForImageClassification(config)
    made(torch.randn(8, 3, 64, 64))  # in training mode: statistics that are not the initial ones
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    return made.eval(), processor, [pillow.fromarray(photo) for photo in datasets.load_sample_images().images]


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
    x = images(2, 64)
    fast = freeze(source, x if example == "tensor" else {"pixel_values": x}, tune=False)
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
    fast = freeze(source, images(2, 64), dtype=torch.bfloat16, tune=False)
    pipe = pipeline("image-classification", model=fast, image_processor=processor)
    assert pipe.dtype is torch.bfloat16 and pipe.device == torch.device("cpu")
    want = pipeline("image-classification", model=source, image_processor=processor)(photos[0])
    got = {answer["label"]: answer["score"] for answer in pipe(photos[0])}
    assert all(got[answer["label"]] == pytest.approx(answer["score"], abs=0.02) for answer in want)
    assert said == []


def test_outputs_are_the_source_s(hub):
    source = hub[0]
    fast = freeze(source, images(2, 64), tune=False)
    x = images(3, 64)
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
    fast = freeze(source, images(2, 64), tune=False)
    assert isinstance(fast, FrozenModel) and type(fast).__name__ == "ResNetForImageClassification"
    assert type(fast) is type(freeze(source, images(2, 64), tune=False, verify=False))
    assert fast.main_input_name == "pixel_values" and fast.name_or_path == source.name_or_path
    assert not fast.can_generate() and fast.device == source.device and fast.dtype == source.dtype
    assert repr(fast).startswith("FrozenModel of ResNetForImageClassification(")
    labels = dict(source.config.id2label)
    try:
        source.config.id2label[0] = "changed"
        assert fast.config.id2label == labels and type(fast.config) is type(source.config)  # a snapshot
    finally:
        source.config.id2label = labels
    x = images(2, 64)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin) is type(fast) and twin.config.id2label == labels and twin.config is not fast.config
        assert torch.equal(twin(x).logits, fast(x).logits)


def test_a_saved_one_does_too(hub, said, tmp_path):
    from transformers import pipeline

    source, processor, photos = hub
    fast = freeze(source, images(2, 64), tune=False)
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


def test_a_made_up_likeness_takes_the_place_of_nothing():
    frozen = freeze(cifar(), images(2, 16), tune=False, verify=False)
    twin = copy.deepcopy(frozen)
    names = ("forward", "save", "weights", "_network", "__class__", "report", "new")
    give_likeness(twin, likeness_from_json({"attributes": dict.fromkeys(names, 1), "class": "FrozenModel"}))
    assert twin.new == 1 and twin._likeness == ("new",) and isinstance(twin, FrozenModel)
    assert torch.equal(twin(torch.ones(1, 3, 16, 16)), frozen(torch.ones(1, 3, 16, 16)))


def test_transforms_of_timm_are_those_of_the_source(tmp_path):
    timm = pytest.importorskip("timm")
    source = timm.create_model("resnet10t", num_classes=5).eval()
    fast = freeze(source, images(2, 32), tune=False)
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
    fast = freeze(source, images(), tune=False)
    assert fast.report.folded == 1 and fast.dtype is torch.float32 and fast.device == torch.device("cpu")
    assert fast.training_steps == 7 and fast.sizes == [1, (2, 3)] and fast.table == {"a": [1]}
    assert fast.table is not source.table
    assert not any(hasattr(fast, name) for name in ("_hidden", "object", "function", "deep"))
    assert type(fast) is FrozenModel
