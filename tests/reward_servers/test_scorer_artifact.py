"""The artifact scorer over real HTTP on a tiny VLM, against its whole next-token distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scorer_models import ask, build_vlm, pictures_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from contracts.scores import Outcome
from reward_servers.construct import make_scorer
from reward_servers.isolation import score_isolated
from reward_servers.scorers.artifact import answer_tokens
from reward_servers.scorers.base import ScoreBatch

IMAGES = pictures_of((40, 56), 3, seed=11)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vlm(tmp_path_factory.mktemp("vlm"))


def masses(folder: Path, question: str) -> np.ndarray:
    """[N,2]: probability of all spellings of yes and of no as the first token, by reading the vocabulary."""
    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    vocabulary = processor.tokenizer.get_vocab()
    spelled = [[i for token, i in vocabulary.items() if token.removeprefix("Ġ") in words]
               for words in (("yes", "Yes", "YES"), ("no", "No", "NO"))]  # fmt: skip
    assert all(len(ids) >= 2 for ids in spelled), "several spellings, or the sum is not tested"
    prompt = f"<|im_start|>user\n<image>{question}<|im_end|>\n<|im_start|>assistant\n"
    rows = []
    for image in IMAGES:
        inputs = processor(text=prompt, images=[Image.fromarray(image)], return_tensors="pt")
        with torch.no_grad():
            probabilities = network(**inputs).logits[0, -1].double().softmax(dim=-1).numpy()
        rows.append([probabilities[ids].sum() for ids in spelled])
    return np.array(rows)


def test_artifact_is_one_minus_the_probability_of_yes(vlm: Path) -> None:
    yes, no = masses(vlm, "any artifacts?").T
    table = ask(make_scorer("artifact", [f"model={vlm}", "question=any artifacts?", "min_mass=0"]), IMAGES, ["p"] * 3)
    expected = 1 - yes / (yes + no)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(table.values[:, 0], expected, rtol=1e-4)


def test_a_model_that_says_neither_leaves_the_image_undecided(vlm: Path) -> None:
    scorer: Any = make_scorer("artifact", [f"model={vlm}", "question=any artifacts?"])
    scorer.load()
    mass = masses(vlm, "any artifacts?").sum(axis=1)
    scorer.options = scorer.options.model_copy(update={"min_mass": float(np.sort(mass)[:2].mean())})
    table = score_isolated(scorer, ScoreBatch(IMAGES, ("p",) * 3, ({},) * 3))
    undecided = mass == mass.min()
    np.testing.assert_array_equal(table.outcomes[:, 0] == Outcome.UNDECIDED, undecided)
    assert np.isnan(table.values[undecided]).all()
    assert table.valid()[~undecided].all()


def test_a_vocabulary_without_the_words_is_refused() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(letter) for letter in text]

    with pytest.raises(ValueError, match="no single token for 'yes'"):
        answer_tokens(Letters(), "yes")
