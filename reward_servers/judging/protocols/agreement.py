"""Does the judge stay with its answer: options shuffled (ACRE, GeoReason), or drawn several times (majority).

A judge that answers by position agrees with itself over P cyclic shuffles of O options no more often than chance.
Does not own: where the questions come from (scorers), weights by agreement (credit).
"""

from __future__ import annotations

import asyncio
import string
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import TypeVar

from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.base import Protocol
from reward_servers.judging.question import Picture, Question, Undecided
from reward_servers.judging.reading import distribution

A = TypeVar("A")
MAX_OPTIONS = 10


class Shuffled(Protocol):
    """A multiple-choice question, asked with its options in `shuffles` orders, each answer mapped back."""

    name = "shuffled"
    paper = "Answer-Consistent Chain-of-Thought RL for Multimodal LLMs (ACRE, 2510.10104)"

    def __init__(self, shuffles: int = 2) -> None:
        self.shuffles = shuffles

    async def ask(
        self, judge: Judge, question: str, options: Sequence[str], pictures: Sequence[Picture]
    ) -> tuple[str, ...]:
        """The option chosen under each cyclic shift, the order given first; O options have at most O shifts.

        Raises Undecided when an order is not answered or two of its options are equally likely, AttemptFailed, and
        ValueError unless there are 2 to 10 different options.
        """
        if not 2 <= len(options) <= MAX_OPTIONS or len(set(options)) != len(options):
            raise ValueError(f"a choice has 2 to {MAX_OPTIONS} different options")
        orders = [[*options[shift:], *options[:shift]] for shift in range(min(self.shuffles, len(options)))]
        return tuple(await asyncio.gather(*(self._one(judge, question, order, pictures) for order in orders)))

    async def _one(self, judge: Judge, question: str, options: Sequence[str], pictures: Sequence[Picture]) -> str:
        letters = string.ascii_uppercase[: len(options)]
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        text = "\n".join([question, *lines, "Answer with the letter alone."])
        reply = await self._ask(judge, Question((*pictures, text), self.label, words=tuple(letters)))
        seen = distribution(reply, letters, judge.options.min_mass).probabilities
        best = max(seen)
        if seen.count(best) > 1:
            raise Undecided("two options are equally likely")
        return options[seen.index(best)]


def share(answers: Sequence[Hashable]) -> float:
    """How often the most frequent answer was given, of all: 1 for a judge that stays with it, 1/O at random."""
    return Counter(answers).most_common(1)[0][1] / len(answers)


def flip_rate(answers: Sequence[Hashable]) -> float:
    """Share of further answers that differ from the first; 0 for one answer."""
    return sum(answer != answers[0] for answer in answers[1:]) / max(len(answers) - 1, 1)


def acre_reward(first: Hashable, second: Hashable, truth: Hashable, partial: float = 0.5) -> float:
    """1 when both answers are right, `partial` when one is, 0 when none is (ACRE)."""
    return {2: 1.0, 1: partial, 0: 0.0}[(first == truth) + (second == truth)]


def georeason_reward(right: bool, share: float, threshold: float = 1.0) -> float:
    """1[right] if the answer is stable enough, else 1[right] * share (GeoReason's logic drift)."""
    return float(right) * (1.0 if share >= threshold else share)


async def majority(draw: Callable[[int], Awaitable[A]], samples: int, key: Callable[[A], Hashable]) -> A:
    """The first draw among those alike that are more than half of `samples`; undecided ones count for none.

    draw(i): the i-th sampled answer; key: what makes two alike. Raises Undecided without a majority; AttemptFailed
    when a draw could not be made.
    """
    drawn = await asyncio.gather(*(draw(i) for i in range(samples)), return_exceptions=True)
    answers: list[A] = []
    for outcome in drawn:
        if not isinstance(outcome, BaseException):
            answers.append(outcome)
        elif not isinstance(outcome, Undecided):
            raise outcome
    if not answers:
        raise Undecided(f"none of {samples} samples decided")
    winner, count = Counter(map(key, answers)).most_common(1)[0]
    if 2 * count <= samples:
        raise Undecided(f"no majority among {samples} samples: {count} for {winner!r}")
    return next(answer for answer in answers if key(answer) == winner)
