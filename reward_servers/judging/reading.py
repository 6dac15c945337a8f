"""From an answer to a value, or Undecided: the only place where text of a judge becomes a number.

Invariant: a value returned here was said by the judge, is finite and lies on the scale asked for; whatever else the
text holds (nothing, two answers, a refusal, an essay, injected JSON) raises Undecided with the reason.
Does not own: what is asked (protocols).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from reward_servers.judging.question import Reply, Undecided

_TOLERANCE = 0.01
"""Largest error of a probability when an answer is not among the tokens returned."""
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)
_MAX_JSON = 64 * 1024


@dataclass(frozen=True)
class Distribution:
    """Probabilities of the possible answers. mass: their sum; error: what unseen tokens may add to any of them."""

    probabilities: tuple[float, ...]
    mass: float
    error: float

    @property
    def normalised(self) -> tuple[float, ...]:
        """They sum to 1: P5 of the method catalogue, softmax over the answers alone."""
        return tuple(p / self.mass for p in self.probabilities)


def said(reply: Reply) -> str:
    """The text of a reply that is neither a refusal, cut off nor empty."""
    if reply.refusal:
        raise Undecided(f"refused: {_short(reply.refusal)}")
    if reply.finish == "length":
        raise Undecided("the answer was cut off")
    if not reply.text.strip():
        raise Undecided("an empty answer")
    return reply.text


def distribution(reply: Reply, words: Sequence[str], min_mass: float) -> Distribution:
    """P(word) at the first token, case, surrounding space and sentencepiece marks ignored, variants summed.

    words: at least two, different. Raises Undecided when together they have less than `min_mass` (the judge wanted to
    say something else), or when one that was not returned might matter.
    """
    if reply.refusal:
        raise Undecided(f"refused: {_short(reply.refusal)}")
    wanted = [canonical(word) for word in words]
    sums = dict.fromkeys(wanted, 0.0)
    for token, log_prob in reply.log_probs:
        if canonical(token) in sums:
            sums[canonical(token)] += math.exp(log_prob)
    mass = sum(sums.values())
    if mass < max(min_mass, 1e-12):
        raise Undecided(f"the answers {', '.join(words)} have probability {mass:.2g} together")
    unseen = 0 if reply.exact else sum(p == 0 for p in sums.values())
    least = min((math.exp(log_prob) for _, log_prob in reply.log_probs), default=0.0)
    error = unseen * least / (mass + unseen * least)
    if error > _TOLERANCE:
        raise Undecided(f"an answer is missing from the tokens returned: an error of up to {error:.2g}")
    return Distribution(tuple(sums[word] for word in wanted), mass, error)


def canonical(token: str) -> str:
    """' Yes', '▁yes' and 'YES' are one answer."""
    return token.strip().strip("▁Ġ").strip().casefold()


def expectation(probabilities: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a grade under normalised probabilities."""
    mean = sum(p * v for p, v in zip(probabilities, values, strict=True))
    variance = sum(p * (v - mean) ** 2 for p, v in zip(probabilities, values, strict=True))
    return mean, math.sqrt(max(variance, 0.0))


def json_object(reply: Reply) -> dict[str, Any]:
    """The one JSON object a reply consists of (in a code fence or not). Duplicate keys and NaN are refused."""
    text = said(reply).strip()
    if len(text) > _MAX_JSON:
        raise Undecided(f"an answer of {len(text)} characters")
    fenced = _FENCE.match(text)
    try:
        value = json.loads(
            fenced[1] if fenced else text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise Undecided(f"no JSON: {_short(text)}") from error
    if not isinstance(value, dict):
        raise Undecided(f"no JSON object: {_short(text)}")
    return value


def number(value: Any, low: float, high: float) -> float:
    """A number on the scale; up to half a point beyond its ends is brought back to them (rationalrewards clamps)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Undecided(f"no number: {_short(repr(value))}")
    if not low - 0.5 <= value <= high + 0.5:  # false for NaN; exact for integers of any size
        raise Undecided(f"{_short(repr(value))} is not between {low:g} and {high:g}")
    return min(max(float(value), low), high)


def labelled_number(text: str, label: str, low: float, high: float) -> float:
    """The number after `label:`. Two different ones are a contradiction."""
    found = re.findall(rf"{re.escape(label)}[*\s]*:[*\s]*(-?\d{{1,4}}(?:\.\d{{1,6}})?)", text, re.IGNORECASE)
    if not found:
        raise Undecided(f"no {label!r} in: {_short(text)}")
    values = {float(value) for value in found}
    if len(values) > 1:
        raise Undecided(f"{label!r} is given as {' and '.join(sorted(set(found)))}")
    return number(values.pop(), low, high)


def chosen(text: str, choices: Mapping[str, Any]) -> Any:
    """The value of the one choice in <answer>...</answer>. Several tags must agree; no tag decides nothing."""
    answers = {canonical(found.rstrip(" .")) for found in re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.I)}
    if len(answers) != 1:
        raise Undecided("no <answer>" if not answers else "several answers that differ")
    answer = answers.pop().rstrip(".")
    for choice, value in choices.items():
        if canonical(choice) == answer:
            return value
    raise Undecided(f"an answer that is no choice: {_short(answer)}")


def short_text(value: Any, limit: int = 500) -> str:
    """A text of the judge for people to read: a string, on one line, cut."""
    if not isinstance(value, str):
        raise Undecided(f"no text: {_short(repr(value))}")
    return _short(value, limit)


def _short(text: str, limit: int = 80) -> str:
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
