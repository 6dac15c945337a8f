"""The differentiable scorer: small, differentiable, and in rank with the verifier."""

import numpy as np
import pytest
import torch

from playground.scorer.network import SPEC_WIDTH, WEIGHTS, encode_specs, score
from playground.train.fit_scorer import spearman, spoil
from playground.world.prompts import all_specs, held_out_prompts
from playground.world.reliability import wrong_by_one
from playground.world.render import render
from playground.world.scenes import sample_scene
from playground.world.verify import verify


def pictures_and_captions(num, seed):
    """Spoilt or not, with right captions and wrong ones by turns, of the test split."""
    rng = np.random.default_rng(seed)
    pictures, specs = [], []
    for i, spec in enumerate(held_out_prompts("test", num, seed)):
        pictures.append(spoil(render(sample_scene(spec, rng)), rng))
        wrong = wrong_by_one(spec)
        specs.append(wrong[rng.integers(len(wrong))] if i // 5 % 2 else spec)
    return np.stack(pictures), specs


def as_images(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def test_in_rank_with_the_verifier_on_test_captions():
    pictures, specs = pictures_and_captions(600, seed=11)
    dense = [verify(picture, spec).dense for picture, spec in zip(pictures, specs, strict=True)]
    with torch.no_grad():
        scores = score(as_images(pictures), specs)
    assert spearman(scores.numpy(), np.array(dense)) > 0.8


def test_scores_have_gradients_in_the_pictures():
    pictures, specs = pictures_and_captions(10, seed=12)
    images = as_images(pictures).requires_grad_()
    scores = score(images, specs)
    assert scores.shape == (10,)
    assert ((scores >= 0) & (scores <= 1)).all()
    scores.sum().backward()
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_weights_are_small():
    assert WEIGHTS.stat().st_size <= 500_000


def test_every_caption_is_encoded_as_itself():
    encoded = encode_specs(all_specs())
    assert encoded.shape == (len(all_specs()), SPEC_WIDTH)
    assert len(torch.unique(encoded, dim=0)) == len(all_specs())


def test_spearman():
    assert spearman(np.array([1, 2, 2, 4]), np.array([10, 20, 20, 30])) == pytest.approx(1.0)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1.0)
