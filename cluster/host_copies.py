"""Host copies of full weights, one a node, filled by a broadcast from learner rank 0 (weights.transport: collective).

The object store moves LoRA-sized weights in milliseconds. Full weights of many gigabytes go round all nodes at once by
gloo (host to host) or NCCL (GPU to GPU, then to the host): rank 0 and one `HostCopy` a node with rollout actors form a
process group of their own, a channel, beside the learner's. What arrives is put into the node's object store, where
every actor of the node reads it without copying.

    HostCopies.fill (controller)     forms the channel if there is none; then at once
        rank 0      Sender.send      every array in the order of names
        HostCopy    receive          allocates, takes part, compares the digest

Invariant: `fill` ends within its limits or raises WeightsError, after which the channel and every copy are gone and the
next call starts anew. A half-filled copy is never offered: the digest of what arrived is compared with the offer first.
Does not own: what is published and when (learner_loop.py), what happens instead when it fails (learner_group.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.awake import wait_all
from cluster.refs import value
from contracts.config.learner import WeightsConfig
from contracts.digests import digest_arrays
from contracts.errors import WeightsError, WeightsTimeout
from contracts.startup import collector_paused
from contracts.wire import Message, WeightOffer

START_TIMEOUT_S = 120.0
"""Time a new copy's process has to start and import torch; weights.timeout_s counts from there."""

GRACE_S = 5.0
"""How much longer than the collective's own timeout the controller waits for a member's answer."""


class ArraySpec(Message):
    """One array of a broadcast; the order of the list is the order of the transfers."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def describe(arrays: Mapping[str, np.ndarray]) -> list[ArraySpec]:
    """What receivers must allocate, in the order of names."""
    return [ArraySpec(name=n, shape=arrays[n].shape, dtype=arrays[n].dtype.str) for n in sorted(arrays)]


class Channel:
    """One member's end of the process group of rank 0 (the sender, rank 0 here too) and the host copies."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float, backend: str, device: int = 0) -> None:
        """Blocks until all members have come. Raises WeightsTimeout when they do not in time."""
        self.timeout_s = timeout_s
        self.cuda = f"cuda:{device}" if backend == "nccl" else None
        make = _nccl_group if backend == "nccl" else _gloo_group
        try:
            self.group = make(store, rank, size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise WeightsTimeout(f"the members did not come together within {timeout_s:g} s: {_line(error)}") from error

    def broadcast(self, array: np.ndarray) -> np.ndarray:
        """The sender's bytes in every member's array, which is filled in place. Raises WeightsTimeout."""
        import torch

        flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
        buffer = flat if self.cuda is None else flat.to(self.cuda)
        try:
            self.group.broadcast(buffer, 0).wait()
        except RuntimeError as error:
            raise WeightsTimeout(f"a broadcast (limit {self.timeout_s:g} s) failed: {_line(error)}") from error
        if buffer is not flat:
            flat.copy_(buffer)
        return array


def _gloo_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """Bound to the address by which Ray knows this node: a host's own name often resolves to its loopback."""
    import torch.distributed as dist

    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=ray.util.get_node_ip_address())]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """With a blocking wait, so that a lost member raises here instead of ending this process."""
    import torch.distributed as dist

    if not dist.is_nccl_available():
        raise WeightsError("weights.backend is nccl, and this torch has none; set weights.backend=gloo")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    blocking, name = os.environ.get("TORCH_NCCL_BLOCKING_WAIT"), "TORCH_NCCL_BLOCKING_WAIT"
    os.environ[name] = "1"  # read when a group is made; the learner's own group keeps its way
    try:
        return dist.ProcessGroupNCCL(store, rank, size, options)
    finally:
        os.environ.pop(name)
        if blocking is not None:
            os.environ[name] = blocking


class Sender:
    """Rank 0's end: listens first, so that members know where to go, then waits for them."""

    def __init__(self, timeout_s: float, backend: str) -> None:
        import torch.distributed as dist

        self.timeout_s, self.backend = timeout_s, backend
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
        self.channel: Channel | None = None

    def address(self) -> tuple[str, int, str]:
        """(address of this node, port, id of this process's GPU or '')."""
        gpu = _gpu_ids()[0] if self.backend == "nccl" else ""
        return ray.util.get_node_ip_address(), self.store.port, gpu

    def connect(self, num_copies: int) -> None:
        """Raises WeightsTimeout when the copies do not join in time."""
        self.channel = Channel(self.store, 0, num_copies + 1, self.timeout_s, self.backend)

    def send(self, arrays: Mapping[str, np.ndarray]) -> int:
        """Broadcast every array in the order of names; returns the bytes sent to each node. Raises WeightsTimeout."""
        assert self.channel is not None, "send before connect"
        total = 0
        for name in sorted(arrays):
            total += self.channel.broadcast(np.require(arrays[name], requirements=["C", "W"])).nbytes
        return total


@ray.remote(num_cpus=0, max_restarts=0)
class HostCopy:
    """One node's copy of the published weights."""

    def __init__(self) -> None:
        with collector_paused():
            import torch.distributed  # noqa: F401  (slow: done before anyone waits for a broadcast)

        from cluster.processes import limit_threads, prepare_process

        prepare_process("host-copy")
        limit_threads(1)
        self.channel: Channel | None = None

    def ready(self) -> dict[str, Any]:
        return {"name": "host-copy", "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def join(self, sender: tuple[str, int, str], rank: int, size: int, timeout_s: float, backend: str) -> None:
        """Become member `rank` of the channel of `sender` (Sender.address). Raises WeightsTimeout."""
        import torch.distributed as dist

        address, port, gpu = sender
        device = _other_gpu(gpu) if backend == "nccl" else 0
        timeout = timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise WeightsTimeout(f"learner rank 0 does not answer at {address}:{port}: {_line(error)}") from error
        self.channel = Channel(store, rank, size, timeout_s, backend, device)

    def receive(self, offer: WeightOffer, specs: Sequence[ArraySpec]) -> tuple[int, dict[str, np.ndarray]]:
        """(bytes, arrays) of one broadcast. Called with num_returns=2, so that the arrays stay in this node's store
        and belong to the caller: they outlive this process.

        Raises WeightsTimeout, or WeightsError when what arrived is not what was offered.
        """
        assert self.channel is not None, "receive before join"
        arrays = {}
        for spec in specs:
            arrays[spec.name] = self.channel.broadcast(np.empty(spec.shape, np.dtype(spec.dtype)))
        digest = digest_arrays(arrays, offer.dtypes)
        if digest != offer.digest:
            raise WeightsError(f"version {offer.version} arrived with digest {digest}, sent with {offer.digest}")
        return sum(array.nbytes for array in arrays.values()), arrays


class HostCopies:
    """The controller's side: a copy on every node that has rollout actors, and the channel from rank 0 to them."""

    def __init__(self, config: WeightsConfig) -> None:
        self.config = config
        self.copies: dict[str, Any] = {}
        self.processes: list[dict[str, Any]] = []
        self.sender: Any = None

    async def fill(
        self, sender: Any, offer: WeightOffer, specs: Sequence[ArraySpec], nodes: Sequence[str]
    ) -> dict[str, Any]:
        """Node -> reference of the arrays in that node's store, filled from what rank 0 keeps.

        sender: handle of rank 0 (listen, connect, send); another than last time, or other nodes, make a new channel.
        Raises WeightsTimeout or WeightsError when a member is lost, hangs or has received something else.
        """
        try:
            if sender is not self.sender or self.copies.keys() != set(nodes):
                await self._form(sender, nodes)
            received = {
                node: copy.receive.options(num_returns=2).remote(offer, specs) for node, copy in self.copies.items()
            }
            counts = {f"the copy on node {node}": refs[0] for node, refs in received.items()}
            await self._all({"learner rank 0": sender.send.remote(), **counts}, self.config.timeout_s + GRACE_S)
            return {node: refs[1] for node, refs in received.items()}
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """End every copy, and with them the channel."""
        for copy in self.copies.values():
            ray.kill(copy)
        self.copies, self.processes, self.sender = {}, [], None

    async def _form(self, sender: Any, nodes: Sequence[str]) -> None:
        self.drop()
        timeout_s, backend = self.config.timeout_s, self.config.backend
        self.copies = {node: _create(node) for node in sorted(set(nodes))}
        started = {f"the copy on node {node}": copy.ready.remote() for node, copy in self.copies.items()}
        self.processes = list((await self._all(started, START_TIMEOUT_S)).values())
        listening = await self._all({"learner rank 0": sender.listen.remote(timeout_s, backend)}, START_TIMEOUT_S)
        address, size = listening["learner rank 0"], len(self.copies) + 1
        members = {"learner rank 0": sender.connect.remote(len(self.copies))}
        for rank, (node, copy) in enumerate(self.copies.items(), start=1):
            members[f"the copy on node {node}"] = copy.join.remote(address, rank, size, timeout_s, backend)
        await self._all(members, timeout_s + GRACE_S)
        self.sender = sender

    async def _all(self, refs: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Every member's answer. Raises WeightsError at the first failure, WeightsTimeout at the deadline."""
        tasks = {member: asyncio.ensure_future(value(ref)) for member, ref in refs.items()}
        done, pending = await wait_all(tasks.values(), timeout_s)
        for task in pending:
            task.cancel()
        for member, task in tasks.items():
            if task in done and task.exception() is not None:
                raise _weights_error(member, task.exception())
        if pending:
            silent = ", ".join(member for member, task in tasks.items() if task in pending)
            raise WeightsTimeout(f"{silent} did not answer within {timeout_s:g} s")
        return {member: task.result() for member, task in tasks.items()}


def _create(node: str) -> Any:
    """A copy on exactly that node."""
    actor: Any = HostCopy
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()


def _weights_error(member: str, error: BaseException | None) -> WeightsError:
    cause = getattr(error, "cause", None) or error
    kind = WeightsTimeout if isinstance(cause, WeightsTimeout) else WeightsError
    return kind(f"{member}: {_line(cause)}")


def _gpu_ids() -> list[str]:
    """Identities of the GPUs this process sees."""
    import torch

    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def _other_gpu(taken: str) -> int:
    """Index of a GPU of this node other than rank 0's, whose group a GPU can join only once.

    A copy reserves no GPU, and Ray hides all GPUs from such a process; it borrows an actor's for one array at a time.
    """
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    others = [index for index, gpu in enumerate(_gpu_ids()) if gpu != taken]
    if not others:
        raise WeightsError("NCCL needs a GPU on this node beside learner rank 0's; set weights.backend=gloo")
    return others[0]


def _line(error: BaseException | None) -> str:
    """The first line of an error; torch appends its stack to the message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
