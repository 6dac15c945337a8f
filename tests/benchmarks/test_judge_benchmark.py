"""The judge's benchmark: the bare side sends what the layer sent; the page with, without and before a real vLLM."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import pytest

from benchmarks import judge
from tests.reward_servers.judge_helpers import judging, leans, pictures_of

ROW = {"median": 100.0, "low": 90.0, "high": 110.0}
FIGURES = dict.fromkeys(("per_second_bare", "per_second_through", "through_over_bare", "added_cpu_ms"), ROW)
BEFORE = {"repeats": 10, "target": 0.9, "endpoint": "stand-in", "callers": 16, "questions": 256, **FIGURES}


def test_both_sides_send_the_same_requests_with_log_probs_by_id_where_the_server_has_them() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    with judging(lambda body: leans({"yes": 0.6, "no": 0.3}, body)) as fake:
        figures = asyncio.run(judge._compared(fake.url, "judge", images, repeats=2, token="key"))
    assert figures["log_probs"] == "ids"
    learnt, rounds = 1, 2 + 2 * 2 * judge.ROUNDS  # captured, bare once to warm up, then two repeats of both sides
    assert len(fake.bodies) == learnt + rounds * len(images)
    assert set(fake.authorisations) == {"Bearer key"}
    told = {str(sorted(body.items())) for body in fake.bodies}
    assert len(told) == len(images), "every image is asked about in the same words by both"
    assert {pictures_of(body)[0].tobytes() for body in fake.bodies} == {image.tobytes() for image in images}
    assert figures["through_over_bare"]["median"] > 0


def test_without_vllm_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "find_python", lambda device, given: sys.executable)
    vllm = asyncio.run(judge._with_vllm(np.zeros((1, 8, 8, 3), np.uint8), 1))
    assert "make vllm-cpu" in vllm["skipped"]
    lines = judge.table({**BEFORE, "vllm": vllm}).splitlines()
    assert "make vllm-cpu" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1


def test_results_of_before_and_of_a_real_vllm_are_shown() -> None:
    old = judge.table(BEFORE)
    assert "bare stand-in endpoint" in old
    new = judge.table({**BEFORE, "vllm": {"device": "cpu", "log_probs": "ids", **FIGURES}})
    assert new.startswith(old)
    assert "real vLLM (cpu, log-probs by ids)" in new
