"""Gather the site's pages in build/docs: python docs/_site.py, which `make docs` does before it builds them.

The pages of docs/ link as on a code host: `../examples/train_plain.py`, `../benchmarks/results/X.md`. Here those files
become pages at the same place below the site's root, and the links lose their `../`. Needs no package.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build/docs"
FOLDERS = ("benchmarks/results", "examples")
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")
PAGE = re.compile(r"^ +- .*?([\w-]+\.md)$")


def sources() -> dict[str, Path]:
    """The files of the site, by their place in it; a program is a page too."""
    found = {path.name: path for path in sorted((ROOT / "docs").iterdir()) if path.suffix in (".md", ".css", ".svg")}
    found |= {name: ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*")):  # an sdist has no results
            if path.suffix in (".md", ".png", ".py"):
                found[f"{folder}/{path.name.replace('.py', '.md')}"] = path
    return found


def program(path: Path) -> str:
    """A program as a page: what its docstring says, then the whole of it."""
    text = path.read_text()
    head = ast.get_docstring(ast.parse(text)) or ""
    return f"# {path.stem}\n\n{head.partition(chr(10))[0]}\n\n```py title='{path.name}'\n{text}```\n"


def relinked(text: str, path: Path) -> str:
    """The links of a page of docs/ or of the root, from the site's root."""

    def link(found: re.Match[str]) -> str:
        target = found[2].removeprefix("docs/" if path.parent == ROOT else "../")
        if target.startswith("examples/"):
            target = target.replace(".py", ".md")
        return f"{found[1]}{target}{found[3] or ''})"

    return LINK.sub(link, text)


def gather() -> dict[str, Path]:
    """Write build/docs: the pages, and the configuration without those that are not there."""
    shutil.rmtree(OUT, ignore_errors=True)
    found = sources()
    for place, path in found.items():
        target = OUT / "pages" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            target.write_text(program(path))
        elif path.suffix == ".md" and path.parent.name != "results":
            target.write_text(relinked(path.read_text(), path))
        else:
            shutil.copy(path, target)
    lines = (ROOT / "docs/_site.yml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not (named := PAGE.match(line.rstrip())) or named[1] in found]
    (OUT / "site.yml").write_text("".join(kept))
    return found


if __name__ == "__main__":
    gather()
