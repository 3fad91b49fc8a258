"""Where predict finds images: folders, globs, lists, parquet files; names of every kind; what is refused."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("PIL")

from fastres.pipelines.sources import Images  # noqa: E402
from predict_cases import run, write_images  # noqa: E402


def names(source, **options):
    return [item.path for item in Images(source, **options).items()]


def test_a_folder_is_searched_in_one_order(tmp_path):
    for name in (
        "b/x.PNG",
        "a/x.png",
        "a/y.jpeg",
        "x.webp",
        "a/.hidden.png",
        ".git/x.png",
        "a/notes.txt",
        "c/d/é 文.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    want = ["x.webp", "a/x.png", "a/y.jpeg", "b/x.PNG", "c/d/é 文.png"]
    assert names(tmp_path) == [str(tmp_path / name) for name in want]
    assert names(str(tmp_path)) == names([tmp_path])


def test_globs_images_and_sequences(tmp_path):
    paths = [str(path) for path in write_images(tmp_path / "a", 3)]
    assert names(str(tmp_path / "*/*.png")) == paths
    assert names(str(tmp_path / "**/0001.png")) == paths[1:2]
    assert names([paths[2], tmp_path / "a"]) == [paths[2], *paths]
    bracket = tmp_path / "a[1].png"
    bracket.touch()
    assert names(bracket) == [str(bracket)]  # a file's own name is no glob


def test_a_list_has_a_path_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = write_images(tmp_path / "a", 2)
    (tmp_path / "list.txt").write_bytes("\ufeffa/0000.png\r\n\nmissing.png\n".encode() + os.fsencode(paths[1]))
    rows = run("list.txt")
    assert [row["path"] for row in rows] == ["a/0000.png", "missing.png", str(paths[1])]
    assert [row["error"] for row in rows] == [None, "No such file or directory", None]


def test_names_that_are_no_utf8(tmp_path):
    (path,) = write_images(tmp_path / "a", 1)
    name = os.fsencode(path)[:-8] + b"\xff.png"
    try:
        os.rename(path, name)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    for kind in ("csv", "jsonl"):
        (row,) = run(tmp_path / "a", out=tmp_path / f"out.{kind}")
        assert row["error"] is None and row["path"].endswith("\\xff.png")
        assert "\\xff.png" in (tmp_path / f"out.{kind}").read_text("utf-8")


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("empty", ValueError, "source: the folder .*empty has no images"),
        ("none.jpg", FileNotFoundError, "source: found nothing at '.*none.jpg', expected a folder"),
        ("*.bmp", FileNotFoundError, "source: found nothing at"),
        ("empty.txt", ValueError, "source: got no images in .*empty.txt"),
        ([], ValueError, "source: got no images in an empty list"),
        (3, TypeError, "source: got 3, expected a path or a sequence of paths"),
        ([b"x"], TypeError, "source: got .b'x'., expected a path"),
    ],
)
def test_refusals(tmp_path, source, error, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(error, match=text):
        run(str(tmp_path / source) if isinstance(source, str) else source, out=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv.parts").exists()


# ---- parquet ---------------------------------------------------------------------------------------------------------


def table(path, columns, **options):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path, **options)
    return path


def test_a_column_of_bytes(tmp_path):
    paths = write_images(tmp_path / "a", 20)
    data = [path.read_bytes() for path in paths]
    data[3], data[5] = b"no image", None
    file = table(tmp_path / "t.parquet", {"id": list(range(20)), "photo": data}, row_group_size=6)
    rows = run([file, paths[0]], batch=4)
    assert [(row["path"], row["row"]) for row in rows[:-1]] == [(str(file), place) for place in range(20)]
    errors = {place: row["error"] for place, row in enumerate(rows) if row["error"]}
    assert errors == {3: "no image: the bytes are of no format that Pillow reads", 5: "no image: the row has none"}
    plain = run(tmp_path / "a", batch=4)
    assert [row["classes"] for row in rows[6:20]] == [row["classes"] for row in plain[6:]]
    assert rows[-1]["path"] == str(paths[0]) and rows[-1]["scores"] == pytest.approx(plain[0]["scores"], rel=1e-4)


def test_a_column_as_hugging_faces_datasets_writes_it(tmp_path):
    paths = write_images(tmp_path / "a", 3)
    cells = [{"bytes": paths[0].read_bytes(), "path": "x.png"}, {"bytes": None, "path": str(paths[1])}, None]
    file = table(tmp_path / "t.parquet", {"image": cells, "other": [b"x"] * 3})
    rows = run(str(tmp_path / "*.parquet"))
    assert [row["error"] for row in rows] == [None, None, "no image: the row has none"]
    assert [row["scores"] for row in rows[:2]] == [row["scores"] for row in run(tmp_path / "a", batch=2)[:2]]
    with pytest.raises(ValueError, match="got the columns {.*}, expected a column of bytes"):
        run(file, column="label")


def test_any_row_is_a_start(tmp_path):
    """What a resumed run does, across row groups and the batches that are read."""
    file = table(tmp_path / "t.parquet", {"image": [b"%d" % place for place in range(50)]}, row_group_size=20)
    for start in (0, 1, 16, 19, 20, 21, 37, 49, 50):
        items = list(Images([file, file]).items(start))
        assert [item.data for item in items] == [b"%d" % place for place in [*range(start, 50), *range(50)]]
        assert [item.row for item in items] == [*range(start, 50), *range(50)]


def test_damaged_and_ambiguous_tables(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="source: .*bad.parquet: cannot be read: .*; expected a parquet file"):
        run(tmp_path / "bad.parquet")
    two = table(tmp_path / "two.parquet", {"a": [b"x"], "b": [b"y"]})
    with pytest.raises(ValueError, match="got the columns {'a': 'binary', 'b': 'binary'}"):
        run(two)
    assert [item.data for item in Images(two, column="b").items()] == [b"y"]


def test_without_pyarrow_the_message_has_the_command(tmp_path, monkeypatch):
    import sys

    (tmp_path / "t.parquet").touch()
    paths = write_images(tmp_path / "a", 1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for source, out in ((tmp_path / "t.parquet", None), (paths[0], tmp_path / "out.parquet")):
        with pytest.raises(ImportError, match=r'parquet needs pyarrow .*: pip install "fastres\[predict\]"'):
            run(source, out=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "t.parquet"]
