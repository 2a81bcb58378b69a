import logging
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fastmim.data import headers, scan
from fastmim.data import index as indexing
from fastmim.errors import DataError


def test_a_folder_in_order_with_sizes(make_folder, index_of, names):
    folder = make_folder(9)
    index = index_of(folder)
    assert names(index) == sorted(path.name for path in folder.iterdir()) and index.kind == "folder"
    for i, path in enumerate(sorted(folder.iterdir())):
        with Image.open(path) as picture:
            assert (index.widths[i], index.heights[i]) == picture.size
        assert index.sizes[i] == path.stat().st_size
        assert index.name(i) == str(path)
    assert (index.classes == -1).all() and index.class_names == () and index.rejected == ()
    assert "9 images" in index.summary()


def test_classes_are_first_level_folders(tmp_path, photo, index_of, names):
    for name in ("b/x/1.png", "b/2.png", "a-b/3.png", "a/4.png", "5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(20, 30).save(tmp_path / name)
    index = index_of(tmp_path)
    assert index.class_names == ("a", "a-b", "b")
    found = {name: int(label) for name, label in zip(names(index), index.classes, strict=True)}
    assert found == {"b/x/1.png": 2, "b/2.png": 2, "a-b/3.png": 1, "a/4.png": 0, "5.png": -1}


def test_shards_in_order(tmp_path, photo, index_of, names, make_shards):
    make_shards(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 500)
    index = index_of(tmp_path / "*.tar")
    assert names(index) == [f"{shard}-{i}.png" for shard in range(3) for i in range(2)]
    assert index.heights.tolist() == [20, 20, 21, 21, 22, 22]
    assert index.shard_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert index.shards == ("0.tar", "1.tar", "2.tar", "broken.tar")
    ((location, reason),) = index.rejected
    assert location == f"{tmp_path}/broken.tar" and "no uncompressed tar" in reason


def test_only_a_changed_file_is_read_again(make_folder, photo, index_of, reads, names):
    folder = make_folder(9)
    (folder / "bad.png").write_bytes(b"text")
    first = index_of(folder)
    assert len(reads) == 10
    again = index_of(folder)
    assert len(reads) == 10 and again.fingerprint == first.fingerprint and again.rejected == first.rejected
    photo(33, 44).save(folder / "004.jpg")
    photo(20, 20).save(folder / "added.png")
    (folder / "001.png").unlink()
    third = index_of(folder)
    assert len(reads) == 12
    assert third.heights[names(third).index("004.jpg")] == 33 and third.rejected == first.rejected
    assert third.fingerprint != first.fingerprint
    os.utime(folder / "000.jpg", ns=(1, 1))
    index_of(folder)
    assert len(reads) == 13
    index_of(folder, refresh=True)
    assert len(reads) == 23


def test_a_scan_that_was_interrupted_goes_on(make_folder, index_of, reads, monkeypatch):
    folder = make_folder(9)
    monkeypatch.setattr(headers, "_CHUNK", 1)
    monkeypatch.setattr(headers, "_THREADS", 1)
    counted = scan.read_header

    def interrupt(file, size):
        if len(reads) == 4:
            raise KeyboardInterrupt
        return counted(file, size)

    monkeypatch.setattr(scan, "read_header", interrupt)
    with pytest.raises(KeyboardInterrupt):
        index_of(folder)
    monkeypatch.setattr(scan, "read_header", counted)
    assert len(index_of(folder)) == 9 and len(reads) == 9


def test_a_long_scan_is_kept_while_it_goes_on(make_folder, index_of, cache, monkeypatch):
    folder = make_folder(4)
    monkeypatch.setattr(headers, "_CHUNK", 1)
    monkeypatch.setattr(headers, "_THREADS", 1)
    monkeypatch.setattr(headers, "_KEEP_EVERY_S", 0)
    store, heights = indexing.store_table, []

    def observe(path, table, notes):
        heights.append(table.heights.copy())
        store(path, table, notes)

    monkeypatch.setattr(indexing, "store_table", observe)
    index_of(folder)
    assert [np.count_nonzero(known) for known in heights] == [1, 2, 3, 4, 4]


def test_a_file_that_could_not_be_read_is_tried_again(make_folder, index_of, monkeypatch):
    folder = make_folder(3)
    opened = scan.read_header

    def refuse(file, size):
        if b"001." in file.name:
            raise PermissionError(13, "Permission denied")
        return opened(file, size)

    monkeypatch.setattr(scan, "read_header", refuse)
    assert len(index_of(folder)) == 2
    monkeypatch.setattr(scan, "read_header", opened)
    assert len(index_of(folder)) == 3


def test_limits_may_change_without_reading_again(make_folder, index_of, reads):
    folder = make_folder(6, suffixes=("png",))
    sizes = sorted(path.stat().st_size for path in folder.iterdir())
    assert len(index_of(folder, max_file_bytes=sizes[2])) == 3 and len(reads) == 3
    assert len(index_of(folder)) == 6 and len(reads) == 6
    assert len(index_of(folder, max_file_bytes=sizes[2])) == 3 and len(reads) == 6
    largest = int((index_of(folder).heights * index_of(folder).widths).max())
    assert len(index_of(folder, max_pixels=largest - 1)) < 6 and len(reads) == 6


def test_only_a_changed_shard_is_read_again(tmp_path, photo, index_of, reads, add, encoded, make_shards):
    make_shards(tmp_path)
    first = index_of(tmp_path / "*.tar")
    assert len(reads) == 6
    assert index_of(tmp_path / "*.tar").fingerprint == first.fingerprint and len(reads) == 6
    with tarfile.open(tmp_path / "1.tar", "a") as tar:
        add(tar, "more.png", encoded(photo(9, 9)))
        add(tar, "/refused.png", b"x")
    changed = index_of(tmp_path / "*.tar")
    assert len(changed) == 7 and len(reads) == 9
    assert index_of(tmp_path / "*.tar").rejected == changed.rejected != () and len(reads) == 9


def test_a_damaged_cache_is_scanned_again(make_folder, index_of, cache, reads, caplog):
    folder = make_folder(3)
    first = index_of(folder)
    (file,) = (cache / "index").iterdir()
    for damage in (b"", b"junk", file.read_bytes()[:-100]):
        file.write_bytes(damage)
        with caplog.at_level(logging.WARNING, "fastmim"):
            assert index_of(folder).fingerprint == first.fingerprint
    assert len(reads) == 12 and len(caplog.messages) == 3


def test_an_unwritable_cache_is_no_obstacle(make_folder, index_of, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path / "file"))
    assert len(index_of(make_folder(2))) == 2
    assert "cannot be written" in caplog.text


def test_several_scans_at_once(make_folder, index_of, cache):
    folder = make_folder(20)
    with ThreadPoolExecutor(8) as pool:
        prints = {
            index.fingerprint for index in pool.map(lambda _: index_of(folder, refresh=True), range(16))
        }
    assert len(prints) == 1
    assert [path.suffix for path in (cache / "index").iterdir()] == [".npz"]


@pytest.mark.parametrize("kind", ["folder", "tar", "npy"])
def test_a_moved_set_has_the_same_fingerprint(kind, tmp_path, photo, make_folder, index_of, make_shards):
    here = make_folder(4, "here") if kind == "folder" else tmp_path / "here"
    if kind == "tar":
        make_shards(here)
    if kind == "npy":
        here.mkdir()
        np.save(here / "a.npy", np.zeros((2, 9, 9, 3), np.uint8))
    part = {"folder": ".", "tar": "*.tar", "npy": "a.npy"}[kind]
    there = tmp_path / "a" / "there"
    shutil.copytree(here, there)
    assert index_of(here / part).fingerprint == index_of(there / part).fingerprint
    if kind == "folder":
        (there / "000.jpg").rename(there / "renamed.jpg")
        assert index_of(here).fingerprint != index_of(there).fingerprint


def test_no_usable_image(tmp_path, index_of):
    for name in ("a.txt", "b.txt", "c.PDF", "none"):
        (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=r"found 4 files: 2 \.txt, 1 \.pdf, 1 without a suffix") as error:
        index_of(tmp_path)
    assert "a.txt: not a JPEG" in str(error.value)


def test_no_usable_member(tmp_path, index_of, add):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.json", b"{}")
        add(tar, "b.json", b"{}")
    for _ in range(2):
        with pytest.raises(DataError, match=r"found 2 files: 2 \.json"):
            index_of(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"for shards, data.source='.*/\*\.tar'"):
        index_of(tmp_path)


def test_an_empty_folder(tmp_path, index_of):
    with pytest.raises(DataError, match="found 0 files"):
        index_of(tmp_path)


def test_a_missing_source(tmp_path, make_folder, index_of):
    make_folder(1, "images")
    with pytest.raises(DataError, match=f"imagse' does not exist; {tmp_path} holds images"):
        index_of(tmp_path / "imagse")
    with pytest.raises(DataError, match="does not exist"):
        index_of(tmp_path / "*.tar")


def test_a_file_that_is_no_source(tmp_path, index_of):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"a\.zip is no source; expected a folder"):
        index_of(tmp_path / "a.zip")


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 8, 8), np.float32), r"float32 \[2, 8, 8\]; expected uint8"),
        (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\]; expected"),
        (np.zeros((0, 8, 8), np.uint8), "not empty"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran"),
        (np.zeros((2, 8, 8, 4), np.uint8), "has 4 channels; expected data.channels=3"),
        (np.array([{}], object), "cannot be read"),
    ],
)
def test_unfit_arrays(array, message, tmp_path, index_of):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        index_of(tmp_path / "a.npy")


def test_a_text_is_no_array(tmp_path, index_of):
    (tmp_path / "a.npy").write_text("text\n")
    with pytest.raises(
        DataError, match=r"a.npy cannot be read as an .npy array \(it does not begin as one\)"
    ):
        index_of(tmp_path / "a.npy")


def test_arrays(tmp_path, index_of):
    np.save(tmp_path / "a.npy", np.zeros((1000, 8, 12), np.uint8))
    index = index_of(tmp_path / "a.npy", channels=1)
    assert len(index) == 1000 and index.heights[999] == 8 and index.widths[0] == 12
    assert index.name(7) == f"{tmp_path}/a.npy[7]" and (index.classes == -1).all()
    assert "1,000 images (npy), 8x12 pixels" in index.summary()


def test_the_index_imports_neither_torch_nor_dali():
    code = "import sys, fastmim.data.index; print({'torch', 'nvidia.dali'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"
