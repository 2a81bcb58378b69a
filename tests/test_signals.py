"""A file that asks a run to stop: seen, deleted, and no reason to end where storage fails."""

import signal
from pathlib import Path

from fastmim import signals


def test_a_stop_file_counts_as_sigterm_and_is_deleted(tmp_path):
    stop = signals.StopSignals()
    assert not stop.wanted()  # no file to look for
    stop.watch(tmp_path / "stop")
    (tmp_path / "stop").touch()
    assert stop.wanted() and stop.exit_code == 128 + signal.SIGTERM
    assert not (tmp_path / "stop").exists() and stop.wanted()


def test_it_is_looked_for_now_and_then(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    stop = signals.StopSignals()
    stop.watch(tmp_path / "stop")
    assert not stop.wanted()
    (tmp_path / "stop").touch()
    assert not stop.wanted()
    now += signals._LOOK_EVERY_S
    assert stop.wanted()


def test_storage_that_fails_ends_nothing(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(116, "Stale file handle")

    stop = signals.StopSignals()
    stop.watch(tmp_path / "stop")
    monkeypatch.setattr(Path, "exists", fail)
    assert not stop.wanted() and stop.exit_code == 0
