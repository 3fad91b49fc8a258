"""steps.Graph: its text, what each step frees, what check() finds, and names that find their operators again."""

import copy
import operator
import pickle

import pytest
import torch
from torch import fx

from fastres.graph.steps import Graph, Slot, Step, find_operator, freed, of_fx, operator_name
from freeze_cases import cifar, freeze, images

aten = torch.ops.aten
RELU, ADD, CAT = aten.relu.default, aten.add.Tensor, aten.cat.default


def s(*indices):
    return tuple(map(Slot, indices))


def branches():
    """y = relu(x); cat([y, sigmoid(y)])[0 : x.size(0)] + w, a tanh that nobody reads, and x returned too."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    y = graph.call_function(RELU, (x,))
    y.meta["name"] = "layer"
    z = graph.call_function(aten.sigmoid.default, (y,))
    graph.call_function(aten.tanh.default, (y,))
    both = graph.call_function(CAT, ([y, z],))
    n = graph.call_function(aten.sym_size.int, (x, 0))
    part = graph.call_function(operator.getitem, (both, slice(0, n, None)))
    graph.output((graph.call_function(ADD, (part,), {"other": w}), x, 3))
    return of_fx(graph, {"w": "made of w"})


def test_steps_of_a_tree():
    graph = branches()
    graph.check()
    assert str(graph).splitlines() == [
        "inputs: 1",
        "%1 = w",
        "%2 = aten.relu.default(%0)",
        "%3 = aten.sigmoid.default(%2)",
        "%4 = aten.tanh.default(%2)  frees %4",
        "%5 = aten.cat.default([%2, %3])  frees %2, %3",
        "%6 = aten.sym_size.int(%0, 0)",
        "%7 = operator.getitem(%5, slice(0, %6, None))  frees %5, %6",
        "%8 = aten.add.Tensor(%7, other=%1)  frees %7",
        "return %8, %0, 3",
    ]
    assert (graph.inputs, graph.constants, graph.size, graph.first_constant, graph.first_result) == (1, ("w",), 9, 1, 2)
    assert [step.reads for step in graph.steps] == [[0], [2], [2], [2, 3], [0], [5, 6], [7, 1]]
    assert graph.steps[0].name == "layer" and graph.made_of == {"w": "made of w"}


def test_inputs_are_freed_constants_and_outputs_are_not():
    steps = [Step(ADD, s(0, 1), {}, 2), Step(RELU, s(2), {}, 3), Step(RELU, s(2), {}, 4)]
    graph = freed(Graph(1, ("w",), steps, s(3, 4)))
    assert [step.frees for step in graph.steps] == [(0,), (), (2,)]
    graph.check()


WRONG = {
    "read before it is written": ([Step(RELU, s(2), {}, 1), Step(RELU, s(0), {}, 2)], s(1), "%1 = .*not written"),
    "read though freed": ([Step(RELU, s(0), {}, 1, (0,)), Step(ADD, s(1, 0), {}, 2)], s(2), "%2 = .*or freed"),
    "freed inside a list": ([Step(RELU, s(0), {}, 1, (0,)), Step(CAT, ([*s(1, 0)],), {}, 2)], s(2), "%2 = .*or freed"),
    "written twice": ([Step(RELU, s(0), {}, 1), Step(RELU, s(0), {}, 1)], s(1), "%1 = .*is taken"),
    "an input written": ([Step(RELU, s(0), {}, 0)], s(0), "%0 = .*is taken"),
    "no slot": ([Step(RELU, s(0), {}, 2)], s(2), "%2 = .*or is none"),
    "an output not written": ([Step(RELU, s(0), {}, 1)], s(2), "an output is not written"),
    "an output freed": ([Step(RELU, s(0), {}, 1, (0,))], s(1, 0), "or freed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_check_finds(case):
    steps, outputs, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Graph(1, (), steps, outputs).check()


def test_the_graph_of_a_frozen_network_prints_pickles_and_holds_no_tensor():
    frozen = freeze(cifar(), images(2, 16), tune=False, verify=False)
    graph = frozen.graph
    graph.check()
    lines = str(graph).splitlines()
    assert lines[:2] == ["inputs: 1", "%1 = conv1.weight"] and lines[-1] == f"return %{graph.size - 1}"
    assert sum("fastres.conv_act.default" in line for line in lines) == 7
    assert any(line.endswith("[1, 1], [1, 1], [1, 1], 1, 'relu')  frees %17, %18") for line in lines)
    assert copy.deepcopy(graph) is graph
    text = pickle.dumps(graph)
    assert str(pickle.loads(text)) == str(graph) and len(text) < 10_000
    assert {step.name for step in graph.steps} >= {"conv1", "layer1.0.conv2", "fc"}


@pytest.mark.parametrize("function", [RELU, ADD, operator.getitem, torch.sym_max, torch.ops.fastres.conv_act.default])
def test_names_of_operators(function):
    assert find_operator(operator_name(function)) is function
