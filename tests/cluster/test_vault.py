"""The store behind a vault: what is written is whole, bounded, found again after a crash, unchanged by readers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.vault import GroupStore
from cluster.vault_files import EmbeddingUses
from contracts.errors import NotStored, VaultError, VaultFull
from contracts.wire import GroupHeader, PromptSpec

MB = 2**20


def header(group_id: int, attempt: int = 0, group_size: int = 4) -> GroupHeader:
    return GroupHeader(
        group_id=group_id, attempt=attempt, prompt=PromptSpec(text=f"prompt {group_id}"), group_size=group_size,
        weight_version=3, prompt_digest="d",
    )  # fmt: skip


def arrays(seed: int = 0, group_size: int = 4, side: int = 8) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "images": generator.integers(0, 256, (group_size, side, side, 3), dtype=np.uint8),
        "clean": generator.standard_normal((group_size, 3, side, side), dtype=np.float32),
        "states": generator.integers(0, 2**16, (group_size, 2, 3, side, side), dtype=np.uint16),
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("memory_bytes", [0, 10 * MB])
def test_a_group_comes_back_as_it_was_from_memory_and_from_disk(tmp_path: Path, memory_bytes: int) -> None:
    store = GroupStore(tmp_path, memory_bytes)
    written = store.put(header(7), arrays())
    assert written == store.bytes_held()["disk"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert_same(store.get(7), arrays())
    some = store.get(7, ("clean",), slice(1, 3))
    assert_same(some, {"clean": arrays()["clean"][1:3]})
    assert store.header(7) == header(7)
    assert store.bytes_held()["memory"] == (sum(a.nbytes for a in arrays().values()) if memory_bytes else 0)


def test_readers_and_writers_cannot_change_what_is_stored(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, 10 * MB)
    mine = arrays()
    store.put(header(0), mine)
    mine["images"][:] = 0
    assert_same(store.get(0), arrays())
    with pytest.raises(ValueError, match="read-only"):
        store.get(0)["images"][:] = 0
    reopened = GroupStore(tmp_path, 10 * MB)
    with pytest.raises(ValueError, match="read-only"):
        reopened.get(0)["images"][:] = 0


def test_a_late_attempt_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, 10 * MB)
    store.put(header(0, attempt=1), arrays(1))
    store.put(header(0, attempt=0), arrays(0))
    assert_same(store.get(0), arrays(1))
    assert_same(store.get(0, attempt=0), arrays(0))
    assert store.header(0).attempt == 1
    assert store.delete(0, attempt=0) > 0
    assert store.stored() == [(0, 1)]
    assert_same(store.get(0), arrays(1))


def test_what_is_not_there_is_said_so(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, MB)
    with pytest.raises(NotStored, match="group 5"):
        store.get(5)
    with pytest.raises(NotStored):
        store.header(5)
    with pytest.raises(NotStored):
        store.get_embedding("unknown")
    store.put(header(5), arrays())
    with pytest.raises(NotStored, match="no means; it has clean, images, states"):
        store.get(5, ("means",))
    with pytest.raises(NotStored, match="attempt 1"):
        store.get(5, attempt=1)
    assert store.delete([5, 6]) > 0
    assert store.delete(5) == 0
    with pytest.raises(NotStored):
        store.get(5)
    assert list(tmp_path.iterdir()) == []
    assert store.bytes_held() == {"disk": 0, "memory": 0}


def test_embeddings_are_stored_once(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, MB)
    embedding = {"text": np.ones((3, 4), np.float32), "pooled": np.zeros(4, np.float32)}
    assert store.put_embedding("abc123", embedding) > 0
    assert store.put_embedding("abc123", embedding) == 0
    assert_same(store.get_embedding("abc123"), embedding)
    assert_same(GroupStore(tmp_path, 0).get_embedding("abc123"), embedding)
    with pytest.raises(VaultError, match="no digest"):
        store.put_embedding("../escape", embedding)


def test_memory_keeps_the_latest_used_within_its_bound(tmp_path: Path) -> None:
    one = sum(array.nbytes for array in arrays().values())
    store = GroupStore(tmp_path, 2 * one)
    for group_id in range(3):
        store.put(header(group_id), arrays(group_id))
    assert store.bytes_held()["memory"] == 2 * one
    for group_id in (0, 1, 2, 0):
        assert_same(store.get(group_id), arrays(group_id))
        assert store.bytes_held()["memory"] <= 2 * one


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 6000),
    st.lists(st.tuples(st.sampled_from(["put", "get", "delete", "reopen"]), st.integers(0, 5), st.integers(0, 1))),
)
def test_any_sequence_agrees_with_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, memory_bytes: int, operations: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = GroupStore(folder, memory_bytes)
    model: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for number, (operation, group_id, attempt) in enumerate(operations):
        if operation == "put":
            model[group_id, attempt] = arrays(number)
            store.put(header(group_id, attempt), arrays(number))
        elif operation == "delete":
            store.delete(group_id)
            model = {key: value for key, value in model.items() if key[0] != group_id}
        elif operation == "reopen":
            store = GroupStore(folder, memory_bytes)
        assert store.stored() == sorted(model)
        latest = max((key for key in model if key[0] == group_id), default=None)
        if latest is not None:
            assert_same(store.get(group_id), model[latest])
        held = store.bytes_held()
        assert held["disk"] == sum(file.stat().st_size for file in folder.iterdir())
        assert held["memory"] <= memory_bytes


def test_beyond_the_bound_a_write_is_refused_and_fits_again_after_a_delete(tmp_path: Path) -> None:
    size = GroupStore(tmp_path / "probe", 0).put(header(0), arrays())
    store = GroupStore(tmp_path / "store", 0, disk_bytes=2 * size + 10)
    store.put(header(0), arrays())
    store.put(header(1), arrays())
    store.put(header(1), arrays())  # in place of itself: takes no more room
    with pytest.raises(VaultFull, match="save a state"):
        store.put(header(2), arrays())
    assert store.stored() == [(0, 0), (1, 0)]
    store.delete(0)
    store.put(header(2), arrays())


def test_a_write_waits_for_room(tmp_path: Path) -> None:
    size = GroupStore(tmp_path / "probe", 0).put(header(0), arrays())
    store = GroupStore(tmp_path / "store", 0, disk_bytes=size)
    store.put(header(0), arrays())
    waiting = threading.Thread(target=store.put, args=(header(1), arrays(1), 30.0))
    waiting.start()
    time.sleep(0.05)
    assert store.stored() == [(0, 0)]
    store.delete(0)
    waiting.join(timeout=20)
    assert store.stored() == [(1, 0)]


def test_a_full_file_system_is_full(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, 0, min_free_bytes=2**62)
    with pytest.raises(VaultFull):
        store.put(header(0), arrays())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    store = GroupStore(tmp_path / "store", 0)
    (tmp_path / "store").rmdir()
    with pytest.raises(VaultError, match="cannot write"):
        store.put(header(0), arrays())
    assert store.bytes_held()["disk"] == 0
    assert store.stored() == []


def test_an_unusable_folder_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VaultError, match="cannot be used"):
        GroupStore(tmp_path / "file" / "vault", 0)


def test_reopening_removes_what_is_torn(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, 0)
    for group_id in range(3):
        store.put(header(group_id), arrays(group_id))
    whole = (tmp_path / "group-00000001-0.safetensors").read_bytes()
    (tmp_path / "group-00000001-0.safetensors").write_bytes(whole[:-1])
    (tmp_path / "group-00000002-0.safetensors").write_bytes(b"")
    (tmp_path / "group-00000003-0.safetensors.abc.tmp").write_bytes(whole)
    (tmp_path / "group-00000004-0.safetensors").write_bytes(b"\xff" * 100)
    reopened = GroupStore(tmp_path, 0)
    assert reopened.removed_torn == 4
    assert reopened.stored() == [(0, 0)]
    assert [file.name for file in tmp_path.iterdir()] == ["group-00000000-0.safetensors"]
    assert reopened.header(0) == header(0)
    assert_same(reopened.get(0), arrays(0))


def test_damage_found_on_reading_is_not_handed_out(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, 0)
    store.put(header(0), arrays())
    path = tmp_path / "group-00000000-0.safetensors"
    blob = bytearray(path.read_bytes())
    blob[8:40] = b"!" * 32  # the header, as long as before
    path.write_bytes(blob)
    with pytest.raises(NotStored, match="damaged"):
        store.get(0)


WRITER = """
import sys
import numpy as np
from cluster.vault import GroupStore
from contracts.wire import GroupHeader, PromptSpec
store = GroupStore(sys.argv[1], 0)
group_id = 0
while True:
    header = GroupHeader(group_id=group_id, attempt=0, prompt=PromptSpec(text="x"), group_size=1, weight_version=0,
                         prompt_digest="d")
    store.put(header, {"clean": np.full((1, 500_000), group_id, np.float32)})
    print(group_id, flush=True)
    group_id += 1
"""


def test_kill_9_loses_nothing_acknowledged_and_leaves_nothing_torn(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 20:
            break
    writer.send_signal(signal.SIGKILL)
    acknowledged = 20 + len(writer.stdout.read().split())
    writer.wait()
    store = GroupStore(tmp_path, 0)
    assert len(store.stored()) in (acknowledged + 1, acknowledged + 2)
    for group_id, _ in store.stored():
        assert (store.get(group_id)["clean"] == group_id).all()
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".safetensors"]


def test_many_threads_at_once(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, 20_000)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for group_id in range(number * 10, number * 10 + 10):
                store.put(header(group_id), arrays(group_id))
                assert_same(store.get(group_id), arrays(group_id))
                if group_id % 2:
                    store.delete(group_id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.stored() == [(group_id, 0) for group_id in range(0, 80, 2)]
    assert store.bytes_held()["memory"] <= 20_000
    assert store.bytes_held()["disk"] == sum(file.stat().st_size for file in tmp_path.iterdir())


def embedding(value: float) -> dict[str, np.ndarray]:
    return {"prompt": np.full((2, 4), value, np.float32)}


def test_an_embedding_goes_with_the_last_group_that_uses_it(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, memory_bytes=MB)
    for group_id in (1, 2):  # group 2 lies in another vault
        store.put_embedding("shared", embedding(1.0), painting=(group_id, 0))
    store.put_embedding("own", embedding(2.0), painting=(1, 0))
    store.put(header(1), arrays())
    held = store.bytes_held()["disk"]
    freed = store.delete(1)
    assert not store.holds_embedding("own")
    assert store.holds_embedding("shared")
    assert store.bytes_held()["disk"] == held - freed
    store.delete(2)
    assert not store.holds_embedding("shared")
    assert store.bytes_held() == {"disk": 0, "memory": 0}
    assert not list(tmp_path.iterdir())


def test_one_attempt_s_painting_leaves_the_group_s_embedding(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, memory_bytes=MB)
    store.put_embedding("d", embedding(1.0), painting=(1, 0))
    store.put(header(1, attempt=0), arrays())
    store.delete(1, attempt=0)
    assert store.holds_embedding("d"), "the group is to be painted again"


def test_after_a_restart_embeddings_stay_until_their_groups_are_known(tmp_path: Path) -> None:
    store = GroupStore(tmp_path, memory_bytes=MB)
    store.put_embedding("d", embedding(1.0), painting=(1, 0))
    store.put_embedding("elsewhere", embedding(2.0), painting=(2, 0))
    store.put_embedding("leftover", embedding(3.0))
    store.put(header(1), arrays())
    again = GroupStore(tmp_path, memory_bytes=MB)
    assert again.embeddings_used() == {1: ["d"]}
    again.delete(2)
    assert again.holds_embedding("elsewhere"), "another group may use it: nobody has said"
    again.keep_embeddings_of({1: ["d"], 2: ["elsewhere"]})
    assert not again.holds_embedding("leftover")
    assert again.get_embedding("elsewhere")["prompt"][0, 0] == 2.0
    again.delete([1, 2])
    assert not list(tmp_path.iterdir())


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abcd"), st.booleans()), max_size=60))
def test_uses_are_counted_like_a_plain_table(steps: list[tuple[int, str, bool]]) -> None:
    uses, table = EmbeddingUses([]), set[tuple[int, str]]()
    for group_id, digest, gone in steps:
        if gone:
            before = {each for _, each in table}
            table = {(group, each) for group, each in table if group != group_id}
            assert set(uses.drop(group_id)) == before - {each for _, each in table}
        else:
            uses.add(digest, group_id)
            table.add((group_id, digest))
