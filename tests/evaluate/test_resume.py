"""Files that a stopped evaluation leaves."""

from types import SimpleNamespace

import pytest
import torch

from fastmim.errors import CheckpointError
from fastmim.evaluate import resume
from fastmim.evaluate.resume import keep_rows, load_state, remove_states, save_state
from fastmim.ranks import Ranks


def identity(**settings):
    same = {"protocol": "finetune", "weights": {"sha256": "a"}, "train": {"images": 3}, "test": {"images": 2}}
    return same | {"settings": {"seed": 0} | settings}


def test_a_state_is_found_again_by_its_own_evaluation_alone(tmp_path):
    assert load_state(tmp_path, "part", identity()) is None
    state = {"epoch": 3, "model": {"weight": torch.arange(4.0)}, "loss": None}
    save_state(tmp_path, "part", identity(), {"epoch": 2})
    save_state(tmp_path, "part", identity(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["part.unfinished"]
    found = load_state(tmp_path, "part", identity())
    assert found["epoch"] == 3 and torch.equal(found["model"]["weight"], torch.arange(4.0))
    with pytest.raises(CheckpointError, match=r"part.unfinished was left by .* seed=0, this one has 1"):
        load_state(tmp_path, "part", identity(seed=1))
    with pytest.raises(CheckpointError, match=r"weights.sha256='a', this one has 'b'"):
        load_state(tmp_path, "part", identity() | {"weights": {"sha256": "b"}})


def test_a_damaged_state_is_named(tmp_path):
    save_state(tmp_path, "part", identity(), {"epoch": 2})
    path = tmp_path / "part.unfinished"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"part.unfinished cannot be read"):
        load_state(tmp_path, "part", identity())
    remove_states(tmp_path, but=identity())
    assert not path.exists()


def test_states_of_other_evaluations_are_removed_by_force_and_all_at_the_end(tmp_path):
    save_state(tmp_path, "mine", identity(), {})
    save_state(tmp_path, "other", identity(seed=2), {})
    (tmp_path / ".mine.unfinished").write_bytes(b"half")
    (tmp_path / "eval.json").write_text("{}")
    remove_states(tmp_path, but=identity())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "mine.unfinished"]
    remove_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_rows_are_kept_about_once_a_minute_and_all_at_the_end(tmp_path, monkeypatch):
    job = SimpleNamespace(folder=tmp_path, identity=identity(), ranks=Ranks())
    table, now, asked = torch.arange(22.0).view(11, 2), [0.0], []
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])

    def compute(first):
        asked.append(first)
        for start in range(first, len(table), 2):
            now[0] += 25
            yield table[start : start + 2]

    stopped = keep_rows(job, "train", compute)
    assert [next(stopped).tolist() for _ in range(5)] == [rows.tolist() for rows in table.split(2)[:5]]
    stopped.close()
    # Three of the five; the others are lost.
    assert [path.name for path in tmp_path.iterdir()] == ["train-0.unfinished"]
    assert torch.equal(torch.cat(list(keep_rows(job, "train", compute))), table)
    assert torch.equal(torch.cat(list(keep_rows(job, "train", compute))), table)
    assert asked == [0, 6, 11]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"train-{number}.unfinished" for number in range(2)]
