"""Shared by all tests: which backends an operator test runs on, and the fp64 comparison of one operator's result.

`FASTRES_TEST_BACKENDS` (comma-separated) picks the backends: the interpreter lane runs the same files with "triton".
pytest-timeout, where it is installed, ends a test that hangs; where it is not, nothing does.
"""

import os

import pytest
import torch

from fastres import _dispatch

DEFAULT_BACKENDS = "reference,cpu"


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = os.environ.get("FASTRES_TEST_BACKENDS", DEFAULT_BACKENDS).split(",")
        metafunc.parametrize("backend", names)


SECONDS, SECONDS_FULL = 300, 1800  # a test may take; those marked `full`, the second


def pytest_collection_modifyitems(config, items):
    """Give every test its time. Ended from a thread: a signal reaches no test that hangs in native code."""
    if config.pluginmanager.hasplugin("timeout") and config.getoption("timeout") is None:
        for item in items:
            if item.get_closest_marker("timeout") is None:
                seconds = SECONDS_FULL if item.get_closest_marker("full") else SECONDS
                item.add_marker(pytest.mark.timeout(seconds, method="thread"))


@pytest.fixture(autouse=True)
def _usable(request):
    """Skip, with its refusal, a backend that this machine cannot run; seed torch; restore its threads afterwards."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if name is not None:
        reasons = _dispatch.refusals(_dispatch.OPERATORS["bn_act"].backends[name], torch.empty(1, 1, 1, 1))
        if reasons:
            pytest.skip("; ".join(reasons))
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def settings(monkeypatch):
    """Sets FASTRES_* variables for one test: `settings(FASTRES_DISABLE="cpu", FASTRES_BACKEND=None)`."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        _dispatch.reload_environment()

    yield change
    monkeypatch.undo()
    _dispatch.reload_environment()
