"""DINO similarity and consistency over real HTTP, against the bare network and numpy."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_helpers import post, read_table, score_body, served
from scorer_models import PROMPTS, ask, build_dino, pictures_of, reference_pixels
from transformers import Dinov2Model

from contracts.scores import Outcome
from reward_servers.construct import make_scorer
from reward_servers.scorers.parts import references
from reward_servers.scorers.parts.references import png_metadata

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = pictures_of((40, 50))
REFERENCES = pictures_of((30, 44), seed=9)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dino(tmp_path_factory.mktemp("dino"))


@torch.no_grad()
def features(dino: Path, images: np.ndarray) -> np.ndarray:
    """Unit CLS embeddings [N,D] by the bare network."""
    network = Dinov2Model.from_pretrained(dino).eval()
    states = network(pixel_values=reference_pixels(images, 32, 28, MEAN, STD)).last_hidden_state[:, 0].double().numpy()
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def test_dino_similarity_is_the_cosine_with_the_reference(dino: Path, tmp_path: Path) -> None:
    Image.fromarray(REFERENCES[1]).save(tmp_path / "second.png")
    metadata = [{"reference": png_metadata(REFERENCES[i])} for i in range(4)]
    metadata[1] = {"reference": {"file": "second.png"}}
    table = ask(
        make_scorer("dino_similarity", [f"model={dino}", f"references={tmp_path}"]), IMAGES, PROMPTS, metadata,
        want_gradients=True,
    )  # fmt: skip
    expected = (features(dino, IMAGES) * features(dino, REFERENCES)).sum(axis=1)
    assert table.gradients is not None
    assert np.abs(table.gradients).max(axis=(1, 2, 3)).min() > 0
    np.testing.assert_allclose(table.values[:, 0], expected, atol=0.02)  # beside gradients: PIL's rounding apart
    plain = ask(make_scorer("dino_similarity", [f"model={dino}", f"references={tmp_path}"]), IMAGES, PROMPTS, metadata)
    np.testing.assert_allclose(plain.values[:, 0], expected, atol=3e-6)


def test_an_image_is_its_own_likeness(dino: Path) -> None:
    metadata = [{"reference": png_metadata(image)} for image in IMAGES]
    table = ask(make_scorer("dino_similarity", [f"model={dino}"]), IMAGES, PROMPTS, metadata)
    np.testing.assert_allclose(table.values[:, 0], 1.0, atol=1e-6)
    assert table.values.max() <= 1.0


def test_bad_references_fail_their_images_alone(dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MAX_PIXELS", 2000)
    inside, outside = tmp_path / "inside", tmp_path / "secret.png"
    inside.mkdir()
    Image.fromarray(REFERENCES[0]).save(outside)
    bad: list[tuple[Any, str]] = [
        ({"file": "../secret.png"}, "no reference"), ({"file": "none.png"}, "no reference"), ("x.png", "must be"),
        ({"png": "no base64!"}, "base64"), ({"png": base64.b64encode(b"junk").decode()}, "no readable"),
        (png_metadata(pictures_of((50, 50), 1)[0]), "exceeds 2000 pixels"), ({"url": "http://x/y.png"}, "unknown key"),
    ]  # fmt: skip
    metadata: list[dict[str, Any]] = [{"reference": given} for given, _ in bad]
    metadata += [{}, {"reference": png_metadata(REFERENCES[0])}]
    images = np.repeat(IMAGES[:1], len(metadata), axis=0)
    table = ask(
        make_scorer("dino_similarity", [f"model={dino}", f"references={inside}"]), images, ["p"] * len(images), metadata
    )
    assert table.outcomes[:, 0].tolist() == [Outcome.FAILED] * (len(bad) + 1) + [Outcome.OK]
    assert np.isnan(table.values[:-1]).all()
    for (_, words), reason in zip(bad, table.reasons, strict=False):
        assert words in reason


def test_consistency_is_the_mean_cosine_with_the_others_of_the_whole_group(dino: Path) -> None:
    """Six images, two a batch: the server must not cut the group, nor join two groups."""
    images = np.concatenate([IMAGES, pictures_of((40, 50), 2, seed=4)])
    unit = features(dino, images)
    cosines = unit @ unit.T
    expected = (cosines.sum(axis=1) - 1) / 5
    with served(make_scorer("consistency", [f"model={dino}"]), max_batch=2) as server:
        table = read_table(post(server.url, score_body(images)))
        alone = read_table(post(server.url, score_body(images[:1])))
    np.testing.assert_allclose(table.values[:, 0], expected, atol=3e-6)
    np.testing.assert_allclose(table.values.mean(), cosines[np.triu_indices(6, 1)].mean(), atol=3e-6)
    assert alone.outcomes.tolist() == [[Outcome.FAILED]]
    assert "at least two" in alone.reasons[0]


def test_the_client_sends_a_group_whole(dino: Path) -> None:
    images = pictures_of((40, 50), 6, seed=2)
    table = ask(make_scorer("consistency", [f"model={dino}"]), images, ["p"] * 6)
    unit = features(dino, images)
    np.testing.assert_allclose(table.values[:, 0], ((unit @ unit.T).sum(axis=1) - 1) / 5, atol=3e-6)
