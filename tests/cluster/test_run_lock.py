"""The run's lock: one holder, whatever clocks and process ids say; a dead holder is found out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from cluster.lock import (
    LOCK,
    SILENT_BEATS,
    Holder,
    LockLost,
    RunLock,
    held_by,
    refuse_if_running,
    this_process,
    wait_for_release,
)
from contracts.errors import ConfigError

HOLDER = """
import sys, time
from cluster.lock import RunLock
lock = RunLock.acquire(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def memory_url() -> Iterator[str]:
    yield "memory://locks/run"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/locks"):
        filesystem.rm("/locks", recursive=True)


def nobody_waits(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s for a holder that can be looked at")


def write(folder: Path, holder: Holder) -> None:
    (folder / LOCK).write_text(json.dumps(vars(holder)))


def test_one_holder_at_a_time_and_none_after_its_release(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    with pytest.raises(ConfigError, match=rf"is running \(process {this_process().pid} on"):
        RunLock.acquire(tmp_path, lambda _: None)
    with pytest.raises(ConfigError, match="is running"):
        refuse_if_running(tmp_path)
    lock.beat()
    lock.release()
    assert held_by(tmp_path) is None
    refuse_if_running(tmp_path)
    RunLock.acquire(tmp_path).release()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    found = held_by(tmp_path)
    assert found is not None
    assert found.pid == process.pid
    process.kill()
    process.wait()
    process.stdout.close()
    assert held_by(tmp_path, nobody_waits) is None
    RunLock.acquire(tmp_path, nobody_waits).release()


def test_a_process_id_that_was_given_out_again_is_no_holder(tmp_path: Path) -> None:
    write(tmp_path, replace(this_process(), started=1.0))
    RunLock.acquire(tmp_path, nobody_waits).release()


def test_a_process_of_before_the_last_boot_is_no_holder(tmp_path: Path) -> None:
    write(tmp_path, replace(this_process(), world="another-boot/pid:[1]"))
    RunLock.acquire(tmp_path, nobody_waits).release()


def test_this_very_process_is_recognised_where_the_kernel_locks_nothing(tmp_path: Path) -> None:
    write(tmp_path, this_process())  # as on a file system without flock
    with pytest.raises(ConfigError, match="is running"):
        RunLock.acquire(tmp_path, nobody_waits)


@pytest.mark.parametrize("place", ["folder", "url"])
def test_a_holder_on_another_host_is_watched_not_timed(place: str, tmp_path: Path, memory_url: str) -> None:
    location = str(tmp_path) if place == "folder" else memory_url
    other = replace(this_process(), host="elsewhere", pid=1)

    def put(holder: Holder) -> None:
        if place == "folder":
            write(tmp_path, holder)
        else:
            fsspec.filesystem("memory").pipe_file("/locks/run/" + LOCK, json.dumps(vars(holder)).encode())

    waits: list[float] = []

    def beating(seconds: float) -> None:
        waits.append(seconds)
        put(replace(other, beats=len(waits)))

    put(other)
    with pytest.raises(ConfigError, match="process 1 on elsewhere"):
        RunLock.acquire(location, beating)
    assert len(waits) == 1
    waits.clear()
    put(other)
    lock = RunLock.acquire(location, waits.append)  # silent for so long: it is dead
    assert len(waits) == SILENT_BEATS
    lock.release()


def test_who_was_taken_over_stops(tmp_path: Path, memory_url: str) -> None:
    for location in (str(tmp_path), memory_url):
        lock = RunLock.acquire(location, nobody_waits)
        lock._place.write(replace(this_process(), host="elsewhere", pid=1))
        with pytest.raises(LockLost, match="process 1 on elsewhere"):
            lock.beat()
        lock.release()
        left = lock._place if location == memory_url else None
        assert left is None or left.read() is not None, "the other's lock was removed"


def test_half_a_lock_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": "els')
    RunLock.acquire(tmp_path, nobody_waits).release()


def test_a_place_that_cannot_be_written_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*copy the run"):
        RunLock.acquire(tmp_path / "file")


def test_a_resume_waits_for_the_processes_of_a_killed_driver_to_end(tmp_path: Path) -> None:
    held, notices, naps = RunLock.acquire(tmp_path), [], []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            held.release()

    wait_for_release(tmp_path, notices.append, sleep=sleep)
    assert len(naps) == 3
    assert len(notices) == 1
    assert f"process {this_process().pid} on" in notices[0]


def test_a_resume_does_not_wait_for_ever(tmp_path: Path) -> None:
    held = RunLock.acquire(tmp_path)
    with pytest.raises(ConfigError, match="is running"):
        wait_for_release(tmp_path, print, limit_s=0.2, sleep=lambda _: time.sleep(0.05))
    held.release()
