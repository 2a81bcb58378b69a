"""Where classes come from, what is refused, and draws that keep every class."""

import io
import shutil
import tarfile

import numpy as np
import pytest

from fastmim.config_data import DataConfig
from fastmim.errors import DataError
from fastmim.evaluate.labels import draw_shots, hold_out, read_labelled, with_classes_of


def labelled(source, labels=None, option="--data"):
    return read_labelled(str(source), DataConfig(), None if labels is None else str(labels), option)


def by_name(images):
    """Class name by file name."""
    names = (images.index.name(row).rpartition("/")[2] for row in images.rows)
    return dict(zip(names, (images.class_names[label] for label in images.labels), strict=True))


@pytest.fixture
def flat(train_folder, tmp_path):
    """The same images without folders."""
    (tmp_path / "flat").mkdir()
    for path in train_folder.rglob("*.png"):
        shutil.copy(path, tmp_path / "flat" / path.name)
    return tmp_path / "flat"


def write_table(path, rows, header="file,label"):
    path.write_text("\n".join([header, *(f"{file},{label}" for file, label in rows)]) + "\n")
    return path


def test_folders_and_a_table_give_the_same_classes(train_folder, flat, tmp_path):
    images = labelled(train_folder)
    assert images.class_names == ("blue", "green", "red")
    assert all(name.startswith(kind) for name, kind in by_name(images).items())
    rows = [(path.name, path.name[:-6]) for path in flat.iterdir()]
    table = write_table(tmp_path / "labels.csv", [*rows, ("of_another_set.png", "violet")])
    assert by_name(labelled(flat, table)) == by_name(images)


def test_classes_that_are_numbers_stand_in_their_order(flat, tmp_path):
    rows = [(path.name, ["2", "10", "9"][i % 3]) for i, path in enumerate(flat.iterdir())]
    assert labelled(flat, write_table(tmp_path / "t.csv", rows)).class_names == ("2", "9", "10")


def test_an_image_that_cannot_be_used_is_refused(train_folder, tmp_path):
    shutil.copytree(train_folder, tmp_path / "some")
    (tmp_path / "some" / "words.txt").write_bytes(b"no image, nor called one")
    (tmp_path / "some" / "red" / ".keep").touch()
    (tmp_path / "some" / "red" / "notes.txt").symlink_to("/nowhere/notes.txt")
    (tmp_path / "some" / "red" / "again").symlink_to(tmp_path / "some")
    assert len(labelled(tmp_path / "some")) == 36
    (tmp_path / "some" / "red" / "zz.jfif").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"--test .*some: 1 beside 36 images cannot be used, such as red/zz.jfif: "
    ):
        labelled(tmp_path / "some", option="--test")


def test_shards_and_arrays(train_folder, tmp_path):
    paths = sorted(train_folder.rglob("*.png"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, path in enumerate(paths):
            for suffix, data in (("png", path.read_bytes()), ("cls", b"%d" % (i % 3))):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert labelled(tmp_path / "a.tar").labels.tolist() == [i % 3 for i in range(len(paths))]
    (tmp_path / "b.tar").write_bytes(b"no shard at all")
    with pytest.raises(
        DataError, match=r"1 beside 36 images cannot be used, such as .*b.tar: no uncompressed tar"
    ):
        labelled(tmp_path / "*.tar")
    np.save(tmp_path / "x.npy", np.zeros((6, 8, 8, 3), np.uint8))
    np.save(tmp_path / "y.npy", np.array([0, 1, 1, 0, 2, 2], np.uint8))
    assert labelled(tmp_path / "x.npy", tmp_path / "y.npy").labels.tolist() == [0, 1, 1, 0, 2, 2]


def refused(source, labels=None, option="--data"):
    with pytest.raises(DataError) as told:
        labelled(source, labels, option)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_what_is_no_labelled_set_is_refused_in_one_line(train_folder, flat, tmp_path, make_classes):
    assert "no labels; expected class folders, .cls members in shards, or labels=PATH" in refused(flat)
    assert "labels='x.txt'; expected an .npy of integers or a .csv" in refused(flat, "x.txt")
    mixed = make_classes(blue=2, red=2)
    shutil.copy(mixed / "red" / "red00.png", mixed / "stray.png")
    assert "1 of 5 images have no class" in refused(mixed) and "stray.png" in refused(mixed)
    empty = make_classes(blue=2, red=2)
    (empty / "violet").mkdir()
    assert "no usable image in class folder 'violet'" in refused(empty, option="--test")
    assert "holds the one class 'blue'" in refused(make_classes(blue=2))

    rows = [(path.name, "a" if i % 2 else "b") for i, path in enumerate(sorted(flat.iterdir()))]
    table = tmp_path / "t.csv"
    assert f"1 of 36 images have no class, such as {flat}/blue00.png" in refused(
        flat, write_table(table, rows[1:])
    )
    assert "begins with 'name,kind'; expected 'file,label'" in refused(
        flat, write_table(table, [], "name,kind")
    )
    assert "line 38: blue00.png is 'b' and 'c'" in refused(
        flat, write_table(table, [*rows, ("blue00.png", "c")])
    )
    assert "line 2: 'blue00.png,'" in refused(flat, write_table(table, [("blue00.png", "")]))

    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8, 3), np.uint8))
    for values, wanted in {
        (0, 1, 1): "holds int64 [3]; expected integers [4], one an image of --data",
        (0.0, 1.0, 1.0, 0.0): "holds float64 [4]",
        (0, 1, -1, 0): "holds -1; expected classes from 0",
        (0, 2, 2, 0): "no image of class '1'",
        (0, 1, 10**9, 0): "holds class 1000000000; expected fewer classes than images",
    }.items():
        np.save(tmp_path / "y.npy", np.array(values))
        assert wanted in refused(tmp_path / "x.npy", tmp_path / "y.npy")
    assert "expected a .csv for files" in refused(flat, tmp_path / "y.npy")
    assert "images have no names" in refused(tmp_path / "x.npy", table)


def test_test_classes_are_counted_as_training_counts_them(
    train_folder, test_folder, make_classes, flat, tmp_path
):
    folders = make_classes(blue=2, red=2)
    (folders / "blue").rename(folders / "10")
    (folders / "red").rename(folders / "2")
    table = write_table(
        tmp_path / "t.csv", [(p.name, "10" if "blue" in p.name else "2") for p in flat.iterdir()]
    )
    train, test = labelled(folders), labelled(flat, table)
    assert (train.class_names, test.class_names) == (("10", "2"), ("2", "10"))
    assert by_name(with_classes_of(test, train)) == by_name(test)
    train, test = labelled(train_folder), labelled(test_folder)
    assert by_name(with_classes_of(test, train)) == by_name(test)
    with pytest.raises(DataError, match=r"differ: --test lacks class 'green'$"):
        with_classes_of(labelled(make_classes(blue=1, red=1)), train)
    with pytest.raises(DataError, match=r"differ: --data lacks class 'red'$"):
        with_classes_of(test, labelled(make_classes(blue=1, green=1)))


def test_draws_keep_every_class_and_are_functions_of_the_seed(train_folder):
    images = labelled(train_folder)
    stay, held = hold_out(images, 0.25, 4, "test_share")
    assert np.bincount(held.labels).tolist() == [4, 3, 2]
    assert sorted([*stay.rows, *held.rows]) == list(range(36))
    assert np.array_equal(hold_out(images, 0.25, 4, "test_share")[1].rows, held.rows)
    assert not np.array_equal(hold_out(images, 0.25, 5, "test_share")[1].rows, held.rows)
    shots = [draw_shots(images, 3, 0, draw) for draw in range(40)]
    assert all(np.bincount(images.labels[places]).tolist() == [3, 3, 3] for places in shots)
    assert set(np.concatenate(shots)) == set(range(36)), "some image is never drawn"
    with pytest.raises(DataError, match="shots=11; expected at most the 10 training images of class 'red'"):
        draw_shots(images, 11, 0, 0)
