"""A real vLLM on the CPU behind `judge up`: its log-probs are the model's, and a training run learns from them.

Needs the environment that reward_servers/vllm_cpu/install.sh makes (or SALON_VLLM_PYTHON); skipped without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from reward_helpers import post, read_table, score_body

from reward_servers.judging.vllm import find_python

PYTHON = find_python("cpu", None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.executable == PYTHON, reason="no vLLM: run reward_servers/vllm_cpu/install.sh"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def judge_url(judge_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`judge up` with a real vLLM. Random weights answer anything, so no least mass is asked of them."""
    folder = tmp_path_factory.mktemp("up")
    ready, log = folder / "ready.json", folder / "up.log"
    command = [
        sys.executable, "-m", "reward_servers", "judge", "up", str(judge_folder), "--device", "cpu", "--python", PYTHON,
        "--port", "0", "--ready-file", str(ready), "--vllm-log", str(folder / "vllm.log"), "--option", "min_mass=0",
        "--option", "cache_entries=0", "--vllm-arg=--max-model-len=512", "--vllm-arg=--kv-cache-memory-bytes=67108864",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield str(json.loads(ready.read_text())["url"])
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


def test_its_probabilities_are_the_models(judge_folder: Path, judge_url: str) -> None:
    torch = pytest.importorskip("torch")
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from playground.train import vlm

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(judge_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(judge_folder)
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 32, 32, 3), np.uint8)
    table = read_table(post(judge_url, score_body(images, prompts=CAPTIONS)))
    spellings = {
        word: [processor.tokenizer.encode(text, add_special_tokens=False) for text in (word, word.title(), f" {word}")]
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


def test_a_training_run_learns_from_it(judge_url: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    from tests.laws.run_kit import local_ray, run_on_cluster, tiny_config

    scorers = [{"name": "vqa", "urls": [judge_url], "weights": {"p_yes": 1.0}, "timeout_s": 120, "deadline_s": 240}]
    config = tiny_config(tiny_model_folder, tmp_path, scorers=scorers, stop={"steps": 2})
    with local_ray(config):
        summary = run_on_cluster(config)
    assert summary["steps"] == 2
    assert summary["images_trained"] == 2 * 2 * 4
    metrics = httpx.get(f"{judge_url}/metrics").text
    asked = re.search(r'salon_judge_questions_total\{outcome="ok",protocol="yes_no",scorer="vqascore"\} (\d+)', metrics)
    assert asked is not None
    assert int(asked[1]) >= summary["images_trained"]
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    spreads = [value for row in rows for key, value in row.items() if key.startswith("reward_std") and "p_yes" in key]
    assert spreads
    assert all(spread > 0 for spread in spreads), "no group is scored alike: there is something to learn"
    assert os.path.isdir(tmp_path / "tiny" / "checkpoints")
