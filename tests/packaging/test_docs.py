"""The README and the site: every block of Python runs as it stands, in order, in one namespace a page; links lead
somewhere, tables are those of the result files, every reason code has its line.

Programs, which other tests run, are shown as `py`. The site itself is built by the last test, where `make docs` has its
environment.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import typing
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("the tests lie outside a source tree", allow_module_level=True)
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
NEEDED = ("PIL", "fastapi", "httpx", "ray", "sklearn", "timm", "torchvision", "transformers")


def python(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def run(blocks):
    """What the blocks leave behind."""
    for package in NEEDED:
        if any(re.search(rf"^(from|import) .*\b{package}\b", block, re.M) for block in blocks):
            pytest.importorskip(package)
    scope = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "a page", "exec"), scope)
    return scope


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # pages save files


@pytest.fixture
def blocks(request):
    return python(ROOT / request.param)


def test_blocks_are_python_of_readable_lines():
    for page in PAGES:
        for block in python(page):
            compile(block, str(page), "exec")
            assert max(map(len, block.splitlines())) <= 120, page.name


def test_the_readme_has_ten_lines():
    first, *_ = python(README)
    assert len(first.strip().splitlines()) <= 12
    assert README.read_text().count("\n") <= 120, "the rest belongs to docs/"


def test_training():
    scope = run(python(ROOT / "docs/training.md"))
    assert len(scope["report"].swapped) == 12
    fused, stock = type(scope["ema"].module), type(scope["plain"])
    assert issubclass(fused, stock) and fused is not stock
    assert Path("weights.pt").is_file()


def test_predicting(capsys):
    scope = run(python(ROOT / "docs/predict.md"))
    assert len(capsys.readouterr().out.splitlines()) == scope["rows"].total == 2


def test_swapping():
    scope = run(python(ROOT / "docs/swap.md"))
    assert len(scope["report"].swapped) == 2


def test_freezing(capsys):
    slow = re.compile(r"pipeline\(|torch\.compile")  # the full lane runs the whole page
    scope = run([block for block in python(ROOT / "docs/freeze.md") if not slow.search(block)])
    assert scope["logits"].shape == (8, 1000) and scope["fast"].report.verification
    assert "resnet18.fastres" in {path.name for path in Path().iterdir()}


ELSEWHERE = ("paper", "predict", "quantization", "swap", "training")  # paper.md: tests/lab/test_paper_command.py
REST = [page for page in (README, *DOCS) if page.stem not in ELSEWHERE and python(page)]


@pytest.mark.full
@pytest.mark.parametrize("page", REST, ids=lambda page: page.stem)
def test_all_of_a_page(page):
    run(python(page))


@pytest.mark.full
def test_quantizing(capsys):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    scope = run(python(ROOT / "docs/quantization.md"))
    found = scope["moved"].report.quantization
    assert scope["fast"].report.quantization.counts == {"int8": 20} and found.counts["int8"] >= 17
    assert [layer.name for layer in found.layers if layer.precision != "int8"][0] == "layer2.1.conv2"
    assert "passed: SNR" in capsys.readouterr().out


@pytest.mark.full
def test_the_pipeline(capsys):
    (block,) = [block for block in python(ROOT / "docs/freeze.md") if "pipeline(" in block]
    assert len(block.strip().splitlines()) <= 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = run([block])["frozen"]
    out, err = capsys.readouterr()
    assert "not supported" not in out + err
    assert re.fullmatch(r"\[\[\{'label': 'LABEL_\d+', 'score': [\d.e-]+\}\](, .*)?\]\n", out), out
    assert frozen.report.folded == 20 and frozen.report.verification


# Links, tables, codes


def test_links():
    """Files that the pages name are there, headings that they name in each other too."""
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists() or "benchmarks/results" in target, f"{page.name}: {target}"  # no results in an sdist
            if anchor and path.suffix == ".md" and path.exists():
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                slugs = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in headings}
                assert anchor[1:] in slugs, f"{page.name}: {target}{anchor}"


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"([\w-]+\.md)$", (ROOT / "docs/_site.yml").read_text(), re.M))
    assert {page.name for page in DOCS} <= named


def test_tables_and_the_picture_are_those_of_the_results():
    tables = loaded("benchmarks/tables.py")
    if not tables.RESULTS.is_dir():
        pytest.skip("an sdist has no results")
    for page in tables.PAGES:
        assert tables.MARKED.search(page.read_text()) and tables.written(page.read_text()) == page.read_text(), (
            f"{page.name}: run python benchmarks/tables.py"
        )
    assert tables.PICTURE.read_text() == tables.picture(json.loads((tables.RESULTS / tables.PICTURED).read_text()))


def test_every_reason_code_has_its_cure():
    from fastres.swap.adapters import ReasonCode

    text = (ROOT / "docs/reasons.md").read_text()
    swap, rest = text.split("## Why a layer was not folded")
    freeze, _ = rest.split("## Why a backend does not run")
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", swap, re.M)) == set(typing.get_args(ReasonCode))
    sources = [*(ROOT / "fastres/graph").rglob("*.py")]
    codes = {code for path in sources for code in re.findall(r'Refusal\("([A-Z_]+)"', path.read_text())}
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", freeze, re.M)) >= codes >= {"NO_NORM", "OVERFLOW"}


# The site


def loaded(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.fetched, self.linked, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found.get("id")}
        if tag == "a" and found.get("href"):
            self.linked.append(found["href"])
        elif tag in ("img", "script") or (tag == "link" and found.get("rel") in ("stylesheet", "icon")):
            self.fetched += [found[name] for name in ("src", "href") if found.get(name)]


@pytest.mark.full
def test_the_site(tmp_path):
    """Built, each link of it followed; nothing is fetched from elsewhere, and a page with what it fetches is small."""
    builder = ROOT / ".venv-docs/bin/zensical"
    if not builder.exists():
        pytest.skip("make docs installs the builder")
    code = "import runpy, sys; site = runpy.run_path(sys.argv[1]); site['gather'].__globals__['OUT'] = site['Path']"
    code += "(sys.argv[2]); site['gather']()"
    subprocess.run([sys.executable, "-c", code, ROOT / "docs/_site.py", tmp_path], check=True)
    config = tmp_path / "site.yml"
    config.write_text(config.read_text().replace("../..", str(ROOT)))
    done = subprocess.run([builder, "build", "--strict", "-f", config], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    pages = {page: Links(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    assert {"index.html", "api.html", "performance.html", "train_plain.html"} <= {page.name for page in pages}
    for page, found in pages.items():
        weight = page.stat().st_size
        for name in dict.fromkeys(found.fetched):
            assert not re.match(r"(\w+:)?//", name), f"{page.name} fetches {name}"
            weight += (page.parent / name).resolve().stat().st_size
        assert weight < 1_000_000, f"{page.name}: {weight} bytes"
        for link in found.linked:
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", target):
                continue
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), f"{page.name}: {link}"
            assert not anchor or there.suffix != ".html" or anchor in pages[there].ids, f"{page.name}: {link}"
    reference = (site / "api.html").read_text()
    import fastres

    for name in set(fastres.__all__) - {"functional", "models", "nn"}:
        assert re.search(rf'id="fastres\.[\w.]*\b{name}"', reference), f"the API reference lacks {name}"
