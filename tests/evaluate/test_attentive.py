"""Attentive probing: the module as the paper writes it, in float64, and patches that a mean would lose."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from fastmim.cli import main
from fastmim.evaluate.attentive import AttentiveHead, normalised, train_attentive
from fastmim.evaluate.config import AttentiveConfig, KnnConfig
from fastmim.evaluate.encoder import load_encoder
from fastmim.evaluate.features import FeatureExtractor
from fastmim.evaluate.labels import read_labelled
from fastmim.evaluate.logistic import fit_logistic

WIDTH, PATCHES, CLASSES, HEADS = 12, 9, 3, 3


def attentive_reference(tokens, p, key_bias):
    """Norms, projections of every patch, attention head by head, projection, BatchNorm, linear.

    tokens [B, N, D] float64; p: parameters by name; key_bias [D], of a projection of keys that has one.
    """

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * p[f"{name}.weight"] + p.get(f"{name}.bias", 0)

    query = norm(p["query"], "norm_q") @ p["q.weight"].T + p["q.bias"]
    keys = norm(tokens, "norm_k") @ p["k.weight"].T + key_bias
    values = norm(tokens, "norm_v") @ p["v.weight"].T + p["v.bias"]
    size = WIDTH // HEADS
    found = []
    for image in range(len(tokens)):
        parts = []
        for head in range(HEADS):
            rows = slice(head * size, (head + 1) * size)
            scores = keys[image][:, rows] @ query[0, rows] / size**0.5
            weights = scores.exp() / scores.exp().sum()
            parts.append((weights[:, None] * values[image][:, rows]).sum(0))
        found.append(torch.cat(parts) @ p["proj.weight"].T + p["proj.bias"])
    x = torch.stack(found)
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
    return x @ p["fc.weight"].T + p["fc.bias"]


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = AttentiveHead(WIDTH, HEADS, CLASSES).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return head


def test_the_module_is_the_papers(head):
    tokens = 3 * torch.randn(5, PATCHES, WIDTH, dtype=torch.float64) + 1
    parameters = {name: value.detach().clone().requires_grad_() for name, value in head.named_parameters()}
    # Keys whose projection has a bias are attended to alike.
    wanted = attentive_reference(tokens, parameters, torch.randn(WIDTH, dtype=torch.float64))
    told = head(normalised(tokens))
    torch.testing.assert_close(told, wanted, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(wanted)
    told.backward(cotangent)
    wanted.backward(cotangent)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            parameters[name].grad,
            rtol=1e-7,
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


class Views:
    """Stands for an extractor: noise, and in one patch of a random place a mark that tells the class by its sign."""

    device, width = torch.device("cpu"), WIDTH

    def epoch(self, train, epoch, config):
        for part in range(2):
            random = np.random.default_rng([config.seed, epoch, part])
            labels = random.integers(0, 2, 32)
            yield self.patches(labels, random), torch.tensor(labels)

    def patches(self, labels, random):
        patches = random.normal(size=(len(labels), PATCHES, WIDTH)).astype(np.float32)
        # Whichever patch is marked, another one has the opposite sign: a mean over patches tells nothing.
        for row, label in enumerate(labels):
            real, fake = random.choice(PATCHES, 2, replace=False)
            patches[row, real, :2] = 6, 6 * (2 * label - 1)
            patches[row, fake, :2] = -6, -6 * (2 * label - 1)
        return torch.tensor(patches)


class Train:
    class_names = ("no", "yes")

    def __len__(self):
        return 64


CONFIG = AttentiveConfig(
    lr=[0.2, 1e-4], heads=2, batch_size=32, epochs=25, warmup_epochs=2, validation=0.5, images_at_once=32
)


def accuracy(head, patches, labels):
    with torch.no_grad():
        return (head(normalised(patches)).argmax(1) == labels).double().mean().item()


def test_it_finds_the_one_patch_that_tells_where_a_mean_is_blind():
    heads, losses = train_attentive(Views(), Train(), CONFIG)
    random = np.random.default_rng(99)
    labels = random.integers(0, 2, 400)
    asked, labels = Views().patches(labels, random), torch.tensor(labels)
    assert accuracy(heads[0], asked, labels) > 0.95
    assert losses[0] < 0.3 < losses[1] and accuracy(heads[1], asked, labels) < 0.8
    means, kinds = (torch.cat(x) for x in zip(*Views().epoch(None, 0, CONFIG), strict=True))
    blind = fit_logistic(means.mean(1), kinds, 2, 1e-2, 200)
    assert (blind(asked.mean(1)).argmax(1) == labels).double().mean() < 0.65


def test_a_head_of_a_sweep_is_the_head_alone_and_every_run_is_the_same():
    both, losses = train_attentive(Views(), Train(), CONFIG)
    (alone,), (loss,) = train_attentive(
        Views(), Train(), AttentiveConfig(**CONFIG.model_dump(exclude={"lr", "validation"}), lr=0.2)
    )
    assert losses[0] == loss
    for name, value in alone.state_dict().items():
        assert torch.equal(value, both[0].state_dict()[name]), name


def test_statistics_are_the_mean_over_the_last_epoch():
    config = CONFIG.model_copy(update={"lr": [1e-12], "epochs": 3})
    (head,), _ = train_attentive(Views(), Train(), config)
    seen = []
    head.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for patches, _ in Views().epoch(None, 2, config):
        head(normalised(patches))
    torch.testing.assert_close(head.norm.running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(head.norm.running_var, torch.stack([x.var(0) for x in seen]).mean(0))


def test_patches_come_in_parts_and_are_what_a_mean_is_of(weights, train_folder):
    encoder, config = load_encoder(str(weights))
    images = read_labelled(str(train_folder), config.data, None, "--data")
    told = {
        kind: list(FeatureExtractor(encoder, config, kind(images_at_once=7)).centre_parts(images))
        for kind in (AttentiveConfig, partial(KnnConfig, pool="mean"))
    }
    patches, means = told.values()
    assert [part.shape for part in patches] == [(7, 16, 32)] * 5 + [(1, 16, 32)]
    torch.testing.assert_close(torch.cat(patches).mean(1), torch.cat(means))


@pytest.fixture
def command(weights, train_folder, test_folder, tmp_path):
    """Runs the protocol; returns the exit code."""

    def run(*words, out="out"):
        options = [
            "--weights",
            weights,
            "--data",
            train_folder,
            "--test",
            test_folder,
            "--out",
            tmp_path / out,
        ]
        return main(["evaluate", "attentive", *map(str, options), *words])

    return run


def test_the_command_tells_a_sweep_that_validation_images_decide(command, tmp_path):
    words = ["--recipe", "attentive_small", "batch_size=8", "epochs=20", "warmup_epochs=1", "lr=[1e-9,0.2]"]
    told = []
    for out in ("out", "again"):
        assert command(*words, out=out) == 0
        told.append(json.loads((tmp_path / out / "eval.json").read_text()))
    told, again = told
    assert told | {"seconds": 0} == again | {"seconds": 0}
    assert told["top1"] > 0.85 and [row["chosen"] for row in told["sweep"]] == [False, True]
    assert told["settings"]["heads"] == 2 and told["settings"]["pool"] == "patches"


def test_bad_input_is_one_line(command, capsys):
    refused = {
        "batch_size=8192; expected at most the 36 training images": [],
        "heads=5; expected a divisor of the encoder's width 32": ["heads=5"],
        "pool='cls'; expected 'patches'": ["pool=cls"],
        "validation=0.2 with lr=[0.4]; expected several": ["validation=0.2"],
        "warmup_epochs=5; expected less than epochs=5": ["epochs=5", "warmup_epochs=5"],
        "scale=[0.5, 0.2]; expected 0 < lowest": ["scale=[0.5,0.2]"],
        "lr.0=-1": ["lr=-1"],
        "blr=0.1: unknown key; did you mean lr?": ["blr=0.1"],
    }
    for message, words in refused.items():
        assert command(*words) == 2
        assert message in capsys.readouterr().err
