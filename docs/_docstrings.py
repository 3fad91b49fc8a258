"""Docstrings as Markdown: what Sphinx and a terminal read as it is, mkdocstrings wants written otherwise."""

import re
from typing import Any

import griffe


class Markdown(griffe.Extension):
    """`Example:` is a section of code, a role is a code span, and brackets in a first line are no link."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            text = re.sub(r":(?:class|func|meth):`~?([^`]+)`", r"``\1``", text)
            first, *rest = text.split("\n", 1)
            if "`" not in first:
                first = re.sub(r"([\[\]*])", r"\\\1", first)
            obj.docstring.value = "\n".join([first, *rest])
