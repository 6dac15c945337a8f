"""Freedom from artifacts by a VLM (artifact-reward): 1 - P(yes) of the answer's first token.

P(yes) = p_yes / (p_yes + p_no) over the whole vocabulary, each summed over the ways to write it ("yes", " Yes", "YES").
The original reads the top ten log-probs of an endpoint and takes a missing token for certainty; here all are read, and
a model that says neither (p_yes + p_no < min_mass) leaves the image undecided. Behind vLLM: judging/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.config.scorers import ArtifactOptions
from contracts.scores import Outcome, ScoreTable
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import OptionScorer

if TYPE_CHECKING:
    import torch


class Artifact(OptionScorer[ArtifactOptions]):
    """Score in [0,1], 1 without artifacts. Images are asked about one by one: sizes and layouts differ."""

    declares = declared("artifact")
    name = "artifact"
    paper = "Understanding Reward Hacking in Text-to-Image Reinforcement Learning"
    value_range = (0.0, 1.0)

    def load(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from reward_servers.scorers.parts import loading

        self.network = loading.load_network(AutoModelForImageTextToText, self.options.model, self.options)
        self.processor: Any = loading.load_tool(AutoProcessor, self.options.model, self.options)
        self._yes, self._no = (answer_tokens(self.processor.tokenizer, word) for word in ("yes", "no"))
        self.weighed(self.network)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        import torch

        masses = []
        for image in batch.images:
            with torch.no_grad():
                probabilities = self._first_token(image)
            masses.append([float(probabilities[tokens].sum()) for tokens in (self._yes, self._no)])
        yes, no = np.array(masses, np.float64).T
        decided = (yes + no >= max(self.options.min_mass, 1e-12)) & np.isfinite(yes + no)
        table = self.table(np.where(decided, no / np.where(decided, yes + no, 1.0), np.nan))
        table.outcomes[~decided & np.isfinite(yes + no), 0] = Outcome.UNDECIDED
        return table

    def _first_token(self, image: np.ndarray) -> torch.Tensor:
        """float32 probabilities [V] of the answer's first token."""
        from PIL import Image

        from reward_servers.scorers.parts.loading import device_of, dtype_of

        content = [{"type": "image"}, {"type": "text", "text": self.options.question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=[Image.fromarray(image)], return_tensors="pt")
        inputs = inputs.to(device_of(self.options), dtype_of(self.options))
        return self.network(**inputs).logits[0, -1].float().softmax(dim=-1)


def answer_tokens(tokenizer: Any, word: str) -> list[int]:
    """Ids of the single tokens that read as `word`, whatever case and spaces. Raises ValueError when there is none."""
    spellings = [space + form for space in ("", " ") for form in (word, word.capitalize(), word.upper())]
    encoded = (tokenizer.encode(text, add_special_tokens=False) for text in spellings)
    found = {ids[0] for ids in encoded if len(ids) == 1}
    if not found:
        raise ValueError(f"the model's tokenizer has no single token for {word!r}")
    return sorted(found)
