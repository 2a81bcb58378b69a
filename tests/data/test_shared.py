"""An index that ranks share: scanned once a node, the same everywhere."""

import json
import socket
import subprocess
import sys

from tests.launching import environment, write_images

SCRIPT = """
import json, sys
import torch.distributed as dist
from fastmim.config_data import DataConfig
from fastmim.data import shared
from fastmim.errors import DataError
from fastmim.ranks import Ranks

ranks, (out, source) = Ranks(), sys.argv[1:]
dist.init_process_group("gloo")
ranks.open_host_group()
scans, build = [], shared.build_index
shared.build_index = lambda *words, **more: scans.append(words) or build(*words, **more)
told = {}
try:
    index = shared.open_index(source, DataConfig(), ranks)
    told = {"names": [name.decode() for name in index.names], "path": index.path(3).decode()}
except DataError as error:
    told = {"error": str(error)}
with open(f"{out}/{ranks.rank}.json", "w") as file:
    json.dump({**told, "scans": len(scans)}, file)
dist.destroy_process_group()
"""
NODES = [0, 0, 1]  # of ranks 0 to 2


def run(folder, sources):
    """What each rank tells; `sources` are those of the nodes."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / "temporary").mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank, node in enumerate(NODES):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(NODES[:rank].count(node)),
            "WORLD_SIZE": str(len(NODES)),
        }
        place |= {"LOCAL_WORLD_SIZE": str(NODES.count(node)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [sys.executable, str(folder / "script.py"), str(folder), str(sources[node])]
        env = environment(
            **place, TMPDIR=str(folder / "temporary"), FASTMIM_CACHE=str(folder / f"cache{node}")
        )
        ranks.append(subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True))
    for rank in ranks:
        _, told = rank.communicate(timeout=120)
        assert rank.returncode == 0, told
    assert not list((folder / "temporary").glob("fastmim-index-*"))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(NODES))]


def test_each_node_scans_once(tmp_path):
    images = write_images(tmp_path / "images", 5)
    told = run(tmp_path, [images, images])
    assert [rank.pop("scans") for rank in told] == [1, 0, 1]
    assert told[0] == told[1] == told[2]
    assert told[0]["names"] == [f"{i:04d}.png" for i in range(5)] and told[0]["path"] == str(
        images / "0003.png"
    )


def test_nodes_that_hold_other_images_are_told(tmp_path):
    sources = [write_images(tmp_path / name, count) for name, count in (("a", 5), ("b", 4))]
    told = run(tmp_path, sources)
    assert all("holds other images on rank 2 than on rank 0" in rank["error"] for rank in told)
