"""Ray processes around the plain classes: rollout actor, learner rank, host of a reward server.

Each wrapper adds what only the cluster needs: a lock around the denoising thread, the way to the vaults, the pending
weights, the process group. The work itself is actors.painter, learner.rank and reward_servers, which know no Ray.
Does not own: who is asked for what (controller.py), where they are placed (placement.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster import awake
from cluster.checkpoints.remote import RemoteCheckpoints, learner_files_here, url_of
from cluster.host_copies import Sender, describe
from cluster.step import unpainted_group
from contracts import registry, versions
from contracts.config import RunConfig
from contracts.config.rollout import EvalSampling
from contracts.config.scoring import ScorerConfig
from contracts.digests import digest_images
from contracts.errors import VaultFull, WeightsTimeout
from contracts.spans import SpanLog, wall_clock
from contracts.startup import collector_paused
from contracts.versions import Files
from contracts.wire import PaintReceipt, PromptSpec, PromptTask, Source, StepReport, WeightOffer, WeightProof
from learner.state_writer import FileDigests, PendingSave
from learner.types import StepJob


def vault_name(group_id: int, count: int) -> str:
    """The vault that owns a group's bytes."""
    return f"vault-{group_id % count}"


FIRST_OFFER_S = 15.0
"""How long a process waits for its first offer. Tasks come after it, unless Ray has started the process anew and nobody
knows: then waiting is in vain, and the error tells."""


ROOM_POLL_S = 0.5
"""Between two attempts to store a group in a full vault."""


class _PendingWeights:
    """The newest offer not yet loaded, and a condition to wait on it. Newer is a later generation, then version."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.offer: tuple[WeightOffer, Mapping[str, np.ndarray], np.ndarray, np.ndarray | None] | None = None
        self.newest = (-1, -1)
        self.loaded = -1

    def put(self, generation: int, offer: WeightOffer, arrays: Mapping[str, np.ndarray], *canaries: Any) -> None:
        with self.condition:
            if (generation, offer.version) > self.newest:
                self.newest = (generation, offer.version)
                self.offer = (offer, arrays, *canaries)
                self.condition.notify_all()

    def wait_for(self, version: int, timeout_s: float) -> float:
        """Block until `version` or a later one is loaded or offered; returns the seconds waited."""
        start = time.monotonic()
        with self.condition:
            limit = timeout_s if self.newest > (-1, -1) else min(timeout_s, FIRST_OFFER_S)
            missed = awake.missed_s()
            while not self.condition.wait_for(lambda: self._available() >= version, limit):
                before, missed = missed, awake.missed_s()
                if missed == before:
                    raise WeightsTimeout(f"version {version} was not offered within {limit:.0f} s")
        return time.monotonic() - start

    def _available(self) -> int:
        return self.loaded if self.offer is None else self.offer[0].version

    def take(self) -> Any:
        with self.condition:
            offer, self.offer = self.offer, None
            return offer


@ray.remote(max_restarts=-1, max_concurrency=8)
class ActorWorker:
    """A rollout actor: paints groups one at a time, stores them, acknowledges with a receipt.

    Invariant: one group, one version: weights are loaded between groups, under the denoising lock. Decoding and
    storing of one group run beside the denoising of the next.
    """

    def __init__(
        self, config: RunConfig, name: str, vaults: Mapping[str, Any], painter: str = "actors.painter:Painter"
    ) -> None:
        """painter: target of the class that paints, so that benchmarks can put a timer in a model's place."""
        from cluster.processes import limit_threads, prepare_process

        prepare_process(name)
        self.name, self.config, self.vaults = name, config, dict(vaults)
        with collector_paused():
            self.painter = registry.import_target(painter)(config)
        limit_threads(config.rollout.threads)
        self.pending = _PendingWeights()
        self.denoising = threading.Lock()
        self.new_proof: WeightProof | None = None
        self.version = -1

    def ready(self) -> dict[str, Any]:
        """Name, and who this process is; answered once the model is loaded."""
        import psutil

        node = ray.get_runtime_context().get_node_id()
        return {"name": self.name, "pid": os.getpid(), "started": psutil.Process().create_time(), "node": node}

    def offer(
        self,
        generation: int,
        offer: WeightOffer,
        arrays: Mapping[str, np.ndarray],
        canary: np.ndarray,
        previous: np.ndarray | None,
    ) -> int:
        """Take note of published weights; they are loaded before the next group."""
        self.pending.put(generation, offer, arrays, canary, previous)
        return offer.version

    def paint(self, task: PromptTask) -> PaintReceipt:
        """Paint (or encode, or leave to the learner) one group, store it and acknowledge."""
        log = SpanLog(self.name)
        with self.denoising:
            with log.span("take weights"):
                waited = self._load_pending(task.min_version)
            start = time.perf_counter()
            with log.span("paint"):
                unfinished = self._begin(task)
            painted_seconds = time.perf_counter() - start
            version = self.version
            proof, self.new_proof = self.new_proof, None
        with log.span("decode"):
            group = self.painter.finish(unfinished) if task.source is Source.ACTORS else unfinished
        start = time.perf_counter()
        with log.span("store"):
            num_bytes, vault = self._store(group)
            images = group.arrays.get("images")
        return PaintReceipt(
            group_id=task.group_id, attempt=task.attempt, weight_version=version, vault=vault, num_bytes=num_bytes,
            paint_seconds=painted_seconds, store_seconds=time.perf_counter() - start, wait_weights_seconds=waited,
            proof=proof, actor=self.name, images_digest=None if images is None else digest_images(images),
            spans=log.spans,
        )  # fmt: skip

    def _begin(self, task: PromptTask) -> Any:
        if task.source is Source.FILES:
            return self.painter.encode_pair(task)
        if task.source is Source.LEARNER:
            return unpainted_group(task, self.version)
        return self.painter.denoise(task)

    def paint_images(
        self, prompts: Sequence[PromptSpec], sampling: EvalSampling, seeds: Sequence[int]
    ) -> tuple[int, np.ndarray]:
        """(number, uint8 [N,H,W,3]) of an evaluation's images, under the newest weights. Called with num_returns=2."""
        with self.denoising:
            self._load_pending(0)
            return len(prompts), self.painter.paint_images(prompts, sampling, seeds)

    def held_version(self) -> tuple[int, WeightProof | None]:
        """Load what is pending and say which version is held, with its proof if it is new."""
        with self.denoising:
            self._load_pending(0)
            proof, self.new_proof = self.new_proof, None
            return self.version, proof

    def _load_pending(self, min_version: int) -> float:
        waited = self.pending.wait_for(min_version, self.config.weights.timeout_s)
        taken = self.pending.take()
        if taken is not None:
            offer, arrays, canary, previous = taken
            self.new_proof = self.painter.load(offer, arrays, canary, previous)
            self.version = self.pending.loaded = offer.version
        return waited

    def _store(self, group: Any) -> tuple[int, str]:
        """Store a group; while its vault is full, wait for room (room.py makes some, or ends the run)."""
        while True:
            try:
                return self._try_to_store(group)
            except VaultFull:
                time.sleep(ROOM_POLL_S)

    def _try_to_store(self, group: Any) -> tuple[int, str]:
        header, vault = group.header, vault_name(group.header.group_id, len(self.vaults))
        painting = (header.group_id, header.attempt)
        for digest, arrays in group.embeddings.items():
            ray.get([other.put_embedding.remote(digest, arrays, painting) for other in self.vaults.values()])
        return ray.get(self.vaults[vault].put.remote(header, group.arrays)), vault


@ray.remote(max_restarts=0, max_concurrency=3)  # a step, a state that is being written, a broadcast
class RankWorker:
    """A learner rank. Never restarted alone: when one dies or hangs, all are rebuilt (controller.py)."""

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        vaults: Mapping[str, Any],
        scorers: Sequence[ScorerConfig],
        learner: str = "learner.rank:RankLearner",
    ) -> None:
        """learner: target of the class that trains, so that benchmarks can put a timer in a model's place."""
        from cluster.processes import prepare_process

        prepare_process(f"learner-{rank}")
        self.target = learner
        self.config, self.rank, self.vaults, self.scorers = config, rank, dict(vaults), list(scorers)
        self.learner: Any = None
        self.kept: dict[str, np.ndarray] = {}
        self.sender: Sender | None = None
        self.saving: tuple[Path, PendingSave] | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of this rank's node, for rank 0."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, address: str, port: int, state: str | None, halved: bool = False) -> dict[str, Any]:
        """Join the process group, build the model and engine, and load `state` if given; halved: its micro-batches."""
        world = self.config.learner.ranks
        local_rank = "0" if self.config.learner.gpus_per_rank else str(self.rank)
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=local_rank,
        )
        from cluster.processes import limit_threads

        with collector_paused():
            learner_class = registry.import_target(self.target)
            limit_threads(self.config.learner.threads)
            self.learner = learner_class(self.config, self.rank, world, score_gradient=self._score_gradient())
        if state is not None:
            self.learner.load_state(learner_files_here(Path(state), self.config))
        if halved:
            self.learner.halve_micro_batches()
        return {"name": f"learner-{self.rank}", "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def values(self, job: StepJob) -> dict[int, np.ndarray]:
        return self.learner.values(job, self._fetch, self._fetch_embedding)

    def update(self, job: StepJob) -> StepReport:
        start, log = wall_clock(), SpanLog(f"learner-{self.rank}")
        report = self.learner.update(job, self._fetch, self._fetch_embedding)
        log.end_to_end(start, report.seconds)
        return report.model_copy(update={"spans": log.spans})

    def snapshot(self, version: int, step: int, keep: bool = False, average: bool = False) -> tuple[Any, Any]:
        """((offer, canary), arrays) on rank 0, (None, None) elsewhere. Called with num_returns=2.

        average: learner.ema's weights instead of those that paint. keep: the arrays stay here for `send`, and their
        description is returned in their place.
        """
        published = self.learner.snapshot(version, step, average)
        if published is None:
            return None, None
        meta = (published.offer, published.canary_current)
        if not keep:
            return meta, published.arrays
        self.kept = published.arrays
        return meta, describe(self.kept)

    def listen(self, timeout_s: float, backend: str) -> tuple[str, int, str]:
        """Begin a channel to host copies; returns where they find it (Sender.address)."""
        self.sender = Sender(timeout_s, backend)
        return self.sender.address()

    def connect(self, num_copies: int) -> None:
        """Wait until all host copies have joined the channel."""
        assert self.sender is not None, "connect before listen"
        self.sender.connect(num_copies)

    def send(self) -> int:
        """Broadcast what the last snapshot kept; returns the bytes sent to each node."""
        assert self.sender is not None, "send before listen"
        return self.sender.send(self.kept)

    def kept_arrays(self) -> tuple[int, dict[str, np.ndarray]]:
        """(number, arrays) of the last snapshot, by the object store after all. Called with num_returns=2."""
        return len(self.kept), self.kept

    def begin_save(self, folder: str) -> None:
        """Hand the state to the writer of a new folder on this machine; collective, rank 0 writes."""
        self.saving = (Path(folder), self.learner.begin_save(folder))

    def finish_save(self, step: int) -> FileDigests:
        """Wait for the writer; upload what it wrote where the run lives at a URL. On rank 0, beside training."""
        assert self.saving is not None, "finish_save before begin_save"
        (folder, pending), self.saving = self.saving, None
        digests: FileDigests = pending.finish()
        url = url_of(self.config)
        if url is not None:
            RemoteCheckpoints(url).put(folder, step, digests)
        return digests

    def _fetch(self, group_id: int, names: tuple[str, ...], samples: slice) -> Mapping[str, np.ndarray]:
        vault = self.vaults[vault_name(group_id, len(self.vaults))]
        return ray.get(vault.get.remote(group_id, names, samples))

    def _fetch_embedding(self, digest: str) -> Mapping[str, np.ndarray]:
        return ray.get(next(iter(self.vaults.values())).get_embedding.remote(digest))

    def _score_gradient(self) -> Any:
        """A synchronous scorer with gradients, for objectives that back-propagate a reward."""
        from contracts.needs import objective_needs

        if not objective_needs(self.config).reward_gradient:
            return None
        from cluster.deployed.names import resolved
        from reward_servers.client import SyncRewardClient

        trained = next(scorer for scorer in self.scorers if not scorer.held_out)
        client = SyncRewardClient(resolved(trained))

        def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Any:
            return client.score(images, prompts, metadata, want_gradients=True)

        return score


PROBE_S = 2.0
"""Between two questions to a reward server whether it still answers."""


@ray.remote(max_restarts=-1, max_concurrency=4)
class ServerHost:
    """Runs one reward server as a process of its own on this node, and starts it again when it dies or hangs."""

    def __init__(self, scorer: ScorerConfig) -> None:
        from cluster.processes import prepare_process

        prepare_process(f"host-{scorer.name}")
        self.scorer, self.port, self.restarts = scorer, 0, 0
        self.process: Any = None
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    def start(self) -> str:
        """Start the server, wait until it is ready, return its URL."""
        with self.lock:
            if self.process is None:
                self._launch()
                threading.Thread(target=self._watch, daemon=True, name="server-watch").start()
            return self.process.url

    def place(self, folder: str, files: Files) -> None:
        """Write a version of the scorer on this machine, where it is another than the controller's."""
        version, _, _ = versions.unpack(files)
        versions.place(Path(folder), version, files)

    def flip(self, folder: str, name: str) -> None:
        """Put a version in use here."""
        versions.flip(Path(folder), name)

    def info(self) -> dict[str, Any]:
        """Process id, restarts, and node of the server."""
        return {
            "name": f"reward-{self.scorer.name}", "pid": self.process.pid, "restarts": self.restarts,
            "node": ray.get_runtime_context().get_node_id(),
        }  # fmt: skip

    def stop(self) -> None:
        self.stopping.set()
        with self.lock:
            if self.process is not None:
                self.process.stop()

    def _launch(self) -> None:
        from reward_servers.client import ServerProcess

        assert self.scorer.serve is not None
        # Without a token a server listens on loopback alone, which a dispatcher on another node would not reach.
        host = ray.util.get_node_ip_address() if os.environ.get(self.scorer.token_env) else "127.0.0.1"
        process = ServerProcess(
            self.scorer.serve, self.scorer.options, host=host, port=self.port, token_env=self.scorer.token_env
        )
        url = process.start()
        self.process, self.port = process, int(url.rsplit(":", 1)[1])  # the same address after a restart

    def _watch(self) -> None:
        answered = awake.clock()
        while not self.stopping.wait(0.5):
            if self.process.alive():
                if awake.clock() - answered < PROBE_S:
                    continue
                if self._answers():
                    answered = awake.clock()
                    continue
                if awake.clock() - answered < self.scorer.timeout_s:
                    continue
            with self.lock:
                if not self.stopping.is_set():
                    self.restarts += 1
                    self.process.stop(grace_s=0.0)  # one that hangs holds the port
                    self._launch()
            answered = awake.clock()

    def _answers(self) -> bool:
        """Whether the server's event loop answers; its scorer may be busy for as long as it likes."""
        import urllib.request

        try:
            with urllib.request.urlopen(f"{self.process.url}/livez", timeout=self.scorer.timeout_s) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
