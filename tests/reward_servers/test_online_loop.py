"""The process of an online trainer and the server that follows it: queues, a stalled judge, budgets, versions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import judges_of_tests
import numpy as np
import pytest
from online_kit import adversarial, distilled, fed, flat, publish, write_references
from reward_helpers import post, score_body, served
from scorer_models import build_clip, build_dino

from contracts import versions
from contracts.codec import decode
from contracts.errors import ConfigError
from contracts.scores import ScoreResponse, ScorerInfo
from reward_servers.construct import make_scorer
from reward_servers.online.inbox import Inbox
from reward_servers.online.loop import MAX_ERRORS, OnlineLoop
from reward_servers.online.trainer import OnlineTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("online_loop")
    return {"dino": build_dino(root / "dino"), "clip": build_clip(root / "clip")}


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")


class Counting(OnlineTrainer):
    """Its weights are the number of updates; `stuck` holds an update up; a group of id -1 is an error."""

    def __init__(self) -> None:
        super().__init__(None, {}, 0)
        self.learnt: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def load(self) -> None:
        self.updates = 0

    def restore(self, weights: Any, state: Any) -> None:
        self.learnt = weights["learnt"].tolist()

    def learn(self, item: Any) -> dict[str, float] | None:
        self.go.wait(30)
        if item.group_id == -1:
            raise RuntimeError("no such group")
        self.learnt.append(item.group_id)
        return {"last": float(item.group_id)}

    def pack(self) -> Any:
        return {"learnt": np.array(self.learnt, np.int64)}, {}, {}


def group(number: int) -> Any:
    return fed(number, np.zeros((1, 4, 4, 3), np.uint8))


def test_the_inbox_gives_the_newest_and_drops_the_oldest() -> None:
    inbox: Inbox[int] = Inbox(3)
    for number in range(5):
        inbox.put(number)
    assert (inbox.offered, inbox.dropped) == (5, 2)
    assert [inbox.take(0) for _ in range(4)] == [4, 3, 2, None]
    inbox.close()
    assert inbox.take(60) is None


def test_a_trainer_that_hangs_makes_nobody_wait_and_its_groups_are_counted() -> None:
    loop = OnlineLoop(Counting(), queue_groups=2, updates_per_step=100)
    loop.start(None)
    loop.trainer.go.clear()
    loop.offer(group(0))
    until(lambda: len(loop.inbox) == 0, "the first group is taken")
    for number in range(1, 6):
        loop.offer(group(number))
    assert loop.figures()["dropped"] == 3
    assert loop.candidate(0) is None
    loop.trainer.go.set()
    until(lambda: len(loop.trainer.learnt) == 3, "what waits is learnt")
    assert loop.trainer.learnt == [0, 5, 4], "newest first"
    loop.stop()


def test_updates_are_bounded_between_two_learner_steps_and_a_candidate_holds_all_of_them() -> None:
    loop = OnlineLoop(Counting(), queue_groups=9, updates_per_step=2)
    started, _ = loop.start(None)
    for number in range(5):
        loop.offer(group(number))
    until(lambda: len(loop.trainer.learnt) == 2, "two updates")
    until(lambda: loop.figures()["updates"] == 2, "they are counted")
    version, files = loop.candidate(5)
    assert version.number == started.number + 1
    assert len(versions.unpack(files)[1]["learnt"]) == 2
    assert loop.candidate(0) is None, "nothing is new since"
    loop.tick()
    until(lambda: len(loop.trainer.learnt) == 4, "two more")
    loop.roll_back(files)
    assert len(loop.trainer.learnt) == 2
    assert loop.figures()["updates"] == 2
    again = OnlineLoop(Counting(), 1, 1)
    assert again.start(files)[0].name == version.name, "the same version is in force"
    loop.stop()
    again.stop()


def test_errors_cost_an_update_each_and_too_many_in_a_row_are_told() -> None:
    loop = OnlineLoop(Counting(), queue_groups=MAX_ERRORS + 2, updates_per_step=1000)
    loop.start(None)
    loop.offer(group(-1))
    until(lambda: loop.errors == 1, "the error is counted")
    loop.offer(group(1))
    until(lambda: loop.trainer.learnt == [1], "it goes on")
    for _ in range(MAX_ERRORS):
        loop.offer(group(-1))
    until(lambda: loop.failure is not None, "it gives up")
    with pytest.raises(RuntimeError, match="no such group"):
        loop.candidate(0)
    loop.stop()


def test_a_version_of_another_model_is_refused_with_a_way_out(models: dict[str, Path], tmp_path: Path) -> None:
    references = write_references(tmp_path, flat((200, 0, 0)))
    loop = OnlineLoop(adversarial(references, models["dino"], hidden=8), 1, 1)
    _, files = loop.start(None)
    loop.stop()
    with pytest.raises(ConfigError, match="belongs to another model"):
        OnlineLoop(adversarial(references, models["dino"], hidden=4), 1, 1).start(files)


def test_a_stalled_judge_holds_up_nothing_but_its_labels(models: dict[str, Path]) -> None:
    loop = OnlineLoop(distilled("judges_of_tests:redness", models["clip"], images_per_group=2), 2, 9, label_threads=1)
    judges_of_tests.answers.clear()
    try:
        loop.start(None)
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8) for _ in range(6)]
        loop.offer(fed(0, pictures[0]))
        until(lambda: len(loop.inbox) == 0, "the judge is being asked")
        for number in range(1, 6):
            loop.offer(fed(number, pictures[number]))
        assert loop.figures()["dropped"] == 3
        assert loop.figures()["updates"] == 0
    finally:
        judges_of_tests.answers.set()
    until(lambda: loop.figures()["updates"] == 3, "the labels come")
    means = np.round([p[0, ..., 0].mean() for p in (pictures[0], pictures[5], pictures[4])], 2)
    assert np.round(judges_of_tests.asked[-6::2], 2).tolist() == means.tolist(), "newest first"
    loop.stop()


def test_a_server_takes_up_versions_between_batches_and_says_which(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = adversarial(write_references(tmp_path / "refs", flat((200, 0, 0))), models["dino"], per_prompt=False)
    trainer.load()
    first = publish(tmp_path, trainer)
    scorer = make_scorer("adversarial_dino", [f"model={models['dino']}", f"versions={tmp_path}", "size=null"])
    images = flat((10, 200, 30), 3)

    def info() -> ScorerInfo:
        return ScorerInfo.model_validate_json(httpx.get(f"{server.url}/v1/info").content)

    def score(version: str = "latest") -> tuple[str, np.ndarray]:
        response, arrays = decode(post(server.url, score_body(images, version=version)).content, ScoreResponse)
        return response.table.version, arrays["values"]

    with served(scorer) as server:
        begun = info()
        assert begun.weight_digest == first.digest
        assert begun.version.endswith(first.name)
        old_version, old_values = score(begun.version)
        trainer.learn(fed(0, images))
        second = publish(tmp_path, trainer, 1)
        asked_exactly = begun.version.replace(first.name, second.name)
        assert score(asked_exactly)[0] == asked_exactly, "a version that has just come is found"
        assert (info().version, info().weight_digest) == (asked_exactly, second.digest)
        gone = post(server.url, score_body(images, version=begun.version))
        assert gone.status_code == 409
        assert asked_exactly in gone.json()["error"]
        assert not np.array_equal(score()[1], old_values)
        broken = versions.pack(2, {"head.0.weight": np.zeros((1, 1))}, {}, {"base": "another model"})
        versions.place(tmp_path, *broken)
        versions.flip(tmp_path, broken[0].name)
        assert score()[0] == asked_exactly, "an unfit version is not taken up"
        versions.flip(tmp_path, first.name)
        np.testing.assert_array_equal(score()[1], old_values)
        assert score()[0] == old_version


def test_a_version_that_goes_while_a_request_waits_is_answered_409(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = adversarial(write_references(tmp_path / "refs", flat((200, 0, 0))), models["dino"], per_prompt=False)
    trainer.load()
    publish(tmp_path, trainer)
    scorer: Any = make_scorer("adversarial_dino", [f"model={models['dino']}", f"versions={tmp_path}", "size=null"])
    inside, go = threading.Event(), threading.Event()
    plain = scorer.refresh

    def slow_refresh() -> None:
        inside.set()
        go.wait(30)
        plain()

    with served(scorer) as server:
        version = ScorerInfo.model_validate_json(httpx.get(f"{server.url}/v1/info").content).version
        scorer.refresh = slow_refresh
        answers: list[int] = []
        body = score_body(flat((1, 2, 3), 2), version=version)
        asking = threading.Thread(target=lambda: answers.append(post(server.url, body).status_code))
        asking.start()
        inside.wait(30)
        trainer.learn(fed(0, flat((1, 2, 3))))
        publish(tmp_path, trainer, 1)
        go.set()
        asking.join()
        assert answers == [409]


def test_a_folder_without_versions_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    for options, problem in (([], "names no folder of versions"), ([f"versions={tmp_path}"], "no version to serve")):
        scorer = make_scorer("adversarial_dino", [f"model={models['dino']}", "size=null", *options])
        with pytest.raises(ConfigError, match=problem):
            scorer.load()
