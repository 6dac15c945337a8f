"""UnifiedReward's pointwise forms: one final score, or alignment, coherence and style, each from 1 to 5.

Does not own: what the three are worth against each other (the run's weights).
"""

from __future__ import annotations

from typing import Literal

from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.base import Protocol
from reward_servers.judging.question import Picture, Question
from reward_servers.judging.reading import labelled_number, said

LOW, HIGH = 1.0, 5.0
DIMENSIONS = ("Alignment Score", "Coherence Score", "Style Score")
_FINAL = """You are given a text caption and a generated image based on that caption. Your task is to evaluate this \
image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""
_DIMENSIONS = """You are presented with a generated image and its associated text caption. Your task is to analyze the \
image across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""


class Graded(Protocol):
    """The wording is the one the models were trained on; greedy decoding."""

    name = "graded"
    paper = "Unified Reward Model for Multimodal Understanding and Generation (2503.05236)"

    def __init__(self, form: Literal["final", "dimensions"], max_tokens: int) -> None:
        self.form, self.max_tokens = form, max_tokens

    async def ask(self, judge: Judge, prompt: str, picture: Picture) -> tuple[float, ...]:
        """(final,) or (alignment, coherence, style) in [0,1]: (s - 1) / 4. Raises Undecided or AttemptFailed."""
        text = (_FINAL if self.form == "final" else _DIMENSIONS).replace("{prompt}", prompt)
        reply = await self._ask(judge, Question((picture, text), self.label, self.max_tokens))
        labels = ("Final Score",) if self.form == "final" else tuple(f"{name} (1-5)" for name in DIMENSIONS)
        return tuple((labelled_number(said(reply), label, LOW, HIGH) - LOW) / (HIGH - LOW) for label in labels)
