import pytest
from PIL import Image

from fastmim.data import demo
from fastmim.data.index import build_index
from fastmim.errors import DataError
from fastmim.evaluate.labels import read_labelled

PARTS = ("train", "heldout")


def test_the_demo_set(tmp_path, configure):
    out = demo.prepare_elpv(tmp_path / "elpv")
    train, held_out = (sorted(path.name for path in (out / part).iterdir()) for part in PARTS)
    assert len(train) == 2460 and len(held_out) == 164 and not set(train) & set(held_out)
    assert sorted(train + held_out)[::16] == held_out
    index = build_index(str(out / "heldout"), configure(1), progress=False)
    assert len(index) == 164 and (index.heights == 300).all() and not index.rejected
    assert [path.name for path in tmp_path.iterdir()] == ["elpv"]


def test_one_table_labels_both_parts(tmp_path, configure):
    out = demo.prepare_elpv(tmp_path / "elpv")
    read = {
        part: read_labelled(str(out / part), configure(1), str(out / demo.LABELS), part) for part in PARTS
    }
    assert all(images.class_names == ("defective", "whole") for images in read.values())
    # As the package's own table has it: 715 cells of probability 1, 106 of 2/3.
    assert sum((images.labels == 0).sum() for images in read.values()) == 821
    (out / demo.LABELS).unlink()
    assert (
        (demo.prepare_elpv(out) / demo.LABELS).read_text().startswith("file,label\ncell0001.png,defective\n")
    )


def test_a_second_call_changes_nothing(tmp_path):
    out = demo.prepare_elpv(tmp_path / "elpv")
    (out / "train" / "cell0002.png").unlink()
    before = (out / "train").stat().st_mtime_ns
    demo.prepare_elpv(out)
    assert (out / "train").stat().st_mtime_ns == before


def test_an_interrupted_call_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def link(image, target):
        calls.append(image)
        if len(calls) == 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_link", link)
    with pytest.raises(KeyboardInterrupt):
        demo.prepare_elpv(tmp_path / "elpv")
    assert list(tmp_path.iterdir()) == []


def test_copies_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(demo.os, "link", refuse)
    out = demo.prepare_elpv(tmp_path / "elpv")
    with Image.open(out / "heldout" / "cell0001.png") as picture:
        assert picture.size == (300, 300)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_PACKAGE", "no_such_package")
    with pytest.raises(DataError, match=r"pip install 'fastmim\[demo\]'"):
        demo.prepare_elpv(tmp_path / "elpv")


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(DataError, match="holds no train"):
        demo.prepare_elpv(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
