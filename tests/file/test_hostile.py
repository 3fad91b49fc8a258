"""Files that are not what they say: damaged, foreign, older, newer, or made up by somebody who can compute a checksum.

Each gives one FrozenFileError that names the file. A file that was changed and still loads calls operators of the
allow-list and nothing else, and ends in an answer or in an ordinary error.
"""

import copy
import json
import os
import pickle
import random
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

import fastres
from fastres.graph.steps import Slot
from fastres.inference.file import store, values
from fastres.inference.file.values import FrozenFileError
from file_cases import JUNK, content, harmless, refused


def test_the_base_loads(change, real):
    loaded, same = fastres.load(change()), fastres.load(real)
    x = torch.randn(3, 3, 6, 6)
    out = loaded(x)
    assert out["rest"] == [6] and torch.equal(out["out"], same(x)["out"]) and out["out"].shape == (3, 2)
    assert loaded.report.verification.passed and len(loaded.state_dict()) == 9
    assert loaded.size == 6 and loaded.names == ["a"]


# ---- foreign and damaged files


def header(data, body=b""):
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, *offsets):
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


NO_SAFETENSORS = "no safetensors file, or a damaged one"
FOREIGN = {
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "short": (lambda p: p.write_bytes(b"abc"), NO_SAFETENSORS),
    "text": (lambda p: p.write_text("hello, world, this is text"), NO_SAFETENSORS),
    "folder": (lambda p: p.mkdir(), "folder"),
    "pipe": (lambda p: os.mkfifo(p), "no regular file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "torch.save": (lambda p: torch.save({"a": torch.ones(1)}, p), "torch.save"),
    "safetensors": (lambda p: save_file({"a": torch.ones(1)}, p), "format is None, not 'fastres.frozen'"),
    "of PyTorch": (lambda p: save_file({"a": torch.ones(1)}, p, {"format": "pt"}), "format is 'pt'"),
    "huge header": (lambda p: p.write_bytes(struct.pack("<Q", 2**63) + b"{}"), NO_SAFETENSORS),
    "long header": (lambda p: p.write_bytes(struct.pack("<Q", 50_000_000) + b"{}" * 99), NO_SAFETENSORS),
    "no JSON": (lambda p: p.write_bytes(header(b"\xff\xfe{}")), NO_SAFETENSORS),
    "deep": (lambda p: p.write_bytes(header(b'{"a":' * 100_000)), NO_SAFETENSORS),
    "overlap": (lambda p: p.write_bytes(header({n: entry([1], 0, 4) for n in "ab"}, b"1234")), NO_SAFETENSORS),
    "overflow": (lambda p: p.write_bytes(header({"a": entry([2**62, 8], 0, 0)})), NO_SAFETENSORS),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(tmp_path, make):
    path = tmp_path / "foreign"
    make[0](path)
    refused(path, make[1])
    assert os.listdir(tmp_path) == ["foreign"]


def test_missing_files_and_odd_arguments(tmp_path, real):
    with pytest.raises(FileNotFoundError, match="nothing"):
        fastres.load(tmp_path / "nothing")
    for path in (None, 3.5):
        with pytest.raises(TypeError):
            fastres.load(path)
    with pytest.raises(RuntimeError):
        fastres.load(real, device="nothing")


def test_versions(change):
    reads = "of the format, written by fastres '9.9'; this fastres reads 3 alone"
    for version in "12":
        refused(
            change(version=version, fastres="9.9"), f"version '{version}' {reads}: freeze the model again and save it"
        )
    refused(change(version="4", fastres="9.9", later="x"), f"version '4' {reads}: upgrade fastres")
    for version in ("0", "-1", "2.0", "", "one", "²", "9" * 30):
        refused(change(version=version), "version")
    refused(change(later="x"), "metadata")
    refused(change(format="fastres"), "no frozen network")


def test_every_part_is_in_the_checksum(real, change):
    meta, tensors = content(real)
    bias, weight = tensors["conv.bias"], tensors["conv.weight"]
    others = [{"conv.bias": bias + 1e-7}, {"conv.bias": bias.half()}, {"conv.weight": weight.reshape(4, 27, 1, 1)}]
    others += [{"conv.bias": tensors["norm.bias"], "norm.bias": bias}, {"extra": bias}]
    for other in others:
        refused(change(lambda _, t, other=other: t.update(other), sha256=meta["sha256"]), "damaged, or was changed")
    refused(change(lambda _, t: t.pop("fc.bias"), sha256=meta["sha256"]), "damaged, or was changed")
    for key in ("fastres", "torch"):
        refused(change(**{key: "0", "sha256": meta["sha256"]}), "damaged, or was changed")


def test_any_change_of_the_bytes_is_found(real, tmp_path):
    """A file with flipped, cut, doubled or inserted bytes is refused, or is the same network: blanks in its header."""
    data, path = real.read_bytes(), tmp_path / "damaged"
    want = fastres.load(real).state_dict()
    draw, same = random.Random(0), 0
    for turn in range(400):
        at, length = draw.randrange(len(data)), draw.choice([1, 1, 2, 8, 64])
        noise = draw.randbytes(length)
        damaged = [
            data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
            data[:at] + noise + data[at + length :],
            data[:at],
            data[:at] + noise + data[at:],
            data + noise,
            data[:at] + data[at + length :],
        ][turn % 6]
        path.write_bytes(damaged)
        if harmless(path):
            same, got = same + 1, fastres.load(path).state_dict()
            assert len(damaged) == len(data) and all(torch.equal(got[n], want[n]) for n in want)
    assert same < 10


DEEP = ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 900 + "]" * 900]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "JSON is damaged") for text in (lambda t: t[:-1], lambda t: "", lambda t: t + t)),
        *((text, "describes no network") for text in (lambda t: "null", lambda t: "[]")),
        (lambda t: t.replace('"batch":2', '"batch":' + "9" * 6000), "cannot be built: ValueError"),
        (lambda t: t.replace('"batch":2', '"batch":1e999'), "batch: inf is no int"),
        (lambda t: t.replace('"batch":2', '"batch":2,"batch":2'), "twice"),
        *[(lambda t, deep=deep: t.replace('"batch":2', f'"batch":{deep}'), "deep") for deep in DEEP],
        (lambda t: t.replace('"outputs":', f'"outputs":{DEEP[2]},"x":'), "deep"),
        (lambda t: t.replace('"call":', '"call":' + '{"tuple":[' * 200 + "1" + "]}" * 200 + ',"x":'), "deep"),
    ],
    ids=range(13),
)
def test_json(change, text, words):
    refused(change(text=text), words)


# ---- tensors


def test_tensors_that_are_not_the_graph_s(change):
    words = "its tensors are not the constants of its graph"
    refused(change(lambda d, t: t.pop("conv.bias")), words)
    refused(change(lambda d, t: t.update(extra=torch.ones(1))), words)
    refused(change(lambda d, t: d["constants"].append("conv.bias")))
    for name in (3, "", ".", "a..b", "fc", "fc.weight.x", "a." * 99 + "b", "forward", "__class__", "x" * 2000):

        def rename(document, tensors, name=name):
            document["constants"][2] = name
            tensors[str(name)] = tensors.pop("part.scale")

        assert name in ("forward", "x" * 2000) or not harmless(change(rename)), name

    def unused(document, tensors):
        document["steps"][5]["args"][1] = 2.0

    refused(change(unused), "constants that its graph does not use")


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "norm.weight", "norm.var", "part.scale", "fc.weight"])
def test_tensors_of_other_shapes_and_dtypes(change, name):
    """An ordinary error of the call, or an answer where the shape fits."""
    shapes = [(), (1,), (3,), (4, 1), (4, 3, 3), (0, 3, 3, 3), (4, 3, 0, 3), (5, 3, 3, 3), (4, 4, 3, 3), (2, 4, 1)]
    others = [torch.ones(shape) for shape in shapes]
    others += [torch.ones(4, 3, 3, 3, dtype=dtype) for dtype in (torch.int32, torch.float64, torch.float16, torch.bool)]
    for other in others:
        assert harmless(change(lambda d, t, other=other: t.update({name: other})))


def test_dtypes_that_no_tensor_has(change, monkeypatch):
    flags = torch.tensor([1, 2], dtype=torch.uint8).view(torch.bool)
    refused(change(lambda d, t: t.update({"part.scale": flags})), "neither true nor false")
    monkeypatch.setitem(store._SAFETENSORS, torch.complex64, "C64")  # as another writer of safetensors has it
    refused(change(lambda d, t: t.update({"part.scale": torch.ones(3, dtype=torch.complex64)})), "complex64, none of")


def test_devices_that_are_not_there(change):
    if torch.cuda.is_available():
        pytest.skip("it is there")

    def edit(document, tensors):
        document["device"] = {"device": "cuda:0"}
        args, kwargs = [{"slot": 15}, {"device": "cuda"}], {"dtype": {"dtype": "float32"}}
        document["steps"][6].update(operator="aten.to.device", args=args, kwargs=kwargs)

    path = change(edit)
    refused(path, r"for cuda:0, which is not there; device='cpu' loads it here")
    loaded = fastres.load(path, device="cpu")  # what was on that device is on this one
    assert loaded.graph.steps[6].args[1].type == "cpu" and loaded(torch.ones(2, 3, 6, 6))["rest"] == [4]
    with pytest.raises(FrozenFileError, match="for cuda:3, which is not there: "):
        fastres.load(path, device="cuda:3")


# ---- at random, and large


def places(data, at=()):
    """The paths of every value in a document."""
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def value_at(data, at):
    for key in at:
        data = data[key]
    return data


def test_any_change_of_the_document_is_harmless(change, real):
    """Somebody moves, swaps, removes and adds parts of it and computes the checksum."""
    base = json.loads(content(real)[0]["model"])
    draw, loaded, turns, begin = random.Random(1), 0, 0, time.process_time()
    while turns < 300 and time.process_time() - begin < 20:
        turns += 1
        document = copy.deepcopy(base)
        spots = [at for at in places(document) if at]
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            at, other = draw.choice(spots), draw.choice(spots)
            try:
                parent, key, action = value_at(document, at[:-1]), at[-1], draw.randrange(4)
                if action < 2:
                    parent[key] = copy.deepcopy(draw.choice(JUNK) if action else value_at(base, other))
                elif action == 2:
                    del parent[key]
                elif isinstance(parent, list):
                    parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        loaded += harmless(change(text=lambda _, document=document: json.dumps(document)))
    assert turns > 100 and 10 < loaded < turns / 2


def test_large_graphs_are_refused_or_loaded_in_time(change):
    def repeat(count):
        row = {"operator": "aten.relu.default", "args": [{"slot": 0}], "kwargs": {}, "name": ""}
        return lambda document, tensors: document["steps"].extend([row] * count)

    begin = time.process_time()
    refused(change(repeat(200_000)), "no list of at most 50000")
    fastres.load(change(repeat(40_000)))
    assert time.process_time() - begin < 30


def test_values_go_there_and_back():
    plain = [None, True, -(2**63), 2**70, 0.1, -0.0, 5e-324, float("inf"), "é\n\ud800", [], [[1]], (), (1, (2,)), {}]
    plain += [{"a": 1, 2: (3,), None: [], (1, 2): 3}, slice(None, 2, -1), torch.float16, torch.strided, Slot(3)]
    plain += [torch.device("cuda", 1), torch.channels_last, torch.Size([1, 2]), {"tuple": [1]}, {"slot": "x"}]
    text = values.dump({"value": values.Values().encode(plain)})
    back = values.Values().decode(values.parse(text)["value"])
    assert back == plain and str(back[5]) == "-0.0" and [type(v) for v in back] == [type(v) for v in plain]
    for odd in (1j, b"x", {1}, object(), int, float, range(3), json, torch.ones(1), torch.complex64):
        with pytest.raises(FrozenFileError, match="no plain value"):
            values.Values().encode(odd)
