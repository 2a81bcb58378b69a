"""CKA against its definition, and the command on a trained run."""

import csv

import pytest
import torch

from fastmim.cli import main
from fastmim.evaluate.cka import MinibatchCKA, hsic
from tests.launching import TINY_YAML, train, write_images


def exact_cka(x, y):
    """Kornblith et al.: |Y'X|^2 / (|X'X| |Y'Y|), columns centred."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def related(n, noise):
    torch.manual_seed(1)
    x = torch.randn(n, 12) * torch.linspace(0.5, 3, 12)
    return x, x @ torch.randn(12, 7) + noise * torch.randn(n, 7)


def test_hsic_is_the_published_sum():
    x, y = (z.double() for z in related(9, 1.0))
    n = len(x)
    k, m = x @ x.T, y @ y.T
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    first = sum(k[i, j] * m[j, i] for i, j in off)
    second = sum(k[i, j] for i, j in off) * sum(m[i, j] for i, j in off) / ((n - 1) * (n - 2))
    third = sum(k[i, j] * m[j, q] for i, j in off for q in range(n) if q != j) * 2 / (n - 2)
    torch.testing.assert_close(hsic(x, y), (first + second - third) / (n * (n - 3)))


def test_batches_estimate_the_exact_score():
    x, y = related(4096, 4.0)
    cka = MinibatchCKA(1, 2)
    for rows in torch.arange(4096).split(64):
        cka.add([x[rows]], [x[rows], y[rows]])
    same, other = cka.scores()[0]
    assert same == pytest.approx(1.0)
    assert other == pytest.approx(exact_cka(x, y).item(), abs=0.02)


def test_rotation_and_scale_do_not_matter_and_noise_does():
    x, _ = related(512, 1.0)
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    cka = MinibatchCKA(1, 2)
    cka.add([x], [3 * x @ rotation + 5, torch.randn(512, 12)])
    turned, noise = cka.scores()[0]
    assert turned == pytest.approx(1.0)
    assert abs(noise) < 0.1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cka")
    (folder / "tiny.yaml").write_text(TINY_YAML)
    write_images(folder / "images", 12)
    train(folder / "tiny.yaml", "data.source=images", "output=run", "train.max_steps=2")
    return folder


def read(path):
    with path.open() as file:
        header, *rows = csv.reader(file)
    return header, [[float(value) for value in row] for row in rows]


def test_the_command_compares_masked_with_whole_images_and_runs(run, capsys):
    checkpoint, images = str(run / "run"), str(run / "images")
    options = ["--images", images, "--count", "12", "--batch", "6"]
    assert main(["cka", checkpoint, *options, "--out", str(run / "masks"), "--ratios", "0.25", "0.75"]) == 0
    header, rows = read(run / "masks" / "cka.csv")
    assert header == ["layer", "25% masked", "75% masked"] and len(rows) == 2
    assert all(-0.5 < value <= 1.2 for row in rows for value in row[1:])
    assert main(["cka", checkpoint, checkpoint, *options, "--out", str(run / "pair")]) == 0
    assert "linear CKA of 12 images" in capsys.readouterr().out
    assert main(["cka", checkpoint, checkpoint, *options[:4], "--batch", "5", "--out", str(run / "few")]) == 0
    assert "linear CKA of 10 images" in capsys.readouterr().out  # two are too few to compare
    _, rows = read(run / "pair" / "cka.csv")
    assert [row[1 + layer] for layer, row in enumerate(rows)] == pytest.approx([1.0] * len(rows))
    assert (run / "pair" / "cka.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    refused = {
        "--batch 3": ["--batch", "3"],
        "--ratios 0.99": ["--ratios", "0.99"],
    }
    for shown, words in refused.items():
        assert main(["cka", checkpoint, "--images", images, "--out", str(run / "x"), *words]) == 2
        assert shown in capsys.readouterr().err
