"""Asking a judge over real HTTP: log-probs in, patience and cost bounded, and hostile answers never become numbers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import numpy as np
import pytest
from fastapi import Response
from fastapi.responses import JSONResponse
from judge_helpers import consult, flat, judging, leans, options_for, pictures_of, says, texts_of

from contracts.config.judges import JudgeOptions
from contracts.errors import ConfigError
from contracts.metrics import BY_NAME
from contracts.scores import Outcome
from reward_servers.client.endpoint import AttemptFailed
from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.yes_no import Scale, YesNo
from reward_servers.judging.question import Picture, Question, Undecided

DARK, BRIGHT = Picture(flat(60)), Picture(flat(220))


def by_brightness(body: dict[str, Any]) -> dict[str, Any]:
    """P(yes) = mean pixel / 255 of the mass 0.8."""
    share = float(pictures_of(body)[0].mean()) / 255
    return leans({"Yes": 0.6 * share, " yes": 0.2 * share, "no": 0.8 * (1 - share), "the": 0.2}, body)


async def p_yes(judge: Judge, picture: Picture = BRIGHT) -> float:
    return (await YesNo().ask(judge, "a bright square", (picture,))).p


def test_log_probs_of_exactly_the_asked_words_where_the_server_has_them() -> None:
    with judging(by_brightness) as fake:
        answer = consult(options_for(fake.url), lambda judge: YesNo().ask(judge, 'say "hi"\nplease', (BRIGHT,)))
    assert answer.p == pytest.approx(220 / 255)
    assert answer.raw == pytest.approx(0.8 * 220 / 255)
    assert answer.error == 0.0
    (body,) = fake.bodies
    assert sorted(body["logprob_token_ids"]) == list(range(10)), "five spellings of each word"
    assert body["max_tokens"] == 1
    assert body["temperature"] == 0
    assert texts_of(body) == "Does this figure show \"say 'hi' please\"? Please answer yes or no."
    np.testing.assert_array_equal(pictures_of(body)[0], flat(220))


def no_ids(status: int) -> Any:
    def behave(body: dict[str, Any]) -> Any:
        if "logprob_token_ids" in body:
            return JSONResponse({"error": {"message": "unknown field"}}, status)
        return by_brightness(body)

    return behave


def ignores_ids(body: dict[str, Any]) -> Any:
    return by_brightness({key: value for key, value in body.items() if key != "logprob_token_ids"})


@pytest.mark.parametrize(
    ("behave", "tokenizes", "sent"), [(by_brightness, False, 2), (no_ids(400), True, 3), (ignores_ids, True, 3)]
)
def test_elsewhere_the_best_tokens_are_read_and_the_lack_is_learnt_once(
    behave: Any, tokenizes: bool, sent: int
) -> None:
    async def twice(judge: Judge) -> list[float]:
        return [await p_yes(judge, picture) for picture in (BRIGHT, DARK)]

    with judging(behave, tokenizes=tokenizes) as fake:
        assert consult(options_for(fake.url), twice) == pytest.approx([220 / 255, 60 / 255])
        assert len(fake.bodies) == sent
        with pytest.raises(AttemptFailed):
            consult(options_for(fake.url, log_probs="ids"), p_yes)


def test_a_server_without_log_probs_is_no_judge() -> None:
    with judging(lambda body: says("yes")) as fake, pytest.raises(AttemptFailed, match="no log-probs"):
        consult(options_for(fake.url), p_yes)
    assert len(fake.bodies) <= 2, "it is not asked again and again"


def test_a_grade_is_the_expectation_of_ten_digits() -> None:
    scale = Scale("{prompt}: 0 to 9?")
    with judging(lambda body: leans({"9": 0.3, "7": 0.1, "0": 0.4, "the": 0.2}, body)) as fake:
        grade = consult(options_for(fake.url), lambda judge: scale.ask(judge, "x", (BRIGHT,)))
    values, weights = np.array([9, 7, 0]), np.array([0.3, 0.1, 0.4]) / 0.8
    assert grade.mean == pytest.approx((values * weights).sum(), rel=1e-5)
    assert grade.deviation == pytest.approx(np.sqrt((weights * (values - grade.mean) ** 2).sum()), rel=1e-5)
    assert len(fake.bodies[0]["logprob_token_ids"]) == 10


TOO_SURE = {"token": "yes", "logprob": 0.7, "top_logprobs": []}
TWICE_SURE = {"token": "yes", "logprob": -0.01, "top_logprobs": [{"token": "no", "logprob": -0.01}]}


def with_log_probs(entry: Any) -> dict[str, Any]:
    answer = says("yes")
    answer["choices"][0]["logprobs"] = {"content": entry}
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        Response(b"", 200), Response(b"<html>", 200), Response(b"[]", 200), Response(b"\xff\xfe", 200),
        Response(b'{"choices":' + b"[" * 20_000, 200), Response(b"x" * 3_000_000, 200), Response(b"null", 200),
        JSONResponse({"choices": []}), JSONResponse({"choices": [{"message": {"content": 7}}]}),
        JSONResponse({"choices": "yes"}), JSONResponse(with_log_probs([TOO_SURE])),
        JSONResponse(with_log_probs([TWICE_SURE])), JSONResponse(with_log_probs("yes")),
        Response(json.dumps(with_log_probs([{**TOO_SURE, "logprob": float("nan")}])), 200),
        JSONResponse({"error": "overloaded"}, 500), Response(b"", 302, {"location": "http://127.0.0.1:9/"}),
    ],
)  # fmt: skip
def test_nonsense_is_a_failed_attempt_and_never_a_number(answer: Response) -> None:
    with judging(lambda body: answer) as fake, pytest.raises(AttemptFailed) as failed:
        consult(options_for(fake.url, max_retries=0), p_yes)
    assert failed.value.outcome is Outcome.FAILED


@pytest.mark.parametrize(
    "answer",
    [
        says(None, refusal="I can't help with that"), says("", "content_filter"),
        with_log_probs([{"token": "I", "logprob": -0.01, "top_logprobs": [{"token": "As", "logprob": -5.0}]}]),
    ],
)  # fmt: skip
def test_a_refusal_is_undecided(answer: dict[str, Any]) -> None:
    with judging(lambda body: answer, tokenizes=False) as fake, pytest.raises(Undecided):
        consult(options_for(fake.url, log_probs="top"), p_yes)


def test_failures_are_retried_within_the_budget() -> None:
    def third_time(body: dict[str, Any]) -> Any:
        return by_brightness(body) if len(fake.bodies) >= 3 else JSONResponse({}, 500)

    async def go(judge: Judge) -> tuple[float, Any]:
        return await p_yes(judge), judge.stats

    with judging(third_time) as fake:
        p, stats = consult(options_for(fake.url), go)
    assert p == pytest.approx(220 / 255)
    assert (stats.requests, stats.retries, dict(stats.failures)) == (3, 2, {"500": 2})


def test_the_deadline_holds_and_says_what_went_before() -> None:
    async def slow(body: dict[str, Any]) -> Any:
        await asyncio.sleep(30)

    with judging(slow) as fake, pytest.raises(AttemptFailed, match=r"no answer within 1\.5 s") as failed:
        consult(options_for(fake.url, timeout_s=0.2, deadline_s=1.5, max_retries=9), p_yes)
    assert failed.value.outcome is Outcome.TIMED_OUT
    assert "did not answer within 0.2 s" in failed.value.reason


def test_an_open_circuit_spares_the_server_and_is_told() -> None:
    async def go(judge: Judge) -> None:
        for _ in range(2):
            with pytest.raises(AttemptFailed):
                await p_yes(judge)
        assert judge.away() is not None
        asked = len(fake.bodies)
        with pytest.raises(AttemptFailed, match="no answer within"):
            await p_yes(judge)
        assert len(fake.bodies) == asked

    options = {"max_retries": 0, "breaker_failures": 2, "breaker_reset_s": 60.0, "deadline_s": 1.0}
    with judging(lambda body: JSONResponse({}, 500)) as fake:
        consult(options_for(fake.url, **options), go)


def test_another_server_takes_over_and_a_slow_first_request_is_hedged() -> None:
    stuck = asyncio.Event

    async def hangs_later(body: dict[str, Any]) -> Any:
        if 15 < len(first.bodies) <= 20:
            await stuck().wait()
        return by_brightness(body)

    async def go(judge: Judge) -> tuple[list[float], Any]:
        pictures = [Picture(flat(level)) for level in range(100, 160)]
        return [await p_yes(judge, picture) for picture in pictures], judge.stats

    with judging(hangs_later) as first, judging(by_brightness) as second:
        options = options_for(first.url, second.url, hedge_quantile=0.9, timeout_s=20.0, deadline_s=20.0)
        values, stats = consult(options, go)
    assert values == pytest.approx([level / 255 for level in range(100, 160)])
    assert stats.hedges > 0
    assert stats.retries == 0
    assert stats.requests == 60 + stats.hedges
    assert stats.hedges <= 10 + 0.2 * 60, "hedges come out of the retry budget"


@pytest.mark.parametrize("same", [(), ("",), ("/", "")], ids=["one", "twice the same", "and with a slash"])
def test_a_lone_server_is_not_asked_twice_at_once(same: tuple[str, ...]) -> None:
    """However slow it is: all of the last requests are slower than the quantile of the quick ones before them."""

    async def slower(body: dict[str, Any]) -> Any:
        await asyncio.sleep(0.1 if len(fake.bodies) > 20 else 0)
        return by_brightness(body)

    async def go(judge: Judge) -> Any:
        for level in range(100, 125):
            await p_yes(judge, Picture(flat(level)))
        return judge.stats

    with judging(slower) as fake:
        stats = consult(options_for(fake.url, *(fake.url + end for end in same), hedge_quantile=0.5), go)
        assert (stats.hedges, stats.requests, len(fake.bodies), fake.most_in_flight) == (0, 25, 25, 1)


def test_a_hedge_that_the_budget_refuses_takes_no_place_at_the_server_it_would_have_gone_to() -> None:
    async def slower(body: dict[str, Any]) -> Any:
        await asyncio.sleep(0.1 if len(first.bodies) + len(second.bodies) > 20 else 0)
        return by_brightness(body)

    async def go(judge: Judge) -> Any:
        judge._persist.budget._left = 0.0
        for level in range(100, 125):
            await p_yes(judge, Picture(flat(level)))
        return judge.stats, [endpoint.in_flight for endpoint in judge.endpoints]

    with judging(slower) as first, judging(slower) as second:
        options = options_for(first.url, second.url, hedge_quantile=0.5, retry_budget=0.0)
        stats, held = consult(options, go)
    assert (stats.hedges, stats.requests) == (0, 25)
    assert held == [0, 0]


def test_the_cache_keys_are_image_prompt_and_protocol_version(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(judge: Judge) -> Any:
        same = Picture(flat(220))
        first = await p_yes(judge, BRIGHT)
        assert await p_yes(judge, same) == first
        await YesNo().ask(judge, "another prompt", (same,))
        await p_yes(judge, DARK)
        monkeypatch.setattr(YesNo, "version", "2")
        await p_yes(judge, same)
        return judge.stats

    with judging(by_brightness) as fake:
        stats = consult(options_for(fake.url), go)
        assert (stats.cache_hits, stats.requests, len(fake.bodies)) == (1, 4, 4)
    keys = {Question(("a", part), "p/1").key("m") for part in (BRIGHT, DARK, "b")}
    keys |= {Question(("a", BRIGHT), *rest).key(m) for rest, m in ((("p/2",), "m"), (("p/1",), "n"), (("p/1", 2), "m"))}
    assert len(keys) == 6


def test_the_cache_forgets_the_oldest() -> None:
    async def go(judge: Judge) -> int:
        for picture in (DARK, BRIGHT, DARK, Picture(flat(9)), BRIGHT, DARK):
            await p_yes(judge, picture)
        return judge.stats.cache_hits

    with judging(by_brightness) as fake:
        assert consult(options_for(fake.url, cache_entries=2), go) == 1


def test_at_most_so_many_requests_are_in_flight_to_one_server() -> None:
    async def slowly(body: dict[str, Any]) -> Any:
        await asyncio.sleep(0.02)
        return by_brightness(body)

    async def go(judge: Judge) -> list[float]:
        return await asyncio.gather(*(p_yes(judge, Picture(flat(level))) for level in range(1, 41)))

    with judging(slowly) as fake:
        consult(options_for(fake.url, concurrency=3, hedge_quantile=0.5), go)
    assert fake.most_in_flight == 3


def test_tokens_and_cost_are_counted_under_names_of_the_catalogue() -> None:
    told: dict[tuple[str, ...], float] = {}

    def meter(name: str, value: float, **labels: str) -> None:
        assert set(labels) | {"scorer"} == set(BY_NAME[name].labels)
        told[name, *labels.values()] = told.get((name, *labels.values()), 0.0) + value

    async def go(judge: Judge) -> Any:
        await asyncio.gather(p_yes(judge, DARK), p_yes(judge, BRIGHT))
        await p_yes(judge, DARK)
        return judge.stats

    with judging(by_brightness) as fake:
        prices = {"dollars_per_million_read": 2.0, "dollars_per_million_written": 10.0}
        stats = consult(options_for(fake.url, **prices), go, meter=meter)
    assert (stats.tokens_read, stats.tokens_written) == (200, 6)
    assert stats.dollars == pytest.approx((200 * 2 + 6 * 10) / 1e6)
    assert told["salon_judge_tokens_total", "read"] == 200
    assert told["salon_judge_tokens_total", "written"] == 6
    assert told["salon_judge_cost_dollars_total",] == pytest.approx(stats.dollars)
    assert told["salon_judge_cache_hits_total",] == 1
    assert told["salon_judge_requests_total",] == 2


def test_the_token_is_sent_and_never_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_TOKEN", "s3cret-of-the-judge")
    caplog.set_level(logging.DEBUG)
    with judging(no_ids(400)) as fake:
        options = options_for(fake.url, token_env="OTHER_TOKEN")
        consult(options, p_yes)
    assert set(fake.authorisations) == {"Bearer s3cret-of-the-judge"}
    assert "s3cret" not in caplog.text + repr(options)


def test_mistakes_in_options_are_told() -> None:
    for urls in ((), ("ftp://x",), ("http://x/v1",)):
        with pytest.raises(ValueError, match="urls"):
            JudgeOptions(urls=urls, model="m")
    with judging(by_brightness) as fake, pytest.raises(ConfigError, match="it has judge"):
        consult(options_for(fake.url, model="other"), lambda judge: judge.check(5.0))


def test_a_cancelled_question_leaves_its_place() -> None:
    async def slow(body: dict[str, Any]) -> Any:
        await asyncio.sleep(0.3)
        return by_brightness(body)

    async def go(judge: Judge) -> None:
        for wait in (0.0, 0.01, 0.05):
            tasks = [asyncio.create_task(p_yes(judge, Picture(flat(level)))) for level in range(6)]
            await asyncio.sleep(wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert [endpoint.in_flight for endpoint in judge.endpoints] == [0]
        start = time.monotonic()
        assert await p_yes(judge) == pytest.approx(220 / 255)
        assert time.monotonic() - start < 60

    with judging(slow) as fake:
        consult(options_for(fake.url, concurrency=2, timeout_s=20.0, deadline_s=30.0), go)
