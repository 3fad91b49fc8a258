"""Files that are not what they say: damaged, foreign, newer, or made up by somebody who can compute a checksum.

Each gives one FrozenFileError that names the file, and runs nothing that the file says. A file that was changed and
still loads has only plain calls in the code that torch.fx writes for it.
"""

import ast
import builtins
import collections
import copy
import dataclasses
import json
import keyword
import os
import pickle
import random
import re
import struct
import sys
import time

import pytest
import torch
from fastres.inference.conv import FrozenConv
from fastres.inference.json_values import FrozenFileError
from fastres.inference.leaves import FrozenNorm, PoolLinear
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx, nn
from torch.utils._pytree import tree_structure, tree_unflatten

import fastres
from fastres.inference import json_model, json_ops, json_specs, json_values, store
from fastres.inference.plan import Plan
from fastres.inference.report import FreezeReport, FreezeRow
from fastres.verify.verdict import Row, Verification

CANARY = "__import__('builtins').__dict__.__setitem__('pwned', 1)"


def network():
    """x -> conv -> norm -> * scale -> fc; and the number of images, doubled."""
    torch.manual_seed(0)
    root, graph = nn.Module(), fx.Graph()
    root.conv = FrozenConv.of(torch.randn(4, 3, 3, 3), torch.randn(4), (1, 1), (1, 1), (1, 1), 1, "relu")
    values = {name: torch.rand(4) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    root.norm = FrozenNorm(values, 1e-5, "relu")
    root.fc = PoolLinear.of(torch.randn(2, 4), torch.randn(2))
    root.part = nn.Module()
    root.part.register_buffer("scale", torch.rand(1, 4, 1, 1))
    x = graph.placeholder("x")
    n = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    double = graph.call_function(json_ops.PYTHON["operator.mul"][0], (n, 2))
    y = graph.call_module("norm", (graph.call_module("conv", (x,)),))
    scale = graph.create_node("get_attr", "part.scale", name="scale")
    y = graph.create_node("call_function", torch.ops.aten.mul.Tensor, (y, scale), name="scaled")
    kwargs = {"memory_format": torch.contiguous_format}
    y = graph.create_node("call_function", torch.ops.aten.clone.default, (y,), kwargs, name="copied")
    graph.output((graph.call_module("fc", (y,)), double))
    return fx.GraphModule(root, graph).eval()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A file that is fine."""
    path = tmp_path_factory.mktemp("hostile") / "real"
    row = FreezeRow("conv", "conv", "conv + relu", "NO_NORM", "none", ("relu",))
    judged = Verification((Row("out", "output", (2,), "float32", *(0.0,) * 6, 1.0, True),), "float32", False, False)
    store.write(
        path,
        json_model.Stored(
            module=network(),
            signature=[("x", json_specs.inspect.Parameter.POSITIONAL_OR_KEYWORD, json_specs.inspect.Parameter.empty)],
            tree=tree_structure(((0,), {})),
            plain=(),
            inputs=[(("s0", 3, 6, 6), torch.float32)],
            outputs=tree_structure({"out": 0, "rest": [0]}),
            batch=2,
            dtype=torch.float32,
            plan=Plan(),
            device=torch.device("cpu"),
            report=FreezeReport("Net", "float32", "cpu", [row], verification=judged),
            likeness={"likeness": json_values.encode({"attributes": {"size": 6, "names": ["a"]}})},
        ),
    )
    return path


@pytest.fixture(scope="module")
def content(real):
    with safe_open(real, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def forge(content, tmp_path):
    """Writes a file with another document, other tensors or metadata, and the checksum that goes with them."""

    def write(edit=lambda document, tensors: None, text=None, **metadata):
        meta, tensors = dict(content[0]), dict(content[1])
        document = json.loads(meta["model"])
        edit(document, tensors)
        meta |= {"model": json.dumps(document) if text is None else text(meta["model"])} | metadata
        digest = store._digest(meta, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
        for name in sorted(tensors):
            store._update(digest, tensors[name].contiguous())
        path = tmp_path / "forged"
        store._write(os.fspath(path), tensors, meta | {"sha256": digest.hexdigest()} | metadata)
        return path

    yield write
    assert not hasattr(builtins, "pwned")


def refused(path, words=""):
    """The error of loading this file, as it must be."""
    with pytest.raises(FrozenFileError) as caught:
        fastres.load(path)
    text = str(caught.value)
    start = f"path: {os.fspath(path)!r}: "
    assert text.startswith(start) and len(text) < 700 and "\n" not in text[len(start) :], text
    assert re.search(words, text[len(start) :]), text


def assert_harmless(module):
    """The code that torch.fx wrote holds calls, literals, names and arithmetic; no name that it was not given."""
    tree = ast.parse(module.code)
    names = {node.name for node in module.graph.nodes} | {"self", "torch", "inf", "nan", "device", "slice", "Tensor"}
    for node in ast.walk(tree):
        assert not isinstance(
            node,
            ast.Import | ast.ImportFrom | ast.Lambda | ast.ClassDef | ast.Delete | ast.While | ast.For | ast.Global,
        )
        if isinstance(node, ast.Name):
            assert node.id in names or node.id.startswith(("math_", "_operator_", "operator_")), node.id
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("__") or f"aten::{node.attr}" in json_ops._PRIVATE, node.attr
        if isinstance(node, ast.FunctionDef):
            assert node.name == "forward"


def node(document, name):
    return next(row for row in document["graph"]["nodes"] if row["name"] == name)


def test_the_base_loads(forge, content):
    loaded = fastres.load(forge())
    assert_harmless(loaded.module)
    x = torch.randn(3, 3, 6, 6)
    out = loaded(x)
    assert out["rest"] == [6] and torch.equal(out["out"], network()(x)[0])
    assert loaded.report.verification.passed and len(content[1]) == 9
    assert loaded.size == 6 and loaded.names == ["a"]


# ---- foreign and damaged files


def header(data, body=b""):
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + body


FOREIGN = {
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "short": (lambda p: p.write_bytes(b"abc"), "no safetensors file, or a damaged one"),
    "text": (lambda p: p.write_text("hello, world, this is text"), "no safetensors file"),
    "folder": (lambda p: p.mkdir(), "folder"),
    "pipe": (lambda p: os.mkfifo(p), "no regular file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "torch.save": (lambda p: torch.save({"a": torch.ones(1)}, p), "torch.save"),
    "safetensors": (lambda p: save_file({"a": torch.ones(1)}, p), "format is None, not 'fastres.frozen'"),
    "of PyTorch": (lambda p: save_file({"a": torch.ones(1)}, p, {"format": "pt"}), "format is 'pt'"),
    "huge header": (lambda p: p.write_bytes(struct.pack("<Q", 2**63) + b"{}"), "no safetensors file"),
    "long header": (lambda p: p.write_bytes(struct.pack("<Q", 50_000_000) + b"{}" * 99), "no safetensors file"),
    "no JSON": (lambda p: p.write_bytes(header(b"\xff\xfe{}")), "no safetensors file"),
    "deep": (lambda p: p.write_bytes(header(b'{"a":' * 100_000)), "no safetensors file"),
    "overlap": (
        lambda p: p.write_bytes(
            header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"1234")
        ),
        "no safetensors file",
    ),
    "overflow": (
        lambda p: p.write_bytes(header({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}})),
        "no safetensors file",
    ),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(tmp_path, make):
    path = tmp_path / "foreign"
    if make[1] == "no regular file" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    make[0](path)
    refused(path, make[1])
    assert os.listdir(tmp_path) == ["foreign"]


def test_missing_files_and_odd_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        fastres.load(tmp_path / "nothing")
    for path in (None, 3.5):
        with pytest.raises(TypeError):
            fastres.load(path)


def test_versions(forge):
    words = r"version 2 of the format, written by fastres '9.9'; this fastres reads up to 1: upgrade fastres"
    refused(forge(version="2", fastres="9.9", later="x"), words)
    for version in ("0", "-1", "1.0", "", "one", "²", "9" * 30):
        refused(forge(version=version), "version")
    refused(forge(later="x"), "metadata")
    refused(forge(format="fastres"), "no frozen network")


def test_every_part_is_checked(content, forge, tmp_path):
    meta, tensors = content
    for key in ("fastres", "torch", "sha256"):
        altered = meta | {key: meta[key][:-1] + ("0" if meta[key][-1] != "0" else "1")}
        store._write(os.fspath(tmp_path / "a"), tensors, altered)
        refused(tmp_path / "a", "damaged, or was changed after it was written")
    shape = tensors["conv.weight"].shape
    for name, t in (
        ("conv.bias", tensors["conv.bias"] + 1e-7),
        ("conv.bias", tensors["conv.bias"].half()),
        ("conv.weight", tensors["conv.weight"].reshape(shape[0], -1, *shape[3:], 1)),
    ):
        store._write(os.fspath(tmp_path / "a"), tensors | {name: t}, meta)
        refused(tmp_path / "a", "damaged, or was changed")
    swapped = {"conv.bias": tensors["fc.bias"], "fc.bias": tensors["conv.bias"]}
    store._write(os.fspath(tmp_path / "a"), tensors | swapped, meta)
    refused(tmp_path / "a", "damaged, or was changed")
    store._write(os.fspath(tmp_path / "a"), {n: t for n, t in tensors.items() if n != "fc.bias"}, meta)
    refused(tmp_path / "a", "damaged, or was changed")


# ---- names that would be code


def rename(document, old, new):
    """Everywhere, so that nothing but the name itself is wrong."""

    def walk(data):
        if isinstance(data, list):
            return [walk(v) for v in data]
        if isinstance(data, dict):
            return {
                k: new if k in ("node", "name", "target", "data") and v == old else walk(v) for k, v in data.items()
            }
        return data

    document["graph"] = walk(document["graph"])


NAMES = [
    *(
        "",
        "a b",
        "a;b",
        "a\nb",
        "a.b",
        "1a",
        "a-b",
        "a\\",
        "a'",
        'a"',
        "a#",
        "a=1",
        "a:int",
        "*a",
        "(a)",
        "é",
        "ａ",
        "ª",
    ),
    *(
        "class",
        "None",
        "self",
        "lambda",
        "print",
        "__import__",
        "__debug__",
        "exec",
        "torch",
        "inf",
        "device",
        "pytree",
    ),
    *("x" * 300, f"a={CANARY}", f"a\n  {CANARY}\n  b", f"a): {CANARY}#", 5, None, ["a"], {"a": 1}, True),
]


@pytest.mark.parametrize("which", ["x", "scaled", "output"])
@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n)[:20])
def test_names_of_nodes(forge, which, name):
    if which == "x" and isinstance(name, dict | list):
        pytest.skip("not to be renamed everywhere")
    refused(forge(lambda d, t: rename(d, which, name)), "name")


def test_two_nodes_of_one_name(forge):
    refused(forge(lambda d, t: node(d, "scaled").update(name="x")), "'x' is the name of two nodes")


def one_more(op, target, args):
    row = {"op": op, "name": "more", "target": target, "args": args, "kwargs": {}}
    return lambda document, tensors: document["graph"]["nodes"].insert(-1, row)


PATHS = [
    *(
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "a b",
        "a;b",
        "a\nb",
        'a"].b["',
        "a[0]",
        "a()",
        "é",
        "../a",
        "a/b",
        "class",
        "a.lambda",
    ),
    *("__class__", "__class__.__init__", "__dict__", "forward", "state_dict", "graph", "code", "training", "_modules"),
    *(
        "_buffers",
        "_parameters",
        "a.forward",
        "a.__init__",
        "part",
        "conv.weight",
        "conv.extra",
        "conv.packs",
        "x" * 300,
    ),
    *(".".join("a" * 99), f'a"). {CANARY} #', CANARY),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: repr(p)[:20])
def test_paths_of_tensors(forge, path):
    def edit(document, tensors):
        rename(document, "part.scale", path)
        document["graph"]["tensors"].append({"name": "part.x", "data": "conv.bias", "kind": "buffer"})
        one_more("get_attr", "part.x", [])(document, tensors)
        if isinstance(path, str):
            tensors[path] = tensors.pop("part.scale")

    if path == "conv.weight":
        refused(forge(lambda d, t: rename(d, "part.scale", path)), "'conv.weight' is there twice")
        return
    refused(forge(edit), "is no path of|is there twice|has the tensors|lies within")


@pytest.mark.parametrize("path", [*PATHS[:24], "part.scale", "fc", "norm.inner"], ids=lambda p: repr(p)[:20])
def test_paths_of_modules(forge, path):
    def edit(document, tensors):
        for row in document["graph"]["tensors"]:
            if row["name"].startswith("conv."):
                row["name"] = path + row["name"].removeprefix("conv")
        for row in [*document["graph"]["modules"], node(document, "conv")]:
            if row.get("target", row["name"]) == "conv":
                row["target" if "op" in row else "name"] = path

    refused(forge(edit), "is no path of|is there twice|lies within")


def test_paths_within_a_module_of_the_file(forge):
    def edit(document, tensors):
        rename(document, "fc", "conv.inner")
        document["graph"]["nodes"][-2]["name"] = "fc"
        document["graph"] = json.loads(
            json.dumps(document["graph"])
            .replace('{"node": "conv.inner"}', '{"node": "fc"}')
            .replace('"fc.', '"conv.inner.')
        )
        for name in ("weight", "bias"):
            tensors[f"conv.inner.{name}"] = tensors.pop(f"fc.{name}")

    refused(forge(edit), "'conv.inner' lies within a FrozenConv")


@pytest.mark.parametrize("target", ["nothing", "conv.weight", "part", "__class__", "forward", "", None, 3, ["conv"]])
def test_targets_of_calls_of_modules(forge, target):
    refused(forge(one_more("call_module", target, [{"node": "x"}])), "node more: a 'call_module' of")


@pytest.mark.parametrize("target", ["nothing", "conv", "part", "__class__", "part.scale.data", "", None, 3, ["x"]])
def test_targets_of_attributes(forge, target):
    refused(forge(one_more("get_attr", target, [])), "node more: a 'get_attr' of")


# ---- functions

FUNCTIONS = [
    *("eval", "exec", "builtins.eval", "os.system", "getattr", "torch.load", "torch.hub.load", "pickle.loads", CANARY),
    *("operator.attrgetter", "operator.methodcaller", "operator.setitem", "operator.iadd", "math.gamma", "torch.relu"),
    *(
        "aten.relu",
        "aten.relu.",
        "aten..default",
        "aten.relu.default.default",
        "aten.relu.default\n",
        "Aten.relu.default",
    ),
    *("aten.__class__.default", "aten.relu.__class__", "aten.relu.__init__", "aten.relu.op", "aten.nothing.default"),
    *("aten.relu_.default", "aten.add.out", "aten.copy_.default", "aten.set_.source_Tensor", "aten.resize_.default"),
    *(
        "aten.from_file.default",
        "aten._print.default",
        "aten.save.default",
        "aten.manual_seed.default",
        "aten.format.default",
    ),
    *("aten.set_grad_enabled.default", "aten.set_grad_enabled.", "aten.get_device.default", "aten.len.Tensor"),
    *("prims.sin.default", "quantized.relu6.default", "mkldnn._linear_pointwise.default", "c10d.barrier.default"),
    *("aten.record_stream.default", "aten.quantized_lstm.input", "aten._sparse_coo_tensor_unsafe.default"),
    *(
        "prim.Print.default",
        "prim.rpc_sync.default",
        "image.read_file.default",
        "profiler._record_function_enter.default",
    ),
    *(
        "mkldnn._convolution_pointwise.default",
        "fastres._bn_act_native.default",
        "torchvision._cuda_version.default",
    ),
    *("fastres.nothing.default", "higher_order.cond.default", "", None, 7, ["aten.relu.default"], {"a": 1}),
]


@pytest.mark.parametrize("target", FUNCTIONS, ids=lambda t: repr(t)[:40])
def test_functions_that_no_file_may_call(forge, target):
    def edit(document, tensors):
        node(document, "copied").update(target=target, args=[{"node": "x"}], kwargs={})

    refused(forge(edit), "^node copied: .*(may not call it|no operator)")


def test_the_operators_of_core_aten_are_allowed():
    """What torch.export decomposes everything into, but for what writes to memory and what belongs to training."""
    refused_names = set()
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace == "aten":
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if torch.Tag.core in op.tags and json_ops.why_not(op):
                refused_names.add(name)
            if not json_ops.why_not(op):
                assert not op._schema.is_mutable and json_ops.target_to_json(op) == str(op)
                assert not {"filename", "file"} & {a.name for a in op._schema.arguments}
    known = {"_adaptive_avg_pool2d_backward", "_native_batch_norm_legit", "atan2.out", "resize_"}
    assert refused_names <= {f"aten::{name}" for name in known}


def test_functions_of_python_take_what_they_take():
    for name, (function, count) in json_ops.PYTHON.items():
        assert json_ops.target_from_json(name, (1,) * count, {}) is function
        assert json_ops.target_to_json(function) == name
        for args, kwargs in (((1,) * (count + 1), {}), ((1,) * (count - 1), {}), ((1,) * count, {"a": 1})):
            with pytest.raises(FrozenFileError, match=name):
                json_ops.target_from_json(name, args, kwargs)


@pytest.mark.parametrize(
    "row",
    [
        {"op": "call_method", "target": "numpy"},
        {"op": "call_method", "target": "__reduce__"},
        {"op": "placeholder"},
        {"op": "output", "args": [{"tuple": []}]},
        {"op": "root"},
        {"op": None},
        {"op": ["call_function"]},
        {"args": {"a": 1}},
        {"args": "x"},
        {"kwargs": [1]},
        {"kwargs": {"a=1, b": 1}},
        {"kwargs": {f"memory_format={CANARY}, b": 1}},
        {"kwargs": {"self": 1}},
        {"kwargs": {"nothing": 1}},
        {"args": [{"node": "x"}] * 3, "kwargs": {}},
        {"args": [], "kwargs": {}},
        {"target": "aten.pow.Tensor_Scalar", "args": [{"node": "x"}], "kwargs": {}},
        {"target": "aten.div.Tensor", "args": [], "kwargs": {"other": {"node": "x"}}},
        {"args": [{"node": "fc"}]},
        {"args": [{"node": "copied"}]},
        {"args": [{"node": "nothing"}]},
        {"args": [{"node": ["x"]}]},
        {"args": [{"node": "x", "tuple": []}]},
        {"args": [{}]},
        {"args": [{"pickle": "gASVIwAAAA=="}]},
        {"args": [{"__class__": "x"}]},
        {"args": [{"tuple": 3}]},
        {"args": [{"dict": [[1]]}]},
        {"args": [{"dict": [[[1], 1]]}]},
        {"args": [{"slice": [1]}]},
        {"args": [{"dtype": "complex64"}]},
        {"args": [{"dtype": "ops"}]},
        {"args": [{"device": "meta"}]},
        {"args": [{"device": "cuda:99999"}]},
        {"args": [{"device": "cpu\n"}]},
        {"args": [{"layout": "sparse_coo"}]},
        {"args": [{"memory_format": "nothing"}]},
        {"args": [{"float": "1e3"}]},
        {"args": [{"float": CANARY}]},
    ],
    ids=lambda row: json.dumps(row)[:50],
)
def test_calls_that_make_no_sense(forge, row):
    refused(forge(lambda d, t: node(d, "copied").update(row)), "node copied: |graph")


def test_arguments_by_name(forge):
    """Operators whose arguments are given by name load too: what looks for NaN does not count on their places."""
    for target, kwargs in (
        ("aten.pow.Tensor_Scalar", {"exponent": 2}),
        ("aten.pow.Tensor_Scalar", {"exponent": {"float": "inf"}}),
        ("aten.div.Tensor", {"other": {"node": "scale"}}),
    ):
        change = {"target": target, "args": [{"node": "scaled"}], "kwargs": kwargs}
        loaded = fastres.load(forge(lambda d, t, change=change: node(d, "copied").update(change)))
        assert loaded(torch.rand(2, 3, 6, 6))["rest"] == [4]


def test_texts_stay_texts(forge):
    """A string that looks like code is an argument, wherever it stands."""
    evil = [
        CANARY,
        f"' + {CANARY} + '",
        f'"""\n{CANARY}\n"""',
        "\\",
        "\x00",
        "\u2028",
        "\ud800",
        "}{",
        "%s",
        "{0.__class__}",
    ]

    def edit(document, tensors):
        node(document, "copied")["args"].append({"dict": [[text, [text, {"tuple": [text]}]] for text in evil]})
        node(document, "copied").update(target="aten.mul.Tensor", kwargs={})
        node(document, "output")["args"][0]["tuple"][1] = {"dict": [[text, text] for text in evil]}

    loaded = fastres.load(forge(edit))
    assert_harmless(loaded.module)
    out = loaded.module.graph.output_node().args[0][1]
    assert list(out) == evil


# ---- JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lambda t: t[:-1], "JSON is damaged"),
        (lambda t: "", "JSON is damaged"),
        (lambda t: "null", "describes no graph"),
        (lambda t: "[]", "describes no graph"),
        (lambda t: '{"graph": []}', "describes no graph"),
        (lambda t: t + t, "JSON is damaged"),
        (lambda t: t.replace('"batch":2', '"batch":' + "9" * 30), "beyond 64 bits"),
        (lambda t: t.replace('"batch":2', '"batch":' + "9" * 6000), "beyond 64 bits"),
        (lambda t: t.replace('"batch":2', '"batch":9223372036854775808'), "beyond 64 bits"),
        (lambda t: t.replace('"batch":2', '"batch":1e999'), "infinite"),
        (lambda t: t.replace('"batch":2', '"batch":NaN'), "no number"),
        (lambda t: t.replace('"batch":2', '"batch":-Infinity'), "no number"),
        (lambda t: t.replace('"batch":2', '"batch":2,"batch":2'), "twice"),
        (lambda t: t.replace('"batch":2', '"batch":' + "[" * 100_000 + "]" * 100_000), "deep"),
        (lambda t: t.replace('"batch":2', '"batch":' + '{"a":' * 100_000 + "1" + "}" * 100_000), "deep"),
        (lambda t: t.replace('"batch":2', '"batch":' + "[" * 900 + "]" * 900), "no numbers of images"),
        (lambda t: t.replace('"plain":{"tuple":[]}', '"plain":' + "[" * 900 + "]" * 900), "deep"),
        (
            lambda t: t.replace(
                '"outputs":', '"outputs":' + '{"type":"list","children":[' * 200 + "null" + "]}" * 200 + ',"x":'
            ),
            "is no tree",
        ),
    ],
    ids=range(18),
)
def test_json(forge, text, words):
    refused(forge(text=text), words)


JUNK = [
    None,
    True,
    -1,
    2**62,
    0.5,
    "",
    "x",
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    {"tuple": []},
    {"tuple": [[1]]},
    [{}] * 3,
    CANARY,
]


def test_every_field_is_checked(forge, content):
    """No field is left out, and none holds another kind of thing."""
    document = json.loads(content[0]["model"])
    for field in document:
        if field != "likeness":  # not every network has one
            refused(forge(lambda d, t, field=field: d.pop(field)))
        for junk in JUNK:
            if (field, junk) in (("images_at_a_time", None), ("batch", -1), ("batch", 2**62)) or junk == document[
                field
            ]:
                continue
            if (field, junk) in (("signature", []), ("plain", {"tuple": []}), ("outputs", None)):
                continue
            refused(forge(lambda d, t, field=field, junk=junk: d.update({field: junk})))
    for part in document["graph"]:
        refused(forge(lambda d, t, part=part: d["graph"].pop(part)))
        for junk in JUNK:
            if (part, junk) != ("strides", {}):
                refused(forge(lambda d, t, part=part, junk=junk: d["graph"].update({part: junk})))


# ---- tensors and modules


def test_tensors_that_are_not_the_graph_s(forge):
    rows = "graph", "tensors"

    def at(d):
        return d[rows[0]][rows[1]]

    refused(forge(lambda d, t: t.pop("conv.bias")), "'conv.bias' is not in the file")
    refused(forge(lambda d, t: t.update(extra=torch.ones(1))), "does not use: .'extra'")
    refused(forge(lambda d, t: at(d).pop(0)), "does not use|tensors")
    refused(forge(lambda d, t: at(d).append(at(d)[0])), "twice")
    for change in (
        {"name": 3},
        {"data": "nothing"},
        {"data": ["x"]},
        {"kind": "x"},
        {"kind": None},
        {"kind": "buffer"},
    ):
        refused(forge(lambda d, t, change=change: at(d)[0].update(change)))
    refused(forge(lambda d, t: t.update({"conv.weight": torch.ones(3, dtype=torch.complex64)})), "C64")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv.weight", torch.ones(4, 3, 3)),
        ("conv.weight", torch.ones(4, 3, 3, 3, dtype=torch.int32)),
        ("conv.weight", torch.ones(0, 3, 3, 3)),
        ("conv.weight", torch.ones(5, 3, 3, 3)),
        ("conv.weight", torch.ones(4, 3, 3, 3, dtype=torch.float64)),
        ("conv.bias", torch.ones(4, 1)),
        ("conv.bias", torch.ones(4).half()),
        ("conv.bias", torch.tensor(1.0)),
        ("norm.weight", torch.ones(3)),
        ("norm.running_mean", torch.ones(4, 4)),
        ("norm.running_var", torch.ones(4).double()),
        ("fc.weight", torch.ones(4)),
        ("fc.bias", torch.ones(3)),
    ],
)
def test_tensors_that_do_not_fit_their_module(forge, name, value):
    refused(forge(lambda d, t: t.update({name: value})), f"module '{name.partition('.')[0]}': its")


def test_booleans_are_true_or_false(forge):
    def edit(document, tensors):
        tensors["part.scale"] = torch.tensor([1, 2], dtype=torch.uint8).view(torch.bool)

    refused(forge(edit), "neither true nor false")


@pytest.mark.parametrize(
    "strides",
    [[], [1], [27, 9, 3, 0], [27, 9, 3, -1], [27, 9, 3, 2], [54, 9, 3, 1], [1, 1, 1, 1], [27, 9, 3, 1.0], "x", {"a": 1}]
    + [[2**62, 9, 3, 1], [True, 9, 3, 1], [[27], 9, 3, 1]],
)
def test_strides(forge, strides):
    refused(forge(lambda d, t: d["graph"]["strides"].update({"conv.weight": strides})), "strides")


SETTINGS = {
    "stride": [{"tuple": [0, 1]}, {"tuple": [1]}, [1, 1], 1, {"tuple": [1, 2**40]}, {"tuple": [True, 1]}, None, "x"],
    "padding": [{"tuple": [-1, 0]}, {"tuple": [0, 0.5]}, "same", None],
    "dilation": [{"tuple": [0, 0]}, {"tuple": ["1", "1"]}],
    "groups": [0, -1, 3, True, None, "1", 2**62],
    "act": ["exec", "", None, 1, {"tuple": []}, [], {"dict": []}],
    "exact": [1, None, "x"],
    "plain": [1, None, [1], [{"tuple": [1, 2]}], [{"tuple": [{"tuple": [1]}, {"tuple": [1]}]}], [1] * 99],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_a_convolution(forge, setting):
    def edit(value):
        def change(document, tensors):
            row = next(row for row in document["graph"]["modules"] if row["name"] == "conv")
            pairs = row["settings"]["dict"]
            row["settings"]["dict"] = [
                [k, value if k == setting else v] for k, v in pairs if (k, value) != (setting, ...)
            ]

        return change

    refused(forge(edit(...)), f"^module 'conv': a FrozenConv lacks its setting '{setting}'")
    for value in SETTINGS[setting]:
        refused(
            forge(edit(value)), "^module 'conv': .*(settings of it|do not divide|no pair of sizes|no shape and strides)"
        )


@pytest.mark.parametrize(
    "name", ["Conv2d", "nn.Conv2d", "torch.nn.Conv2d", "FrozenModel", "", None, 3, ["FrozenConv"], "PoolLinear"]
)
def test_classes_of_modules(forge, name):
    refused(forge(lambda d, t: d["graph"]["modules"][0].update({"class": name})), "module 'conv': ")


def test_exact_convolutions_stay_exact(forge):
    def edit(document, tensors):
        pairs = document["graph"]["modules"][0]["settings"]["dict"]
        pairs[[key for key, _ in pairs].index("exact")][1] = True

    assert not fastres.load(forge()).module.conv.exact and fastres.load(forge(edit)).module.conv.exact


def test_modules_are_called_as_they_can_be(forge):
    for change in ({"args": []}, {"args": [{"node": "x"}] * 3}, {"kwargs": {"y": 1}}, {"kwargs": {"x": {"node": "x"}}}):
        refused(forge(lambda d, t, change=change: node(d, "conv").update(change)), "node conv: ")


# ---- specs


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"type": "defaultdict", "keys": ["a"], "children": [None, None]}, "no structure"),
        (
            {"type": "dataclass", "class": "os:_Environ", "keys": ["a", "b"], "children": [None, None]},
            "import 'os' before",
        ),
        (
            {"type": "dataclass", "class": "builtins:eval", "keys": ["a", "b"], "children": [None, None]},
            "import 'builtins'",
        ),
        ({"type": "dataclass", "class": CANARY, "keys": ["a", "b"], "children": [None, None]}, "no class"),
        (
            {"type": "dataclass", "class": "no_such_module:Output", "keys": ["a", "b"], "children": [None] * 2},
            "before loading",
        ),
        ({"type": "dataclass", "class": 3, "keys": ["a", "b"], "children": [None, None]}, "no class"),
        ({"type": "namedtuple", "class": "m:A", "keys": ["a", "b=1"], "children": [None, None]}, "no names"),
        ({"type": "namedtuple", "class": "m:A", "keys": ["a", "class"], "children": [None, None]}, "no names"),
        ({"type": "namedtuple", "class": "m:A", "keys": ["a", "_b"], "children": [None, None]}, "underscore"),
        ({"type": "namedtuple", "class": "m:A", "keys": ["a", "a"], "children": [None, None]}, "twice"),
        (
            {"type": "namedtuple", "class": f"m:{CANARY}", "keys": ["a", "b"], "children": [None, None]},
            "no name of a named tuple",
        ),
        ({"type": "result", "class": "torch.return_types:nothing", "children": [None, None]}, "no result"),
        ({"type": "result", "class": "torch.return_types:aminmax", "children": [None]}, "no result"),
        ({"type": "dict", "keys": ["a"], "children": [None, None]}, "do not fit"),
        ({"type": "dict", "keys": ["a", ["b"]], "children": [None, None]}, "twice, or one that is none"),
        ({"type": "dict", "keys": ["a", "a"], "children": [None, None]}, "twice"),
        ({"type": "tuple", "keys": ["a"], "children": [None, None]}, "has keys"),
        ({"type": "tuple", "children": [None]}, "as many leaves"),
        ({"type": "tuple", "children": [None] * 3}, "as many leaves"),
        ({"type": "tuple", "children": None}, "no tree"),
    ],
)
def test_structures(forge, outputs, words):
    before = set(sys.modules)
    refused(forge(lambda d, t: d.update(outputs=outputs)), words)
    assert set(sys.modules) == before


Output = collections.namedtuple("Output", ["logits", "aux"])


def test_classes_of_structures():
    """A named tuple is the loaded class or one like it, a dataclass the registered one."""

    @dataclasses.dataclass
    class Scores:
        logits: object
        aux: object = None

    spec = tree_structure(Output(0, [0]))
    data = json_specs.spec_to_json(spec)
    assert json_specs.spec_from_json(data) == spec and json_specs.spec_from_json(data)._context is Output
    like = json_specs.spec_from_json(data | {"class": "not_loaded:Outer.Output"})._context
    assert like is not Output and like._fields == Output._fields and like.__name__ == "Output"
    assert json_specs.spec_from_json(data | {"class": "os:path"})._context._fields == Output._fields
    with pytest.raises(FrozenFileError, match="import 'test_freeze_hostile' before loading"):
        json_specs.spec_from_json({"type": "dataclass", "class": f"{__name__}:Scores", "keys": [], "children": []})
    torch.export.register_dataclass(Scores)
    for value in (Scores(0), Scores(0, (0, 0))):
        spec = tree_structure(value)
        again = json_specs.spec_from_json(json.loads(json.dumps(json_specs.spec_to_json(spec))))
        assert again == spec and again.type is Scores
        assert tree_unflatten(list(range(spec.num_leaves)), again) == tree_unflatten(list(range(spec.num_leaves)), spec)
    with pytest.raises(FrozenFileError, match="no such fields"):
        data = json_specs.spec_to_json(tree_structure(Scores(0)))
        json_specs.spec_from_json(data | {"keys": [["other"], []]})


def test_arguments(forge):
    def tree(args, kwargs):
        return lambda d, t: d.update(tree=json_specs.spec_to_json(tree_structure((args, kwargs))))

    refused(forge(tree((0, 0), {})), "as many leaves")
    refused(forge(tree((), {})), "as many leaves")
    refused(forge(tree([0], {})), "not positional and named")
    refused(forge(tree((), (0,))), "not positional and named")
    assert fastres.load(forge(tree((), {"x": 0}))).module


@pytest.mark.parametrize(
    "rows",
    [
        [{"name": "a b", "kind": "KEYWORD_ONLY"}],
        [{"name": "class", "kind": "KEYWORD_ONLY"}],
        [{"name": "a", "kind": "X"}],
        [{"name": "a"}],
        [{"name": "a", "kind": "KEYWORD_ONLY", "x": 1}],
        [{"name": "a", "kind": "KEYWORD_ONLY"}] * 2,
        [{"name": "a", "kind": "KEYWORD_ONLY"}, {"name": "b", "kind": "POSITIONAL_ONLY"}],
        [{"name": "a", "kind": "VAR_POSITIONAL", "default": 1}],
        [{"name": "a", "kind": "KEYWORD_ONLY", "default": {"node": "x"}}],
        [3],
    ],
)
def test_signatures(forge, rows):
    refused(forge(lambda d, t: d.update(signature=rows)), "signature|parameter|computed")


def test_reports_that_cannot_be_shown(forge):
    def report(**changes):
        def edit(document, tensors):
            pairs = [[k, changes.get(k, v)] for k, v in document["report"]["dict"]]
            document["report"] = {"dict": pairs}

        return edit

    refused(forge(report(cuda_graph=3)), "cuda_graph of its FreezeReport is 3")
    refused(forge(report(milliseconds=[])), "milliseconds of its FreezeReport")
    for changes in ({"rows": 3}, {"rows": [3]}, {"rows": [{"dict": []}]}, {"verification": 3}, {"notes": 3}):
        refused(forge(report(**changes)))
    extra = forge(lambda d, t: d["report"]["dict"].append(["later", 1]))
    assert fastres.load(extra).report.model == "Net"  # a field of a later release


@pytest.mark.parametrize(
    ("likeness", "words"),
    [
        ({"attributes": {"a b": 1}}, "no names"),
        ({"attributes": {}, "class": "a b"}, "no names"),
        ({"attributes": {}, "class": 3}, "no names"),
        ({"attributes": [1]}, "does not say"),
        ({"attributes": {}, "config": 3}, "no configuration"),
        ({"attributes": {}, "config": ["os", {"a": 1}]}, "cannot be made here"),
        ({"attributes": {}, "config": ["resnet", {"layer_type": "eval"}]}, "cannot be made here"),
    ],
)
def test_likenesses(forge, likeness, words):
    if "config" in likeness:
        pytest.importorskip("transformers")
    refused(forge(lambda d, t: d.update(likeness=json_values.encode(likeness))), words)


def test_a_likeness_hides_nothing(forge):
    """Attributes of a file are data, and never take the place of what a frozen model has."""
    names = {"forward": 1, "save": 2, "module": 3, "_engine": 4, "__class__": 5, "training": True, "mine": CANARY}
    loaded = fastres.load(forge(lambda d, t: d.update(likeness=json_values.encode({"attributes": names}))))
    assert loaded.mine == CANARY and not loaded.training and isinstance(loaded, fastres.FrozenModel)
    assert loaded(torch.randn(3, 3, 6, 6))["rest"] == [6]


def test_devices_that_are_not_there(forge):
    if torch.cuda.is_available():
        pytest.skip("it is there")

    def edit(document, tensors):
        document["device"] = {"device": "cuda:0"}
        node(document, "copied").update(target="aten.to.device", args=[{"node": "scaled"}, {"device": "cuda"}])
        node(document, "copied").update(kwargs={"dtype": {"dtype": "float32"}})

    path = forge(edit)
    refused(path, r"for cuda:0, which is not there; device='cpu' loads it here")
    loaded = fastres.load(path, device="cpu")  # what was on that device is on this one
    assert loaded.module.graph.find_nodes(op="call_function", target=torch.ops.aten.to.device)[0].args[1].type == "cpu"
    with pytest.raises(FrozenFileError, match="for cuda:3, which is not there: "):
        fastres.load(path, device="cuda:3")
    with pytest.raises(RuntimeError):
        fastres.load(path, device="nothing")


# ---- at random


def test_any_change_of_the_bytes_is_found(real, tmp_path):
    """A file with flipped, cut, doubled or inserted bytes is refused, or is the same network: blanks in its header."""
    data, path = real.read_bytes(), tmp_path / "damaged"
    want = {name: t for name, t in fastres.load(real).state_dict().items()}
    draw, same = random.Random(0), 0
    for turn in range(500):
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
        try:
            got = fastres.load(path).state_dict()
        except FrozenFileError as error:
            assert str(path) in str(error)
        else:
            same += 1
            assert damaged == data or len(damaged) == len(data)
            assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert same < 10


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


def test_any_change_of_the_document_is_harmless(forge, content):
    """Somebody moves, swaps, removes and adds parts of it and computes the checksum: it is refused, or it loads, and
    then the code written for it holds nothing but calls."""
    base = json.loads(content[0]["model"])
    draw, loaded, begin = random.Random(1), 0, time.process_time()
    junk = [*JUNK, *NAMES, *PATHS, *FUNCTIONS, {"node": "x"}, {"dtype": "float16"}, {"device": "cpu"}, [1, 2], 1e308]
    turns = 0
    while turns < 300 and time.process_time() - begin < 20:
        turns += 1
        document = copy.deepcopy(base)
        spots = [at for at in places(document) if at]
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            at, other = draw.choice(spots), draw.choice(spots)
            try:
                parent, key = value_at(document, at[:-1]), at[-1]
                action = draw.randrange(4)
                if action == 0:
                    parent[key] = draw.choice(junk)
                elif action == 1:
                    parent[key] = copy.deepcopy(value_at(base, other))
                elif action == 2:
                    del parent[key]
                elif isinstance(parent, list):
                    parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        path = forge(text=lambda _, document=document: json.dumps(document))
        try:
            model = fastres.load(path)
        except FrozenFileError as error:
            assert str(error).startswith(f"path: {os.fspath(path)!r}: ")
        else:
            loaded += 1
            assert_harmless(model.module)
    assert turns > 100 and 10 < loaded < turns / 2


def test_large_graphs_are_refused_or_built_in_time(forge):
    def edit(count):
        def change(document, tensors):
            rows = document["graph"]["nodes"]
            extra = [dict(rows[0], name=f"x{i}") for i in range(count)]
            document["graph"]["nodes"] = [rows[0], *extra, *rows[1:]]

        return change

    begin = time.process_time()
    refused(forge(edit(200_000)), "no list of nodes")
    refused(forge(edit(2_000)), "its inputs are not those of its graph")
    assert time.process_time() - begin < 30


def test_values_go_there_and_back():
    values = [
        None,
        True,
        -(2**63),
        2**63 - 1,
        0.1,
        -0.0,
        5e-324,
        float("inf"),
        "é\n\ud800",
        [],
        [[1]],
        (),
        (1, (2,)),
        {},
    ]
    values += [{"a": 1, 2: (3,), None: []}, slice(None, 2, -1), torch.float16, torch.strided, torch.device("cuda", 1)]
    values += [torch.channels_last, torch.Size([1, 2]), {"tuple": [1]}, {"node": "x"}]
    text = json_values.dump(json_values.encode(values))
    back = json_values.Decoder()(json_values.parse(text))
    assert back == [*values[:-3], (1, 2), *values[-2:]]
    assert str(back[5]) == "-0.0"
    for odd in (1j, b"x", {1}, object(), int, 2**63, float, range(3), keyword, torch.ones(1), torch.complex64):
        with pytest.raises(FrozenFileError, match="no plain value"):
            json_values.encode(odd)
