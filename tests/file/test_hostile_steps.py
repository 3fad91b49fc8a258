"""Documents that somebody made up: operators, steps and parts that no saved network has.

Each gives one FrozenFileError. What loads although it was changed calls operators of the allow-list and nothing else,
and ends in an answer or in an ordinary error.
"""

import json
import sys

import pytest
import torch

import fastres
from fastres.inference.file import operators, values
from fastres.inference.file.values import FrozenFileError
from file_cases import CANARY, JUNK, content, harmless, refused

# ---- operators

FORBIDDEN = """
    eval exec builtins.eval os.system getattr torch.load torch.hub.load pickle.loads operator.attrgetter
    operator.methodcaller operator.setitem operator.iadd math.gamma torch.relu aten.relu aten.relu. aten..default
    aten.relu.default.default Aten.relu.default aten.__class__.default aten.relu.__class__ aten.relu.__init__
    aten.relu.op aten.nothing.default aten.relu_.default aten.add.out aten.copy_.default aten.set_.source_Tensor
    aten.resize_.default aten.from_file.default aten._print.default aten.save.default aten.manual_seed.default
    aten.format.default aten.set_grad_enabled.default aten.set_grad_enabled. aten.get_device.default aten.len.Tensor
    prims.sin.default quantized.relu6.default mkldnn._linear_pointwise.default c10d.barrier.default
    aten.record_stream.default aten.quantized_lstm.input aten._sparse_coo_tensor_unsafe.default prim.Print.default
    prim.rpc_sync.default image.read_file.default profiler._record_function_enter.default
    mkldnn._convolution_pointwise.default fastres._bn_act_direct_native.default fastres._conv_act_native.default
    torchvision._cuda_version.default fastres.nothing.default higher_order.cond.default aten._reshape_alias.default
    aten.convolution_backward.default aten.ctc_loss.IntList aten.mkldnn_rnn_layer.default aten.segment_reduce.default
""".split()
FORBIDDEN += ["aten.relu.default\n", CANARY, "", None, 7, ["aten.relu.default"], {"a": 1}]


def test_operators_that_no_file_may_call(change):
    for name in FORBIDDEN:
        row = {"operator": name, "args": [{"slot": 15}], "kwargs": {}}
        refused(
            change(lambda d, t, row=row: d["steps"][6].update(row)), "^step 'step6': .*(may not call it|no operator)"
        )


def test_the_operators_of_core_aten_are_allowed():
    """What torch.export decomposes everything into, but for what writes to memory and what belongs to training."""
    refused_names = set()
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace == "aten":
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if torch.Tag.core in op.tags and operators.why_not(op) and "_backward" not in name:
                refused_names.add(packet)
            if not operators.why_not(op):
                assert not op._schema.is_mutable and operators.name_of(op) == str(op)
                assert not {"filename", "file"} & {a.name for a in op._schema.arguments}
    norms = {"_native_batch_norm_legit", "_native_batch_norm_legit_no_training"}  # captured ones are aten.batch_norm
    assert refused_names <= norms | {"_fft_c2r", "_fft_r2c", "atan2", "resize_"}  # and fft_rfft, fft_irfft


def test_functions_of_python_take_what_they_take():
    for name, (function, count) in operators.PYTHON.items():
        assert operators.operator_for(name, (1,) * count, {}) is function and operators.name_of(function) == name
        for args, kwargs in (((1,) * (count + 1), {}), ((1,) * (count - 1), {}), ((1,) * count, {"a": 1})):
            with pytest.raises(FrozenFileError, match=name):
                operators.operator_for(name, args, kwargs)


# ---- the document

IN_STEP = [
    *({"args": [{"slot": slot}]} for slot in (16, 17, 19, 99, -1, 2**40, 2**70, True, 1.0, "1", None, [1])),
    *({"args": args} for args in ({"a": 1}, "x", None, [], [{"slot": 15}] * 3)),
    *({"kwargs": kwargs} for kwargs in ([1], None, {"a=1, b": 1}, {"self": 1}, {f"memory_format={CANARY}, b": 1})),
    {"operator": "aten.pow.Tensor_Scalar", "kwargs": {}},
    {"operator": "aten.div.Tensor", "args": [], "kwargs": {"other": {"slot": 15}}},
    *({"operator": "aten.sum.default", "kwargs": {"dtype": junk}} for junk in (-1, 99, {"slot": 11}, "float32")),
    *({"kwargs": {"memory_format": junk}} for junk in (99, {"slot": 11}, {"dtype": "float32"})),
    *({"name": name} for name in (None, 3, ["a"])),
    *({"args": [junk]} for junk in ({}, {"slot": 15, "tuple": []}, {"pickle": "gASVIwAAAA=="}, {"__class__": "x"})),
    *(
        {"args": [{word: "x"}]}
        for word in ("tuple", "slice", "dict", "float", "layout", "memory_format", "OrderedDict")
    ),
    *({"args": [{word: []}]} for word in ("slice", "slot", "dtype", "device", "OrderedDict", "namedtuple")),
    *({"args": [{"dict": pairs}]} for pairs in ([[1]], [[[1], 1]], [3])),
    *({"args": [{"dtype": name}]} for name in ("complex64", "ops")),
    *({"args": [{"device": name}]} for name in ("meta", "cuda:99999", "cpu\n", "CPU", 3)),
]
CLASSES = [["os", "_Environ"], ["builtins", "eval"], ["no_such_module", "Output"], [3, CANARY], [], ["os"], "os"]
FIELDS = ["b=1", "class", "_b", "a b", CANARY, 3]
PARAMETERS = [["a b", "KEYWORD_ONLY"], ["class", "KEYWORD_ONLY"], [3, "KEYWORD_ONLY"], ["a", "X"], ["a"], 3]
PARAMETERS += [
    ["a", "KEYWORD_ONLY", 1],
    ["a", "VAR_KEYWORD", "default", 1],
    ["a", "VAR_POSITIONAL", "default", {"x": 1}],
]
PARTS = {
    "outputs": [{"dataclass": row} for row in CLASSES]
    + [{"namedtuple": ["m", "A", [field, {"slot": 18}]]} for field in FIELDS]
    + [{"namedtuple": [module, name]} for module, name in ((["m"], "A"), ("m", CANARY), ("m", 3))]
    + [{"result": row} for row in (["nothing", 1], ["max", 1], [], "x")]
    + [{"OrderedDict": [[1]]}, {"defaultdict": [["a", 1]]}, {"dict": [], "tuple": []}, {"slot": 19}, [{"slot": -1}]],
    "signature": [[row] for row in PARAMETERS] + [[["a", "KEYWORD_ONLY"], ["b", "POSITIONAL_ONLY"]]],
    "call": [[], {"tuple": []}, [{"slot": 0}] * 2, {"slot": 1}, [{"slot": 1}, {"slot": 0}]],
    "inputs": [[], 3, [3], [{"tuple": [{"tuple": [0.5]}, {"dtype": "float32"}]}]],
    "others": [3, [3], [{}], {"a": 1}],
    "constants": [[], ["conv.weight"] * 9, [3] * 9],
    "report.rows": [3, [3], [{"dict": []}]],
    "report.verification": [3, {"dict": []}],
    "report.cuda_graph": [3],
    "report.milliseconds": [[], {"dict": [["a", "b"]]}],
    "report.notes": [[3], 3],
    "plan.channels_last": [1.5],
    "plan.images_at_a_time": ["x"],
    "plan.winograd": ["x", None],
    "plan.choices": [3, {"dict": [["a", 1]]}],
    "likeness.attributes": [[1], 3, None, {"dict": [[3, 4]]}],
    "likeness.class": ["a b", 3],
    "likeness.config": [[1], *([kind, {"dict": [["layer_type", "eval"]]}] for kind in ("os", "resnet"))],
}


@pytest.mark.parametrize("row", IN_STEP, ids=lambda row: json.dumps(row)[:50])
def test_steps_that_make_no_sense(change, row):
    refused(change(lambda d, t: d["steps"][6].update(row)), "^step .*: |cannot be built")


@pytest.mark.parametrize("path", PARTS)
def test_parts_that_make_no_sense(change, path):
    if path == "likeness.config":
        pytest.importorskip("transformers").CONFIG_MAPPING["resnet"]
    name, _, field = path.partition(".")
    before = set(sys.modules)
    for data in PARTS[path]:

        def edit(document, tensors, data=data):
            if field:
                document[name]["dict"] = [[k, v] for k, v in document[name]["dict"] if k != field] + [[field, data]]
            else:
                document[name] = data

        refused(change(edit))
    assert set(sys.modules) == before


def test_every_field_is_checked(change, real):
    """No field is left out; one that holds another kind of thing is refused, or does no harm."""
    loaded = set()
    for name in json.loads(content(real)[0]["model"]):
        refused(change(lambda d, t, name=name: d.pop(name)), f"has no '{name}'")
        for junk in JUNK:
            if harmless(change(lambda d, t, name=name, junk=junk: d.update({name: junk}))):
                loaded.add(name)
    assert loaded <= {"outputs", "batch", "dtype", "device", "signature", "call", "questions", "others"}
    extra = change(lambda d, t: d["report"]["dict"].append(["later", 1]))
    assert fastres.load(extra).report.model == "Net"  # a field of a later release


def test_steps_in_another_order(change):
    """A slot is read before it is written; a step twice, away, or no step."""
    refused(change(lambda d, t: d["steps"].insert(0, d["steps"].pop())), "reads a slot that is not written")
    refused(change(lambda d, t: d["steps"].pop()))
    refused(change(lambda d, t: d["steps"].append(3)), "cannot be built")
    assert harmless(change(lambda d, t: d["steps"].append(d["steps"][5])))


def test_arguments_of_a_convolution(change):
    """Whatever stands in a place of it: refused, or an ordinary error of the call."""
    for place in range(10):
        for junk in [*JUNK, [0, 0], [-1, 1], [2**31, 2**31], [2**62, 1], [1.5, 1], ["1", 1]]:
            harmless(change(lambda d, t, at=place, junk=junk: d["steps"][2]["args"].__setitem__(at, junk)))


def test_texts_stay_texts(change):
    """A string that looks like code is an argument, wherever it stands."""
    evil = [CANARY, f'"""\n{CANARY}\n"""', "\\", "\x00", "\u2028", "\ud800", "}{", "%s", "{0.__class__}"]
    outputs = {"dict": [["y", {"slot": 18}], ["evil", [*evil, {"slot": 11}]]]}
    assert fastres.load(change(lambda d, t: d.update(outputs=outputs)))(torch.randn(2, 3, 6, 6))["evil"] == [*evil, 4]


@pytest.mark.parametrize(("module", "name"), [("not_loaded", "Outer.Output"), ("os", "path"), ("sys", "version_info")])
def test_a_named_tuple_is_the_loaded_class_or_one_like_it(change, module, name):
    row = [module, name, ["logits", {"slot": 18}], ["rest", {"slot": 11}]]
    out = fastres.load(change(lambda d, t: d.update(outputs={"namedtuple": row})))(torch.ones(2, 3, 6, 6))
    assert out._fields == ("logits", "rest") and type(out).__name__ == name.rpartition(".")[2] and out.rest == 4


def test_a_likeness_hides_nothing(change):
    """Attributes of a file are data, and never take the place of what a frozen model has."""
    names = {"forward": 1, "save": 2, "_network": 4, "__class__": 5, "training": True, "mine": CANARY}
    likeness = values.Values().encode({"attributes": names, "class": "FrozenModel"})
    loaded = fastres.load(change(lambda d, t: d.update(likeness=likeness)))
    assert loaded.mine == CANARY and not loaded.training and isinstance(loaded, fastres.FrozenModel)
    assert loaded(torch.randn(3, 3, 6, 6))["rest"] == [6]
