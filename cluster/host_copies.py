"""Host copies of full weights, one a node, filled by a broadcast from learner rank 0 (weights.transport: collective).

The object store moves LoRA-sized weights in milliseconds. Full weights of many gigabytes go round all nodes at once by
gloo (host to host) or NCCL (GPU to GPU, then to the host): rank 0 and one `HostCopy` a node form a process group of
their own, beside the learner's. What arrives is put into the node's object store, where every actor of the node reads
it without copying.

Invariant: a broadcast ends within the timeout or raises WeightsTimeout; a half-filled copy is never offered, because
the digest of what arrived is compared with the offer before it is.
Does not own: what is published and when (learner_loop.py), loading (actors).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import ray

from contracts.digests import digest_arrays
from contracts.errors import WeightsError, WeightsTimeout
from contracts.wire import Message, WeightOffer


class ArraySpec(Message):
    """One array of a broadcast; the order of the list is the order of the transfers."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def describe(arrays: Mapping[str, np.ndarray]) -> list[ArraySpec]:
    """What receivers must allocate, in the order of names."""
    return [ArraySpec(name=n, shape=arrays[n].shape, dtype=arrays[n].dtype.str) for n in sorted(arrays)]


class Channel:
    """A process group of rank 0 (the sender) and the host copies, made from a store at `address:port`."""

    def __init__(self, address: str, port: int, rank: int, size: int, timeout_s: float, backend: str) -> None:
        """Raises WeightsTimeout when not all members come together in time."""
        import torch.distributed as dist

        timeout = timedelta(seconds=timeout_s)
        self.rank, self.backend, self.timeout_s = rank, backend, timeout_s
        try:
            self.store = dist.TCPStore(address, port, size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
            if backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self.group: Any = dist.ProcessGroupNCCL(self.store, rank, size, options)
            else:
                self.group = dist.ProcessGroupGloo(self.store, rank, size, timeout)
        except (RuntimeError, dist.DistError) as error:
            raise WeightsTimeout(f"host copies did not come together within {timeout_s:.0f} s: {error}") from error

    def broadcast(self, array: np.ndarray) -> np.ndarray:
        """The sender's bytes in every member's array; receivers' arrays are filled in place. Raises WeightsTimeout."""
        import torch

        flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
        buffer = flat.cuda() if self.backend == "nccl" else flat
        try:
            self.group.broadcast(buffer, 0).wait()
        except RuntimeError as error:
            raise WeightsTimeout(f"weights did not reach every node within {self.timeout_s:.0f} s: {error}") from error
        if buffer is not flat:
            flat.copy_(buffer)
        return array


class Sender:
    """Rank 0's end."""

    def __init__(self, port: int, num_copies: int, timeout_s: float, backend: str) -> None:
        self.channel = Channel("127.0.0.1", port, 0, num_copies + 1, timeout_s, backend)

    def send(self, arrays: Mapping[str, np.ndarray]) -> int:
        """Broadcast every array in the order of names; returns the bytes sent to each node."""
        total = 0
        for name in sorted(arrays):
            writable = np.require(arrays[name], requirements=["C", "W"])
            total += self.channel.broadcast(writable).nbytes
        return total


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=2)
class HostCopy:
    """One node's copy of the published weights."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.channel: Channel | None = None
        self.held: Any = None

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def join(self, address: str, port: int, num_copies: int, timeout_s: float, backend: str) -> int:
        self.channel = Channel(address, port, self.index + 1, num_copies + 1, timeout_s, backend)
        return self.index

    def receive(self, offer: WeightOffer, specs: list[ArraySpec]) -> list[Any]:
        """Take part in one broadcast; returns [reference of the arrays in this node's object store].

        Raises WeightsTimeout, or WeightsError when what arrived is not what was offered.
        """
        assert self.channel is not None, "receive before join"
        arrays = {}
        for spec in specs:
            arrays[spec.name] = self.channel.broadcast(np.empty(spec.shape, np.dtype(spec.dtype)))
        digest = digest_arrays(arrays, offer.dtypes)
        if digest != offer.digest:
            raise WeightsError(f"version {offer.version} arrived with digest {digest}, sent with {offer.digest}")
        self.held = ray.put(arrays)
        return [self.held]


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
