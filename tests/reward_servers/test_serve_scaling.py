"""Scorers in a real Ray Serve: one goes from 1 to 3 replicas and back while another, and a run, notice nothing.

The run trains the miniature model until it is stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from reward_helpers import free_port, pictures, post, score_body

from cluster.cli import main
from cluster.deployed.deployments import Deployment, deploy, listing, remove
from cluster.deployed.names import resolved, with_judge
from cluster.deployed.scaling import ByImagesHeld, Scaling
from cluster.deployed.seen import ReplicaAddresses
from cluster.validate import check_deployed, join_and_check
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.config.scoring import ScorerConfig
from contracts.errors import ConfigError, RegistryError, ScoringError
from contracts.scores import Outcome
from reward_servers.client import RewardClient
from reward_servers.settings import ServerSettings
from tests.laws.run_kit import controller_of

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TOKEN = "a-token-of-the-tests"
QUICK = Scaling(max_replicas=3, target_images=8, up_after_s=0.2, down_after_s=1.0, look_back_s=1.0, report_s=0.2)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {seconds:g} s: {listing()}"
        time.sleep(0.1)


def up(name: str, scorer: str, **options: Any) -> str:
    """Deploy with times short enough for a test; its URL."""
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    wanted = Deployment(f"scorers_to_deploy:{scorer}", name, options, QUICK, cpus=0.1, environment=environment)
    return deploy(wanted, ServerSettings(port=free_port(), max_batch=8, max_wait_s=0), TOKEN)[0]


def up_by_command(name: str, scorer: str) -> str:
    """Deploy as a user does; its URL."""
    command = ["jury", "deploy", f"scorers_to_deploy:{scorer}", "--as", name, "--max", "1", "--cpus", "0.1"]
    done = CliRunner().invoke(main, [*command, "--env", "OMP_NUM_THREADS"], catch_exceptions=False)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["name"] == name
    return str(told["urls"][0])


@pytest.fixture(scope="module")
def serve() -> Iterator[dict[str, str]]:
    """A Ray with two scorers deployed; their URLs by name."""
    import ray

    held = {name: os.environ.get(name) for name in ("SALON_REWARD_TOKEN", "PYTHONPATH")}
    os.environ |= {"SALON_REWARD_TOKEN": TOKEN, "PYTHONPATH": str(HERE)}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="WARNING",
             object_store_memory=200 * 2**20)  # fmt: skip
    try:
        yield {"slow": up("slow", "Slow", seconds=0.01), "steady": up_by_command("steady", "Steady")}
    finally:
        ray.shutdown()
        for name, value in held.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def reward_targets(path: Path) -> list[str]:
    """Where a run tells Prometheus that its reward servers are."""
    groups = json.loads(path.read_text())
    return [group["targets"][0] for group in groups if group["labels"]["role"] == "reward_server"]


def row(name: str) -> dict[str, Any]:
    return next(each for each in listing() if each["name"] == name)


def config_of(folder: Path, model: Path | str = "none") -> RunConfig:
    """A run whose jury is the deployed scorer `steady`, by its name; it goes on until it is stopped."""
    return config_from_tree(
        {
            "name": "beside", "runs_dir": str(folder), "model": {"path": str(model)},
            "prompts": {"source": "playground"}, "sampler": {"name": "ode", "steps": 2},
            "rollout": {"actors": 1, "groups_per_step": 2, "group_size": 4, "micro_batch": 4, "cpus_per_actor": 0.1},
            "scorers": [{"name": "steady", "urls": ["steady"]}],
            "objective": {"name": "nft"}, "learner": {"engine": "plain", "cpus_per_rank": 0.1},
            "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
            "telemetry": {"tensorboard": False, "report": False}, "stop": {"steps": 100_000},
        }
    )  # fmt: skip


class Load:
    """Callers in a closed loop, each with 8 images a request, until told to stop."""

    def __init__(self, name: str, callers: int) -> None:
        scorer = ScorerConfig(name=name, urls=(name,), concurrency=callers, max_batch=8, timeout_s=30, deadline_s=60)
        self.scorer, self.callers, self.go_on = resolved(scorer), callers, True
        self.tables: list[tuple[np.ndarray, Any]] = []
        self.stats: Any = None

    def run(self, seconds: float, meanwhile: Callable[[], bool]) -> None:
        """Load until `meanwhile`, asked every now and then in a thread, says that it is enough."""
        asyncio.run(self._run(seconds, meanwhile))

    async def _run(self, seconds: float, meanwhile: Callable[[], bool]) -> None:
        async with RewardClient(self.scorer) as client:
            callers = [asyncio.create_task(self._caller(client, index)) for index in range(self.callers)]
            try:
                async with asyncio.timeout(seconds):
                    while not await asyncio.to_thread(meanwhile):
                        await asyncio.sleep(0.1)
            finally:
                self.go_on = False
                await asyncio.gather(*callers)
                self.stats = client.stats

    async def _caller(self, client: RewardClient, index: int) -> None:
        images = pictures(8, seed=index)
        while self.go_on:
            self.tables.append((images, await client.score(images, ["x"] * 8, ())))

    def outcomes(self) -> set[Outcome]:
        return {Outcome(code) for _, table in self.tables for code in np.unique(table.outcomes)}


def test_one_scorer_goes_from_1_to_3_replicas_and_back_and_neither_another_nor_a_run_notices(
    serve: dict[str, str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    import ray

    config = config_of(tmp_path, tiny_model_folder)
    assert check_deployed(config).errors == []
    controller = controller_of(config)
    summary = controller.run.remote()

    def step() -> int:
        assert not ray.wait([summary], timeout=0)[0], ray.get(summary)
        return int(ray.get(controller.status.remote()).get("step", 0))

    wait_until(lambda: step() >= 1)
    before, steady, load = step(), row("steady"), Load("slow", callers=8)
    assert row("slow")["replicas"] == 1
    seen = ReplicaAddresses()

    def exporters() -> list[str]:
        return asyncio.run(seen.of({"slow"}))["slow"]

    load.run(60, lambda: row("slow")["replicas"] == len(set(exporters())) == 3)
    at_three = step()
    wait_until(lambda: (row("slow")["replicas"], row("slow")["wanted"]) == (1, 1))
    after = step()
    assert "salon_reward_images_total" in httpx.get(f"http://{exporters()[0]}/metrics").text
    assert len(exporters()) == 1
    (steadys,) = reward_targets(tmp_path / ".prometheus" / "beside.json")
    assert 'salon_reward_ready{scorer="steady"} 1.0' in httpx.get(f"http://{steadys}/metrics").text
    controller.stop.remote()
    ended = ray.get(summary, timeout=60)

    assert before < at_three < after, "the run stood still"
    assert load.outcomes() == {Outcome.OK}, "scaling cost a score"
    assert not load.stats.failures
    for images, table in load.tables:
        np.testing.assert_allclose(table.values[:, 0], images.mean(axis=(1, 2, 3)), rtol=1e-5)
    assert row("steady")["pids"] == steady["pids"]
    assert ended["steps"] > after - 1
    assert not any(ended["images_discarded"].values())
    text = (tmp_path / "beside" / "events.jsonl").read_text()
    assert not [line for line in text.splitlines() if json.loads(line)["event"].endswith(("lost", "restarted"))]


def test_every_request_gets_one_answer_or_a_typed_failure_when_replicas_are_killed(serve: dict[str, str]) -> None:
    load, killed = Load("slow", callers=4), []

    def kill_some() -> bool:
        alive = [pid for pid in row("slow")["pids"] if pid not in killed]  # Serve notices a death a little later
        enough = len(load.tables) >= 20 * (len(killed) + 1)
        if len(killed) == 2:
            return enough and bool(alive)
        if enough and alive:
            os.kill(alive[0], signal.SIGKILL)
            killed.append(alive[0])
        return False

    load.run(60, kill_some)
    assert all(len(table.outcomes) == 8 for _, table in load.tables)
    for images, table in load.tables:
        good = table.valid()[:, 0]
        np.testing.assert_allclose(table.values[good, 0], images.mean(axis=(1, 2, 3))[good], rtol=1e-5)
        assert good.all() or all(table.reasons[i] for i in np.flatnonzero(~good))
    assert load.stats.failures, "no request was under way in a replica that was killed"
    assert len(killed) == 2
    assert load.tables[-1][1].valid().all(), "it was not served again"

    def healed() -> bool:
        slow = row("slow")
        return slow["status"] == "RUNNING" and not set(killed) & set(slow["pids"])

    wait_until(healed)


def test_a_replica_speaks_the_protocol_of_a_server_behind_uvicorn(serve: dict[str, str]) -> None:
    url, body = serve["steady"], score_body(pictures(2))
    assert post(url, body).status_code == 401
    assert post(url, b"garbage", Authorization=f"Bearer {TOKEN}").status_code == 400
    assert post(url, score_body(pictures(300)), Authorization=f"Bearer {TOKEN}").status_code == 413
    assert post(url, body, Authorization=f"Bearer {TOKEN}").status_code == 200
    assert httpx.get(f"{url}/livez").status_code == httpx.get(f"{url}/readyz").status_code == 200
    assert "salon_reward_queue_depth" in httpx.get(f"{url}/metrics").text
    assert httpx.get(f"{url}/v1/info").status_code == 401
    listed = json.loads(CliRunner().invoke(main, ["jury", "list", "--json"], catch_exceptions=False).stdout)
    assert {(each["name"], each["status"]) for each in listed} == {("slow", "RUNNING"), ("steady", "RUNNING")}


def test_a_scorer_that_cannot_be_deployed_leaves_nothing_behind_and_says_why(serve: dict[str, str]) -> None:
    with pytest.raises(ScoringError, match="no weights today"):
        up("broken", "Broken")
    with pytest.raises(ConfigError, match="nothing is deployed as 'broken'"):
        remove("broken")
    with pytest.raises(ConfigError, match="no scorer is deployed as 'broken'; there is slow, steady"):
        resolved(ScorerConfig(name="b", urls=("broken",)))


def judged_by(*names: str) -> RunConfig:
    """A run whose online scorer learns from a deployed judge."""
    tree = config_of(Path("runs")).model_dump(mode="json")
    scorer = {"name": "o", "serve": "distilled", "options": {"model": "clip"}}
    online = {"name": "distilled", "scorer": "o", "judge": {"name": "j", "urls": names}}
    return config_from_tree({**tree, "scorers": [scorer], "online": [online]})


def test_the_judge_of_an_online_scorer_is_found_by_its_name(serve: dict[str, str]) -> None:
    assert check_deployed(judged_by("steady")).errors == []
    (problem,) = join_and_check(judged_by("broken")).errors
    assert "online.0.judge.urls: no scorer is deployed as 'broken'; there is slow, steady" in str(problem)
    judge = with_judge(judged_by("steady", "http://127.0.0.1:1").online[0]).judge_config
    assert judge is not None
    assert judge.urls == (serve["steady"], "http://127.0.0.1:1")


def test_names_need_a_ray_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"scorers\.b\.urls.*Ray cluster"):
        resolved(ScorerConfig(name="b", urls=("broken", "http://127.0.0.1:1")))
    plain = ScorerConfig(name="b", urls=("http://127.0.0.1:1",))
    assert resolved(plain) is plain


@pytest.mark.parametrize(
    ("scorer", "name", "options", "problem"),
    [
        ("nosuch", "a", {}, "no scorer named 'nosuch'"),
        ("jpeg_size", "a/b", {}, "no name for a deployment"),
        ("jpeg_size", "a", {"quality": 200}, "less than or equal to 100"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(
    scorer: str, name: str, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises((ConfigError, RegistryError), match=problem):
        deploy(Deployment(scorer, name, options), ServerSettings(), None)


class Context:
    """What Serve's controller hands to a policy, as far as this one reads it."""

    def __init__(self, *held: float) -> None:
        self.aggregated_metrics = {"images_held": dict(enumerate(held))} if held else None


def test_replicas_wanted_are_images_held_over_the_target() -> None:
    wanted = ByImagesHeld(target_images=16)
    assert wanted(Context(8, 24, 16))[0] == 3
    assert wanted(Context(0, 0))[0] == wanted(Context())[0] == 0
    with pytest.raises(ConfigError, match="1 <= min <= max"):
        Scaling(min_replicas=3, max_replicas=2)
    with pytest.raises(ConfigError, match="more than 0"):
        Scaling(target_images=0)
