"""Each scorer over real HTTP against its definition; gradients against autograd and finite differences."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reward_helpers import config_for, pictures, served

from contracts.errors import ConfigError
from contracts.scores import Outcome, ScoreTable
from playground.world.captions import Spec
from playground.world.prompts import held_out_prompts
from playground.world.render import render
from playground.world.scenes import sample_scene
from playground.world.verify import verify
from reward_servers.client import RewardClient
from reward_servers.scorers.base import Scorer, weights_file
from reward_servers.scorers.colourfulness import Colourfulness
from reward_servers.scorers.jpeg_size import JpegSize
from reward_servers.scorers.playground_cnn import PlaygroundCNN
from reward_servers.scorers.playground_verifier import PlaygroundVerifier


def ask(scorer: Scorer, images: np.ndarray, metadata: list[dict[str, Any]] | None = None, **more: bool) -> ScoreTable:
    async def go() -> ScoreTable:
        async with RewardClient(config_for(server.url, deadline_s=60.0, timeout_s=30.0)) as client:
            return await client.score(images, ["p"] * len(images), metadata or [{}] * len(images), **more)

    with served(scorer) as server:
        return asyncio.run(go())


def scenes(num: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Pictures and captions; every other caption belongs to another picture."""
    specs = held_out_prompts("validation", num, seed=0)
    rng = np.random.default_rng(0)
    images = np.stack([render(sample_scene(spec, rng)) for spec in specs])
    shown = [specs[i] if i % 2 == 0 else specs[(i + 1) % num] for i in range(num)]
    return images, [{"playground": spec.to_metadata()} for spec in shown]


def test_the_verifier_says_over_http_what_it_says_in_python() -> None:
    images, metadata = scenes(20)
    table = ask(PlaygroundVerifier(), images, metadata)
    specs = [Spec.from_metadata(meta["playground"]) for meta in metadata]
    verdicts = [verify(image, spec) for image, spec in zip(images, specs, strict=True)]
    strict, _ = table.column("strict")
    dense, _ = table.column("dense")
    reward, valid = table.column("reward")
    assert valid.all()
    assert strict.tolist() == [float(verdict.strict) for verdict in verdicts]
    assert 0 < strict.mean() < 1
    np.testing.assert_allclose(dense, [verdict.dense for verdict in verdicts], rtol=1e-6)
    np.testing.assert_allclose(reward, 0.5 * strict + 0.5 * dense, rtol=1e-6)
    assert [bool(reason) for reason in table.reasons] == [not verdict.strict for verdict in verdicts]


def test_the_verifier_fails_the_image_whose_caption_is_missing_and_no_other() -> None:
    images, metadata = scenes(4)
    metadata[1], metadata[2] = {}, {"playground": {"kind": "single"}}
    table = ask(PlaygroundVerifier(), images, metadata)
    assert table.outcomes[:, 0].tolist() == [Outcome.OK, Outcome.FAILED, Outcome.FAILED, Outcome.OK]
    assert "playground" in table.reasons[1]


def test_the_verifier_serves_without_torch() -> None:
    code = (
        "import reward_servers.scorers.playground_verifier, reward_servers.app, sys; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_jpeg_size_is_the_file_size_in_kilobytes() -> None:
    noisy, flat = pictures(1, 64)[0], np.full((64, 64, 3), 90, np.uint8)
    table = ask(JpegSize(), np.stack([noisy, flat]))
    for image, value in zip((noisy, flat), table.values[:, 0], strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        assert value == np.float32(len(buffer.getvalue()) / 1000)
    assert table.values[0, 0] > 3 * table.values[1, 0]
    with pytest.raises(ValueError, match="quality"):
        JpegSize(quality=0)


def test_colourfulness_is_the_published_metric() -> None:
    grey = np.repeat(pictures(1, 16)[..., :1], 3, axis=-1)[0]
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200  # no spread: rg = 200, yb = 100, M = 0.3 sqrt(200^2 + 100^2)
    halves = red.copy()
    halves[8:] = (0, 200, 0)  # rg = +-200, yb = 100: sigma = 200, mu = (0, 100), M = 200 + 0.3 * 100
    table = ask(Colourfulness(), np.stack([grey, red, halves]))
    np.testing.assert_allclose(table.values[:, 0], [0.0, 0.3 * np.hypot(200, 100), 230.0], atol=1e-4)


@pytest.fixture
def cnn_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Random weights of the playground's CNN in place of the fitted ones, wherever those are."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from playground.scorer import network

    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = tmp_path / "scorer.safetensors"
    save_file(network.Scorer().state_dict(), path)
    monkeypatch.setattr(network, "WEIGHTS", path)
    network._loaded.cache_clear()
    yield path
    network._loaded.cache_clear()


def test_gradients_over_http_are_autograds(cnn_weights: Path) -> None:
    import torch

    from playground.scorer.network import score

    images, metadata = scenes(5)
    table = ask(PlaygroundCNN(), images, metadata, want_gradients=True)
    pixels = torch.from_numpy(images / np.float32(255)).permute(0, 3, 1, 2).requires_grad_()
    values = score(pixels, [Spec.from_metadata(meta["playground"]) for meta in metadata])
    values.sum().backward()
    assert table.gradients is not None
    assert table.gradients.dtype == np.float32
    np.testing.assert_allclose(table.values[:, 0], values.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(table.gradients, pixels.grad.permute(0, 2, 3, 1).numpy(), rtol=1e-4, atol=1e-8)
    assert table.version == f"1-{table.version[2:]}"
    assert len(table.version) == 10
    plain = ask(PlaygroundCNN(), images, metadata)
    assert plain.gradients is None
    np.testing.assert_allclose(plain.values, table.values, rtol=1e-6)


def test_gradients_over_http_agree_with_finite_differences(cnn_weights: Path) -> None:
    """In whole grey levels, since the wire carries uint8: R(u + d) - R(u - d) against <gradient, 2 d> / 255."""
    images, metadata = scenes(1)
    base = np.clip(images, 10, 245)
    gradients = ask(PlaygroundCNN(), base, metadata, want_gradients=True).gradients
    assert gradients is not None
    step = np.sign(gradients).astype(np.int64)  # uphill, where there is most to measure
    values = ask(PlaygroundCNN(), np.concatenate([base + step, base - step]).astype(np.uint8), metadata * 2).values
    measured = float(values[0, 0] - values[1, 0])
    predicted = float((gradients * step).sum()) * 2 / 255
    assert measured > 5e-5, "nothing was measured"
    assert measured == pytest.approx(predicted, rel=0.05)


def test_one_image_without_caption_costs_neither_scores_nor_gradients_of_the_others(cnn_weights: Path) -> None:
    images, metadata = scenes(3)
    whole = ask(PlaygroundCNN(), images, metadata, want_gradients=True)
    metadata[1] = {}
    table = ask(PlaygroundCNN(), images, metadata, want_gradients=True)
    assert table.outcomes[:, 0].tolist() == [0, 1, 0]
    assert table.gradients is not None
    assert whole.gradients is not None
    assert not table.gradients[1].any()
    np.testing.assert_allclose(table.gradients[[0, 2]], whole.gradients[[0, 2]], rtol=1e-3, atol=1e-8)


def test_weights_are_safetensors_or_nothing(tmp_path: Path) -> None:
    for name in ("weights.pt", "weights.bin", "weights.ckpt", "weights.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ConfigError, match="not a safetensors file"):
            weights_file(tmp_path / name)
    with pytest.raises(ConfigError, match="does not exist"):
        weights_file(tmp_path / "none.safetensors")
