"""The vault as a Ray actor: survives kill -9 with what it acknowledged, and a waiting write holds up no read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.vault import Vault
from contracts.errors import NotStored, VaultFull
from contracts.wire import GroupHeader, PromptSpec


@pytest.fixture(scope="module")
def cluster(repo_root: Path) -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(repo_root)}},
    )  # fmt: skip
    yield
    ray.shutdown()


def header(group_id: int) -> GroupHeader:
    return GroupHeader(
        group_id=group_id, attempt=0, prompt=PromptSpec(text="a"), group_size=2, weight_version=0, prompt_digest="d"
    )


def arrays(group_id: int) -> dict[str, np.ndarray]:
    return {"images": np.full((2, 64, 64, 3), group_id, np.uint8), "clean": np.full((2, 100_000), group_id, np.float32)}


def test_a_killed_vault_comes_back_with_everything(cluster: None, tmp_path: Path) -> None:
    vault = Vault.remote(str(tmp_path), 10 * 2**20)
    assert ray.get(vault.put.remote(header(1), arrays(1))) > 800_000
    assert ray.get(vault.put_embedding.remote("d", {"text": np.ones((2, 3), np.float32)})) > 0
    os.kill(ray.get(vault.pid.remote()), signal.SIGKILL)
    found = ray.get(vault.get.remote(1, ("images",), slice(0, 1)), timeout=60)
    np.testing.assert_array_equal(found["images"], arrays(1)["images"][:1])
    assert ray.get(vault.header.remote(1)) == header(1)
    assert ray.get(vault.get_embedding.remote("d"))["text"].shape == (2, 3)
    assert ray.get(vault.stored.remote()) == [(1, 0)]
    with pytest.raises(NotStored):
        ray.get(vault.get.remote(2))
    ray.kill(vault)


def test_waiting_writes_hold_up_neither_reads_nor_the_delete_that_makes_room(cluster: None, tmp_path: Path) -> None:
    vault = Vault.remote(str(tmp_path), 10 * 2**20, 1_000_000, 60.0)
    ray.get(vault.put.remote(header(0), arrays(0)))
    waiting = [vault.put.remote(header(group_id), arrays(group_id)) for group_id in range(1, 10)]
    assert ray.get(vault.get.remote(0, ("clean",)), timeout=30)["clean"].shape == (2, 100_000)
    stored = [0]
    while waiting:
        ray.get(vault.delete.remote(stored))
        done, waiting = ray.wait(waiting, timeout=30)
        assert done
        stored = [group_id for group_id, _ in ray.get(vault.stored.remote())]
        assert len(stored) <= 1
    ray.kill(vault)


def test_a_full_vault_says_so_by_type(cluster: None, tmp_path: Path) -> None:
    vault = Vault.remote(str(tmp_path), 0, 1_000_000, 0.1)
    ray.get(vault.put.remote(header(0), arrays(0)))
    with pytest.raises(VaultFull, match="do not fit"):
        ray.get(vault.put.remote(header(1), arrays(1)))
    assert ray.get(vault.bytes_held.remote())["disk"] < 1_000_000
    ray.kill(vault)
