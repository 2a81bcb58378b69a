"""Running launch.py as its users do: in processes of its own, on real files."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent

# A model that steps in milliseconds; float32 without ZeRO unless a test asks for more.
TINY_YAML = """
model: {size: null, width: 32, depth: 2, heads: 2, patch_size: 8}
objective: {norm_pix_loss: false, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
data: {image_size: 32, threads: 1}
optim: {batch_size: 8, blr: 1.0e-2, epochs: 10, warmup_epochs: 1}
train: {precision: fp32}
checkpoint: {every_minutes: null}
log: {every_steps: 1, tensorboard: false}
"""


def write_images(folder: Path, count: int, seed: int = 0, suffix: str = ".png") -> Path:
    """Smooth random colour pictures of several sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        width, height = random.integers(36, 64, 2)
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / f"{i:04d}{suffix}")
    return folder


def environment(**changes: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        **changes,
    }


def command(recipe: Path, *arguments: str, ranks: int = 1) -> list[str]:
    script = [str(ROOT / "launch.py"), "--config", str(recipe), *arguments]
    return [sys.executable, *script] if ranks == 1 else [*_launcher(ranks), *script]


def run_command(words: list[str], ranks: int = 1, folder: Path | None = None) -> subprocess.CompletedProcess:
    """`fastmim WORDS` to the end, in a folder."""
    starter = [sys.executable, "-m"] if ranks == 1 else [*_launcher(ranks), "--module"]
    return subprocess.run(
        [*starter, "fastmim.cli", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _launcher(ranks: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [str(SCRIPTS / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port)]


def launch(recipe: Path, *arguments: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess:
    """Run to the end; the output holds both streams."""
    return subprocess.run(
        command(recipe, *arguments, ranks=ranks),
        env=environment(**env),
        cwd=recipe.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def train(recipe: Path, *arguments: str, ranks: int = 1, **env: str) -> list[dict]:
    """Run to the end and return the records; the run must succeed and its output be `output=NAME`."""
    done = launch(recipe, *arguments, ranks=ranks, **env)
    assert done.returncode == 0, done.stdout
    output = next(word.removeprefix("output=") for word in arguments if word.startswith("output="))
    return records(recipe.parent / output)


def start(recipe: Path, *arguments: str, ranks: int = 1, **env: str) -> subprocess.Popen:
    """Run in the background, in a process group of its own."""
    with (recipe.parent / "background.log").open("a") as log:
        return subprocess.Popen(
            command(recipe, *arguments, ranks=ranks),
            env=environment(**env),
            cwd=recipe.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def signal_group(process: subprocess.Popen, number: int, seconds: float = 90) -> None:
    """Signal every process of a run, as a terminal or a scheduler does, and wait until all have ended."""
    os.killpg(process.pid, number)
    process.wait(seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise TimeoutError("the run did not end")


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines]


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Poll until the condition holds; the process must live until then."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before what the test waits for"
        assert time.monotonic() < end, "the run did not get there in time"
        time.sleep(0.005)


def losses(of_run: list[dict]) -> list[float]:
    return [record["loss"] for record in of_run]
