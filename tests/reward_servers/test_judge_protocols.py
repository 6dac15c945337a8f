"""Protocols over real HTTP against judges whose opinion is known: brightness, position, or nothing at all."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from judge_helpers import brightness, consult, filled, flat, judging, leans, options_for, pictures_of, says, texts_of

from reward_servers.client.endpoint import AttemptFailed
from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.agreement import Shuffled, majority
from reward_servers.judging.protocols.aspects import ASPECTS, SCHEMA, Aspects
from reward_servers.judging.protocols.boxes import Boxes
from reward_servers.judging.protocols.checklist import Checklist
from reward_servers.judging.protocols.graded import Graded
from reward_servers.judging.protocols.listwise import Listwise
from reward_servers.judging.protocols.pairwise import Consistency, Pairwise
from reward_servers.judging.question import Picture, Undecided

DARK, MIDDLE, BRIGHT = (Picture(flat(level)) for level in (60, 120, 220))


def brighter(body: dict[str, Any]) -> dict[str, Any]:
    first, second = map(brightness, pictures_of(body))
    return leans({"1": 0.9, "2": 0.1} if first > second else {"1": 0.1, "2": 0.9}, body)


def test_pairs_are_asked_in_both_orders() -> None:
    with judging(brighter) as fake:
        verdict = consult(options_for(fake.url), lambda judge: Pairwise().both_orders(judge, "x", BRIGHT, DARK))
    assert verdict.p == pytest.approx(0.9)
    assert not verdict.flipped
    assert len(fake.bodies) == 2


def test_a_judge_of_positions_says_nothing_about_images() -> None:
    with judging(lambda body: leans({"1": 0.9, "2": 0.1}, body)) as fake:
        verdict = consult(options_for(fake.url), lambda judge: Pairwise().both_orders(judge, "x", BRIGHT, DARK))
    assert verdict.p == pytest.approx(0.5)
    assert verdict.flipped


def test_a_verdict_in_words() -> None:
    def think(body: dict[str, Any]) -> dict[str, Any]:
        first, second = map(brightness, pictures_of(body))
        return says(
            f"<think>hm, Image 2 is better?</think><answer>Image {1 if first > second else 2} is better</answer>"
        )

    def in_words(answer: Any) -> Any:
        with judging(answer) as fake:
            return consult(options_for(fake.url), lambda j: Pairwise("text").both_orders(j, "x", DARK, BRIGHT))

    assert in_words(think).p == 0.0
    assert in_words(lambda body: says("<answer>Tie</answer>")).p == 0.5
    with pytest.raises(Undecided):
        in_words(lambda body: says("I prefer the second one."))


def test_consistency_is_symmetric() -> None:
    def alike(body: dict[str, Any]) -> dict[str, Any]:
        first, second = map(brightness, pictures_of(body))
        return leans({"yes": 0.8, "no": 0.2} if first >= second else {"yes": 0.4, "no": 0.6}, body)

    async def go(judge: Judge) -> list[float]:
        ask = Consistency().ask
        return [await ask(judge, "style", DARK, BRIGHT), await ask(judge, "style", BRIGHT, DARK)]

    with judging(alike) as fake:
        assert consult(options_for(fake.url), go) == pytest.approx([0.6, 0.6])
    assert "same artistic style" in texts_of(fake.bodies[0])


def listwise(principle: str = "brighter is better", **more: Any) -> Listwise:
    return Listwise(**{"principle": principle, "shuffles": 2, "reward": "score", "max_tokens": 500, **more})


def obeys(body: dict[str, Any]) -> dict[str, Any]:
    """Marks by brightness, up or down as the principle says."""
    sign = -1 if "darker" in texts_of(body) else 1

    def mark(names: list[str], pictures: list[np.ndarray]) -> dict[str, Any]:
        order = np.argsort([-sign * brightness(picture) for picture in pictures])
        scores = {name: 5 - 2 * int(np.where(order == i)[0][0]) for i, name in enumerate(names)}
        return {"reasoning": "looked", "scores": scores, "ranking": [names[i] for i in order]}

    return filled(body, mark)


def test_a_list_is_marked_by_the_principle_whatever_the_order() -> None:
    async def go(judge: Judge) -> list[Any]:
        up = await listwise().ask(judge, "x", [DARK, BRIGHT, MIDDLE])
        down = await listwise("darker is better").ask(judge, "x", [DARK, BRIGHT, MIDDLE])
        turned = await listwise().ask(judge, "x", [BRIGHT, MIDDLE, DARK])
        ranked = await listwise(reward="rank").ask(judge, "x", [DARK, BRIGHT, MIDDLE])
        return [up, down, turned, ranked]

    with judging(obeys) as fake:
        up, down, turned, ranked = consult(options_for(fake.url), go)
    assert up.values.tolist() == ranked.values.tolist() == [0.0, 1.0, 0.5]
    assert down.values.tolist() == [1.0, 0.0, 0.5], "flipping the principle inverts the ranking"
    assert turned.values.tolist() == [1.0, 0.5, 0.0]
    assert up.disagreement.tolist() == [0.0, 0.0, 0.0]
    shown = [[brightness(picture) for picture in pictures_of(body)] for body in fake.bodies]
    assert len({tuple(order) for order in shown}) > 1, "orders are shuffled"


def test_a_list_judged_by_position_shows_in_the_disagreement() -> None:
    def first_best(body: dict[str, Any]) -> dict[str, Any]:
        return filled(
            body,
            lambda names, _: {"reasoning": "", "scores": dict(zip(names, (5, 3, 1), strict=True)), "ranking": names},
        )

    with judging(first_best) as fake:
        pictures = [Picture(flat(level)) for level in (1, 2, 3)]
        listing = consult(options_for(fake.url), lambda j: listwise(shuffles=6).ask(j, "x", pictures))
    assert listing.disagreement.max() > 0.2


def test_a_list_without_an_answer_is_undecided_and_its_size_is_bounded() -> None:
    with judging(lambda body: says("A is best")) as fake:
        with pytest.raises(Undecided):
            consult(options_for(fake.url), lambda judge: listwise().ask(judge, "x", [DARK, BRIGHT]))
        with pytest.raises(ValueError, match="2 to 26"):
            consult(options_for(fake.url), lambda judge: listwise().ask(judge, "x", [DARK]))


def test_a_checklist_is_planned_once_a_prompt_and_answered_item_by_item() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        if "response_format" in body:
            return says(json.dumps({"items": ["Is it bright?", "Is it square?"]}))
        bright = brightness(pictures_of(body)[0]) > 100
        return leans({"yes": 0.9, "no": 0.1} if bright or "square" in texts_of(body) else {"yes": 0.2, "no": 0.8}, body)

    async def go(judge: Judge) -> Any:
        return [await Checklist().ask(judge, "a bright square", picture) for picture in (BRIGHT, DARK)]

    with judging(behave) as fake:
        bright, dark = consult(options_for(fake.url), go)
    assert bright.value == pytest.approx(0.9)
    assert dark.probabilities == pytest.approx([0.2, 0.9])
    assert dark.passes.tolist() == [False, True]
    assert len(fake.bodies) == 1 + 2 * 2
    assert pictures_of(fake.bodies[0]) == []


def test_boxes_and_aspects_are_asked_for_by_a_schema_and_never_with_log_probs() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        assert "logprobs" not in body
        schema = body["response_format"]["json_schema"]["schema"]
        if "layout" in schema["properties"]:
            item = {"object": "square", "box": [0, 0, 4, 8], "score": 1.0}
            return says(json.dumps({"objects": [item], "layout": 1.0}))
        assert schema == SCHEMA
        assert list(schema["properties"][ASPECTS[0]]["properties"]) == ["justification", "score"], "critique first"
        entries = {
            aspect: {"justification": "fine", "score": 4 if aspect != "text_rendering" else "N/A"} for aspect in ASPECTS
        }
        return says(json.dumps(entries | {"refined_request": "a sharper square"}))

    async def go(judge: Judge) -> Any:
        scores = await Aspects("structured", 0.1, 100).ask(judge, "x", BRIGHT)
        return scores, await Boxes().ask(judge, "x", BRIGHT)

    with judging(behave) as fake:
        scores, regions = consult(options_for(fake.url), go)
    assert (scores.reward, scores.refined) == (1.0, "a sharper square")
    grid = regions.map(2, 2)
    assert grid.tolist() == [[1.0, 0.5], [1.0, 0.5]]


def test_unified_reward_forms() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        if "Style Score" in texts_of(body):
            return says("Alignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 1")
        return says("The cat is fine. Final Score: 4")

    async def go(judge: Judge) -> Any:
        return [await Graded(form, 100).ask(judge, "a cat", BRIGHT) for form in ("final", "dimensions")]

    with judging(behave) as fake:
        final, dimensions = consult(options_for(fake.url), go)
    assert final == (0.75,)
    assert dimensions == (1.0, 0.5, 0.0)
    assert texts_of(fake.bodies[0]).endswith("Text Caption: [a cat]")


OPTIONS = ["a cat", "a dog", "a fish"]


def test_options_are_shuffled_and_answers_mapped_back() -> None:
    def says_dog(body: dict[str, Any]) -> dict[str, Any]:
        letter = texts_of(body).split(". a dog")[0][-1]
        return leans({letter: 0.8, "A" if letter != "A" else "B": 0.1}, body)

    def says_first(body: dict[str, Any]) -> dict[str, Any]:
        return leans({"A": 0.9, "B": 0.05}, body)

    def ask(behave: Any, shuffles: int) -> Any:
        with judging(behave) as fake:
            return consult(options_for(fake.url), lambda j: Shuffled(shuffles).ask(j, "What is it?", OPTIONS, [BRIGHT]))

    assert ask(says_dog, 3) == ("a dog",) * 3
    assert ask(says_first, 3) == tuple(OPTIONS), "each order begins with another option"
    assert ask(says_first, 9) == tuple(OPTIONS), "three options have three cyclic orders"


def test_majority_needs_more_than_half_of_all_samples() -> None:
    def draw(*outcomes: Any) -> Any:
        async def one(i: int) -> Any:
            if isinstance(outcomes[i], Exception):
                raise outcomes[i]
            return outcomes[i]

        return asyncio.run(majority(one, len(outcomes), key=lambda answer: answer))

    assert draw("yes", Undecided("?"), "yes", "no", "yes") == "yes"
    for outcomes in (("yes", "no"), ("yes", Undecided("?"), Undecided("?")), (Undecided("?"),)):
        with pytest.raises(Undecided):
            draw(*outcomes)
    with pytest.raises(AttemptFailed):
        draw("yes", "yes", AttemptFailed("500", "down"))
