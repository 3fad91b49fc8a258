"""The paper's plots at tiny sizes, read from the axes that were drawn."""

import pytest

pytest.importorskip("matplotlib")

from fastres.lab.paper import report  # noqa: E402
from fastres.lab.paper.tables import Curve, Panel  # noqa: E402
from fastres.lab.results import new_figure  # noqa: E402


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize("x", [(1.0,), (0.0, 1.0), (0.0, 1.0, 2.0), tuple(map(float, range(0, 64001, 4000)))], ids=len)
def test_ticks_are_whole_iterations_and_plain_numbers(tmp_path, monkeypatch, x, log):
    drawn = []
    monkeypatch.setattr(report, "new_figure", lambda *size, **dpi: drawn.append(new_figure(*size, **dpi)) or drawn[0])
    y = tuple(2.3 - 1.2 * i / max(1, len(x) - 1) for i in range(len(x)))
    panel = Panel("loss", "iteration", "cross-entropy", (Curve("resnet-20", x, y),), log=log)
    report.draw([panel], tmp_path / "plot.png", "tiny", "")
    axes = drawn[0].axes[0]
    assert all(tick == round(tick) for tick in axes.get_xticks())
    texts = [axis.get_text() for axis in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True))]
    texts = [text for text in texts if text]
    assert texts and all(float(text) > -1 for text in texts)  # not "$10^0$"
    assert axes.lines[0].get_marker() == ("o" if len(x) == 1 else "None")  # a curve of one point is seen
