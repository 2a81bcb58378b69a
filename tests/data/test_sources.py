import tarfile

import pytest


def test_links_stay_inside(tmp_path, photo, index_of, names):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
        photo(20, 20).save(folder / "1.png")
    (root / "inside.png").symlink_to("a/1.png")
    (root / "alias").symlink_to("a")
    (root / "out.png").symlink_to(outside / "1.png")
    (root / "out").symlink_to(outside)
    (root / "sibling").symlink_to(tmp_path / "root-2")
    (tmp_path / "root-2").mkdir()
    (root / "a" / "loop").symlink_to("..")
    (root / "self").symlink_to(".")
    (root / "nothing.png").symlink_to("gone.png")
    (root / "circle").symlink_to("circle")
    index = index_of(root)
    assert names(index) == ["a/1.png", "alias/1.png", "inside.png"]
    assert dict(index.rejected) == {
        "a/loop": "a link that leads back up",
        "alias/loop": "a link that leads back up",
        "circle": "cannot be read (Too many levels of symbolic links)",
        "nothing.png": "a link to nothing",
        "out": "a link that leaves the folder",
        "out.png": "a link that leaves the folder",
        "self": "a link that leads back up",
        "sibling": "a link that leaves the folder",
    }


def test_tar_members(tmp_path, photo, index_of, names, add, encoded):
    png = encoded(photo(20, 30))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "folder/2.cls", b"5\n")
        add(tar, "folder/2.png", png)
        add(tar, "1.jpg", encoded(photo(50, 40), "jpg"))
        add(tar, "1.json", b"{}")
        add(tar, "1.mask.png", png)
        add(tar, "3.PNG", png)
        add(tar, "3.cls", b"cat")
        add(tar, "4.png")
        add(tar, "5.png", b"text")
        add(tar, "6.png", png[:-50])
        add(tar, "7.mask.png", png)
        add(tar, "/absolute.png", png)
        add(tar, "../up.png", png)
        add(tar, "a/../../up.png", png)
        add(tar, "soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="1.jpg")
        add(tar, "device.png", type=tarfile.CHRTYPE)
        add(tar, "long/" + "x" * 150 + ".png", png)
    index = index_of(tmp_path / "a.tar")
    assert names(index) == ["folder/2.png", "1.jpg", "3.PNG", "long/" + "x" * 150 + ".png"]
    assert index.classes.tolist() == [5, -1, -1, -1] and index.class_names[5] == "5"
    whole = (tmp_path / "a.tar").read_bytes()
    assert whole[index.offsets[0] :].startswith(png) and index.sizes[0] == len(png)
    assert index.name(1) == f"{tmp_path}/a.tar:1.jpg"
    reasons = {location.removeprefix(f"{tmp_path}/a.tar:"): reason for location, reason in index.rejected}
    expected = {
        "3.cls": "expected an integer from 0",
        "4.png": "empty file",
        "5.png": "not a JPEG",
        "6.png": "no IEND",
        "7.mask.png": "component 'mask.png'",
        "/absolute.png": "an absolute path",
        "../up.png": "a path with '..'",
        "a/../../up.png": "a path with '..'",
        "soft.png": "a link",
        "hard.png": "a link",
        "device.png": "not a plain file",
    }
    assert reasons.keys() == expected.keys()
    for location, reason in expected.items():
        assert reason in reasons[location]


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_shard_keeps_its_whole_members(tmp_path, photo, index_of, damage, names, make_shards):
    make_shards(tmp_path, 1)
    data = (tmp_path / "0.tar").read_bytes()
    second = index_of(tmp_path / "0.tar").offsets[1]
    tail = b"\1" * 512 + data[second:]  # in place of the second member's header
    data = data[: second + 100] if damage == "cut" else data[: second - 512] + tail
    (tmp_path / "0.tar").write_bytes(data)
    index = index_of(tmp_path / "0.tar")
    assert names(index) == ["0-0.png"] and len(index.rejected) >= 1
    assert any(word in index.rejected[0][1] for word in ("truncated", "no tar header"))
