"""A checklist drawn up from the prompt alone, then answered item by item (FIRM plan-then-score, VeRPO).

The plan is a question without an image, so it is the same for all images of a prompt and the cache keeps it.
value = mean over items of P(yes) (FIRM's instruction following); passes feed VeRPO's difficulty weights.
Does not own: quality scores and the product with them (FIRM's modulation is the learner's base_and_bonus).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.base import Protocol, bounded, quoted
from reward_servers.judging.protocols.yes_no import YesNo
from reward_servers.judging.question import Picture, Question, Undecided
from reward_servers.judging.reading import json_object, short_text

_PLAN = """Draw up a checklist for an image that was asked for with this text: "{prompt}"
Each item is one question about the image that can be answered by yes or no, such that yes means the image is right. \
Cover every object, number, colour, attribute and relation in the text, each once, and nothing else. At most \
{max_items} items. Answer with one JSON object."""


@dataclass(frozen=True)
class Checked:
    """items: M questions; probabilities [M]: P(yes) of each."""

    items: tuple[str, ...]
    probabilities: np.ndarray

    @property
    def passes(self) -> np.ndarray:
        """bool [M]."""
        return self.probabilities > 0.5

    @property
    def failed(self) -> tuple[str, ...]:
        """The items that do not pass."""
        return tuple(item for item, passed in zip(self.items, self.passes, strict=True) if not passed)

    @property
    def value(self) -> float:
        """In [0,1]."""
        return float(self.probabilities.mean())


class Checklist(Protocol):
    """An item that is undecided makes the image undecided: leaving it out would reward what cannot be seen."""

    name = "checklist"
    paper = "Trust Your Critic: FIRM (2603.12247)"

    def __init__(self, max_items: int = 8, max_tokens: int = 1024, max_text: int | None = None) -> None:
        self.max_items, self.max_tokens, self.max_text = max_items, max_tokens, max_text

    async def plan(self, judge: Judge, prompt: str) -> tuple[str, ...]:
        """The items for a prompt. Raises Undecided or AttemptFailed."""
        text = _PLAN.replace("{prompt}", quoted(prompt)).replace("{max_items}", str(self.max_items))
        schema = bounded(_schema(self.max_items), self.max_text)
        question = Question((text,), self.label, self.max_tokens, schema=schema)
        return read_plan(json_object(await self._ask(judge, question)), self.max_items)

    async def ask(self, judge: Judge, prompt: str, picture: Picture) -> Checked:
        """A plan for the prompt, every item answered. Raises Undecided or AttemptFailed."""
        return await self.tick(judge, await self.plan(judge, prompt), picture)

    async def tick(self, judge: Judge, items: Sequence[str], picture: Picture) -> Checked:
        """Every item answered. Raises Undecided or AttemptFailed."""
        yes_no = YesNo("{prompt} Answer yes or no.")
        answers = await asyncio.gather(*(yes_no.ask(judge, item, (picture,)) for item in items))
        return Checked(tuple(items), np.array([answer.p for answer in answers]))


def read_plan(answer: dict[str, Any], max_items: int) -> tuple[str, ...]:
    """1 to max_items different questions."""
    items = answer.get("items")
    if not isinstance(items, list) or not 1 <= len(items) <= max_items:
        raise Undecided(f"a checklist has 1 to {max_items} items")
    texts = tuple(short_text(item, 300) for item in items)
    if any(not text for text in texts) or len(set(texts)) != len(texts):
        raise Undecided("a checklist with an empty item, or with one twice")
    return texts


def _schema(max_items: int) -> dict[str, Any]:
    items = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": max_items}
    return {"type": "object", "properties": {"items": items}, "required": ["items"], "additionalProperties": False}


def difficulty_weighted(passes: np.ndarray, full_pass: float = 0.2) -> np.ndarray:
    """VeRPO's dense reward [G] of a group from passes [G,M]: items weighted by how few of the group pass them.

    w_j = (1 - rho_j) / sum, rho_j the pass rate of item j (uniform when all pass everything);
    r = (1 - d) sum_j w_j P_ij + d prod_j P_ij with d = full_pass, so that only a full pass reaches 1.
    """
    passes = np.asarray(passes, float)
    weights = 1 - passes.mean(axis=0)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(passes.shape[1], 1 / passes.shape[1])
    return np.asarray((1 - full_pass) * passes @ weights + full_pass * passes.prod(axis=1))
