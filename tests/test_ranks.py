"""What ranks agree on, with two real gloo processes."""

import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from fastmim.errors import ConfigError
from fastmim.ranks import Ranks
from tests.launching import SCRIPTS, environment

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from fastmim.errors import ConfigError
from fastmim.ranks import Ranks

ranks = Ranks()
dist.init_process_group("gloo")
ranks.open_host_group()
told = {"gather": ranks.gather(ranks.rank * 10), "share": ranks.share(f"from {ranks.rank}")}
told["ran"] = ranks.run_on_first(lambda: "ran")
told["flags"] = ranks.start_flags(ranks.rank == 1, False, ranks.rank == 0).wait()
told["mean"] = ranks.mean(torch.tensor([1.0 + ranks.rank, 4.0])).tolist()

def fail():
    raise ConfigError("no good")

try:
    ranks.run_on_first(fail)
except ConfigError as error:
    told["error"] = str(error)
ranks.barrier()
with open(f"{sys.argv[1]}/{ranks.rank}.json", "w") as file:
    json.dump(told, file)
dist.destroy_process_group()
"""


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert Ranks().device == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"^2 ranks on a node with 1 GPUs; expected one rank per GPU, or CUDA_"
    ):
        Ranks()


def test_two_ranks_agree(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node=2", str(tmp_path / "script.py")]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)], env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["gather"] == second["gather"] == [0, 10]
    assert first["share"] == second["share"] == "from 0"
    assert (first["ran"], second["ran"]) == ("ran", None)
    assert first["flags"] == second["flags"] == [True, False, True]
    assert first["mean"] == second["mean"] == [1.5, 4.0]
    assert first["error"] == second["error"] == "no good"


def test_ranks_wait_for_what_one_does_alone_longer_than_gloo_would(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    from fastmim import ranks

    made = []
    monkeypatch.setattr(ranks.dist, "new_group", lambda **options: made.append(options))
    ranks.Ranks().open_host_group()
    assert made[0]["backend"] == "gloo" and made[0]["timeout"] >= timedelta(hours=12)


def test_alone_nothing_is_waited_for(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    from fastmim.ranks import Ranks

    ranks = Ranks()
    assert (ranks.rank, ranks.world_size, ranks.first) == (0, 1, True)
    assert ranks.gather(3) == [3] and ranks.share(4) == 4 and ranks.run_on_first(lambda: 5) == 5
    assert ranks.start_flags(True, False).wait() == [True, False]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name)
