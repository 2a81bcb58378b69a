"""The `fastmim` command, typed as a user types it."""

import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from fastmim.cli import main
from fastmim.evaluate.protocols import PROTOCOLS
from tests.launching import ROOT, TINY_YAML, environment, train, write_images


def fastmim(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fastmim", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_config_prints_values_and_sources(capsys):
    assert main(["config", "quickstart", "optim.epochs=3"]) == 0
    told = capsys.readouterr().out
    assert (
        "epochs: 3.0" in told and "# command line" in told and "# quickstart" in told and "# default" in told
    )


def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path):
    assert main(["config", "quickstart", "optim.epoch=3"]) == 2
    assert capsys.readouterr().err.startswith(
        "fastmim config: optim.epoch=3: unknown key; did you mean optim.epochs?"
    )
    assert main(["index", str(tmp_path), "optim.batch_size=3"]) == 2
    assert "optim.batch_size=3: an index depends on data alone" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["profile", "quickstart", "--steps", "0"])
    assert "argument --steps: 0; expected an integer > 0" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    out = str(tmp_path / "x.png")
    assert main(["reconstruct", "--checkpoint", str(tmp_path / "none"), "--images", ".", "--out", out]) == 2
    assert "expected a run or a checkpoint directory" in capsys.readouterr().err
    assert main(["reconstruct", "--checkpoint", ".", "--images", ".", "--out", "x.jpg"]) == 2
    assert "--out x.jpg: expected a file whose name ends in .png" in capsys.readouterr().err


def test_index_says_what_is_there(tmp_path, capsys):
    write_images(tmp_path / "images", 5)
    (tmp_path / "images" / "empty.jpg").touch()
    assert main(["index", str(tmp_path / "images")]) == 0
    told = capsys.readouterr().out
    assert "5 images" in told and "empty.jpg" in told


def test_index_loads_neither_torch_nor_dali(tmp_path):
    write_images(tmp_path / "images", 2)
    code = (
        "import sys; from fastmim.cli import main; main(['index', 'images']); "
        "sys.exit('torch' in sys.modules or 'nvidia.dali' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=False).returncode
        == 0
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_images(folder / "images", 10)
    (folder / "tiny.yaml").write_text(TINY_YAML)
    overrides = ["objective.norm_pix_loss=true", "train.ema_decay=0.5", "log.reconstruct_every_steps=2"]
    train(folder / "tiny.yaml", "data.source=images", "output=run", "train.max_steps=3", *overrides)
    return folder / "run"


def test_a_run_leaves_pictures_a_curve_and_its_configuration(run):
    for name in ("reconstructions.png", "loss.png"):
        with Image.open(run / name) as picture:
            assert picture.size[0] > 300
    assert "norm_pix_loss: true" in (run / "config.yaml").read_text()
    assert "command line" not in (run / "config.yaml").read_text()


def test_reconstruct_draws_any_images_and_tells_of_norm_pix(run, tmp_path, capsys):
    write_images(tmp_path / "mine", 3, seed=9, suffix=".jpg")
    out = tmp_path / "deep" / "sheet.png"
    arguments = [
        "reconstruct",
        "--checkpoint",
        str(run),
        "--images",
        str(tmp_path / "mine"),
        "--out",
        str(out),
    ]
    assert main([*arguments, "--count", "2"]) == 0
    told = capsys.readouterr().out
    assert "2 of 3 images; run, step 3, 75% of the patches removed" in told
    assert "trained with norm_pix: mean and contrast of a removed patch are estimated" in told
    first = out.read_bytes()
    assert main([*arguments, "--count", "2", "--seed", "1"]) == 0
    assert out.read_bytes() != first
    assert main([*arguments, "--count", "2", "--ema"]) == 0


def test_help_names_every_command():
    told = fastmim("--help").stdout
    assert all(name in told for name in ("config", "index", "reconstruct", "data"))


def test_help_names_every_setting_of_a_protocol():
    told = " ".join(fastmim("evaluate", "--help").stdout.split())
    for name, protocol in PROTOCOLS.items():
        words = told.partition(f" {name}: ")[2].split(" ")
        for key, word in zip(protocol.config.model_fields, words, strict=False):
            assert word.startswith(f"{key}="), (name, word)
    for word in (
        "temperature=0.07",
        "masks=...",
        "scale=[0.08,1]",
        "stride=0.6666666666666666",
        "min_lr=1e-06",
    ):
        assert word in told.split(" ")


def test_the_wheel_installs_fastmim_alone(tmp_path):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "data", "*.egg-info", "build"))
    # `data` above is the demo set; the package of that name is needed.
    shutil.copytree(ROOT / "fastmim" / "data", source / "fastmim" / "data", dirs_exist_ok=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastmim"}
    assert "fastmim/kernels/masked_pixel_loss.py" in names and "fastmim/recipes/quickstart.yaml" in names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastmim").rglob("*.py")}
    sources |= {f"fastmim/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_index_takes_options_and_overrides_in_any_order_and_lists_all(tmp_path, capsys):
    write_images(tmp_path / "images", 3)
    for i in range(8):
        (tmp_path / "images" / f"empty{i}.jpg").touch()
    assert main(["index", str(tmp_path / "images"), "--all", "data.channels=1"]) == 0
    told = capsys.readouterr().out
    assert all(f"empty{i}.jpg" in told for i in range(8))
    assert main(["index", str(tmp_path / "images")]) == 0
    assert "and 3 more (fastmim index --all names them)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["index", str(tmp_path / "images"), "--al1"])
