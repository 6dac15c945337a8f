"""The painter: groups are functions of weights and seeds; weights are proven to arrive or refused (law 5's checks)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from actors.painter import PaintedGroup, Painter, micro_batch_sizes
from actors.recording import decide_recording
from contracts import codec
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.config.rollout import EvalSampling
from contracts.digests import digest_arrays
from contracts.errors import ConfigError, WeightsError, WeightsNotProven
from contracts.wire import GROUP_ARRAYS, GroupHeader, PromptSpec, PromptTask, Source, WeightOffer
from policy.policy import Policy
from policy.weights import canary, export_arrays, live_digest

torch.set_num_threads(1)

Published = tuple[WeightOffer, dict[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def run_config(tiny_model_folder: Path) -> Callable[..., RunConfig]:
    def make(**sections: Any) -> RunConfig:
        tree: dict[str, Any] = {
            "name": "painter", "model": {"path": str(tiny_model_folder), "lora": {"rank": 4, "alpha": 8}},
            "sampler": {"steps": 4}, "rollout": {"group_size": 5, "micro_batch": 2}, "objective": {"name": "grpo"},
            "scorers": [{"name": "size", "serve": "jpeg_size"}], "stop": {"steps": 1},
        }  # fmt: skip
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
        return config_from_tree(tree)

    return make


def task(group_id: int = 3, **changes: Any) -> PromptTask:
    return PromptTask.model_validate(
        {
            "group_id": group_id, "attempt": 0, "prompt": PromptSpec(text="a red circle"), "group_size": 5,
            "min_version": 0, "deadline_s": 60, **changes,
        }
    )  # fmt: skip


def painted(painter: Painter, **changes: Any) -> PaintedGroup:
    return painter.finish(painter.denoise(task(**changes)))


def assert_equal_groups(one: PaintedGroup, other: PaintedGroup) -> None:
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


def test_micro_batch_sizes() -> None:
    assert micro_batch_sizes(5, 2) == [2, 2, 1]
    assert micro_batch_sizes(4, 4) == [4]
    assert micro_batch_sizes(0, 4) == []


def test_a_group_says_what_it_is(run_config: Callable[..., RunConfig]) -> None:
    painter = Painter(run_config(sampler={"guidance_scale": 2.0}))
    group = painted(painter, prompt=PromptSpec(text="a red circle", negative="a square", metadata={"k": [1]}))
    header, arrays = group.header, group.arrays
    assert set(arrays) <= set(GROUP_ARRAYS)
    assert arrays["images"].shape == (5, 32, 32, 3)
    assert arrays["images"].dtype == np.uint8
    assert arrays["clean"].shape == (5, 3, 32, 32)
    assert arrays["states"].shape == (5, 4, 3, 32, 32)
    assert arrays["log_prob_sum"].shape == (5, 3)
    assert header.step_indices == [0, 1, 2]
    assert header.micro_batches == [2, 2, 1]
    assert len(set(header.seeds)) == 5
    assert header.dims == 3 * 32 * 32
    assert header.sampler_params == {"noise_level": 0.7}
    assert set(group.embeddings) == {header.prompt_digest, header.negative_digest}
    again, tensors = codec.decode(codec.encode(header, arrays), GroupHeader)
    assert again == header
    assert tensors.keys() == arrays.keys()


def test_a_group_can_be_painted_again(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    painter = Painter(config)
    group = painted(painter)
    painted(painter, group_id=4)
    assert_equal_groups(group, painted(painter, attempt=1))
    assert_equal_groups(group, painted(Painter(config)))
    other = painted(Painter(run_config(seed=1)))
    assert not np.array_equal(group.arrays["clean"], other.arrays["clean"])
    assert not np.array_equal(group.arrays["clean"], painted(painter, group_id=4).arrays["clean"])


def test_finishing_beside_denoising_changes_nothing(run_config: Callable[..., RunConfig]) -> None:
    painter = Painter(run_config())
    expected = [painted(painter, group_id=i) for i in range(4)]
    finished: dict[int, PaintedGroup] = {}
    threads = []
    for i in range(4):
        unfinished = painter.denoise(task(group_id=i))
        threads.append(threading.Thread(target=lambda i=i, u=unfinished: finished.update({i: painter.finish(u)})))
        threads[-1].start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_equal_groups(finished[i], expected[i])


@pytest.mark.parametrize(
    ("sections", "states", "means"),
    [
        ({"pipeline": {"max_staleness": 0}}, True, False),
        ({"pipeline": {"max_staleness": 1}}, True, True),
        ({"pipeline": {"max_staleness": 0}, "objective": {"old_log_prob": "recompute"}}, True, True),
        ({"pipeline": {"max_staleness": 0}, "model": {"dtype": "bf16"}}, True, True),
        ({"objective": {"name": "nft"}}, False, False),
        ({"objective": {"name": "nft"}, "sampler": {"name": "ode"}}, False, False),
    ],
)
def test_what_is_recorded(
    run_config: Callable[..., RunConfig], sections: dict[str, Any], states: bool, means: bool
) -> None:
    config = run_config(**sections)
    recording = decide_recording(config)
    assert (recording.states, recording.means) == (states, means)
    group = painted(Painter(config))
    assert ("states" in group.arrays, "means" in group.arrays) == (states, means)
    assert ("log_prob_sum" in group.arrays) == states
    assert bool(group.header.step_indices) == states
    assert "clean" in group.arrays


def test_means_are_those_of_the_log_probs(run_config: Callable[..., RunConfig]) -> None:
    group = painted(Painter(run_config()))
    levels, steps = group.header.sigmas, group.header.step_indices
    means, following = group.arrays["means"], group.arrays["states"][:, 1:]
    k = 1
    s, s_next = levels[steps[k]], levels[steps[k] + 1]
    std = 0.7 * (s / (1 - s)) ** 0.5 * (s - s_next) ** 0.5
    squares = ((following[:, k] - means[:, k]) ** 2).reshape(5, -1).sum(1, dtype=np.float64)
    expected = -squares / (2 * std**2) - group.header.dims * (np.log(std) + 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(group.arrays["log_prob_sum"][:, k], expected, rtol=1e-5)


def test_previews_are_images_of_the_steps_that_scorers_ask_for(run_config: Callable[..., RunConfig]) -> None:
    asked = [
        {"name": "size", "serve": "jpeg_size"}, {"name": "all", "serve": "jpeg_size", "previews": "recorded"},
        {"name": "last", "serve": "jpeg_size", "previews": [1, 3]},
    ]  # fmt: skip
    painter = Painter(run_config(scorers=asked))
    group = painted(painter)
    assert group.header.step_indices == [0, 1, 2]
    assert group.header.preview_steps == [0, 1, 3]
    assert group.arrays["previews"].shape == (5, 3, 32, 32, 3)
    assert group.arrays["previews"].dtype == np.uint8
    np.testing.assert_array_equal(group.arrays["previews"][:, 2], group.arrays["images"])
    assert (group.arrays["previews"][:, 0] != group.arrays["images"]).any()
    assert_equal_groups(painted(painter), group)
    plain = painted(Painter(run_config()))
    assert plain.header.preview_steps == []
    assert "previews" not in plain.arrays
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(group.arrays[name], array)


def test_bf16_states_travel_as_bits(run_config: Callable[..., RunConfig]) -> None:
    group = painted(Painter(run_config(rollout={"storage_dtype": "bf16"})))
    assert group.header.dtypes == {"states": "bfloat16"}
    assert group.arrays["states"].dtype == np.uint16
    assert group.arrays["clean"].dtype == np.float32


def test_an_objective_of_steps_refuses_a_sampler_without_them(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="sampler"):
        Painter(run_config(sampler={"name": "ode"}))


def test_prompts_are_encoded_once(run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter(run_config())
    encoded: list[str] = []
    encode = painter.policy.family.encode_prompt
    monkeypatch.setattr(painter.policy.family, "encode_prompt", lambda text: (encoded.append(text), encode(text))[1])
    monkeypatch.setattr("actors.painter._CACHED_PROMPTS", 2)
    digests = [painter._encode(text)[0] for text in ("a", "b", "a", "c", "a", "b")]
    assert encoded == ["a", "b", "c", "b"]
    assert digests[0] == digests[2] != digests[1]


# -- evaluation and pairs


def test_evaluation_images_depend_on_prompt_and_seed_alone(run_config: Callable[..., RunConfig]) -> None:
    painter = Painter(run_config())
    sampling = EvalSampling(steps=3, shift=2.0, guidance_scale=2.0)
    prompts = [PromptSpec(text=text) for text in ("a red circle", "two squares", "a blue triangle")]
    images = painter.paint_images(prompts, sampling, [1, 2, 3])
    assert images.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(images, painter.paint_images(prompts, sampling, [1, 2, 3]))
    alone = painter.paint_images(prompts[2:], sampling, [3])
    assert np.abs(images[2:].astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(images, painter.paint_images(prompts, sampling, [4, 5, 6]))
    assert painter.paint_images([], sampling, []).shape == (0, 32, 32, 3)


def test_a_pair_is_a_group_of_two_latents(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    painter = Painter(run_config(objective={"name": "dpo"}, rollout={"group_size": 2}))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for name, image in zip(("chosen", "rejected"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    metadata = {name: str(tmp_path / f"{name}.png") for name in ("chosen", "rejected")}
    pair = task(group_size=2, source=Source.FILES, prompt=PromptSpec(text="a red circle", metadata=metadata))
    group = painter.encode_pair(pair)
    assert group.header.source is Source.FILES
    assert set(group.arrays) == {"clean"}
    np.testing.assert_array_equal(painter.policy.decode(torch.from_numpy(group.arrays["clean"])), pixels)
    assert set(group.embeddings) == {group.header.prompt_digest}
    with pytest.raises(ConfigError, match=r"rollout\.group_size"):
        painter.encode_pair(pair.model_copy(update={"group_size": 3}))


def test_pairs_from_a_file_reach_the_painter(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from actors.prompts.pairs import PreferencePairs

    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "b.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "red", "chosen": "a.png", "rejected": "b.png"}))
    config = run_config(
        prompts={"source": "pairs", "path": str(tmp_path / "pairs.jsonl")}, objective={"name": "dpo"},
        rollout={"group_size": 2},
    )  # fmt: skip
    prompt = PreferencePairs(config.prompts, 0).at(0)
    painter = Painter(config)
    group = painter.encode_pair(task(group_size=2, prompt=prompt, source=Source.FILES))
    images = painter.policy.decode(torch.from_numpy(group.arrays["clean"]))
    assert (images[0] == (255, 0, 0)).all()
    assert (images[1] == (0, 0, 255)).all()


# -- proof of weights


def publish(learner: Policy, version: int) -> Published:
    arrays, dtypes = export_arrays(learner.trainable())
    offer = WeightOffer(
        version=version, step=version, snapshot="current", digest=digest_arrays(arrays, dtypes), num_bytes=0,
        dtypes=dtypes,
    )  # fmt: skip
    return offer, arrays, canary(learner)


def versions(config: RunConfig) -> tuple[Published, Published]:
    """Version 0 and, after an update, version 1."""
    learner = Policy.load(config.model, config.seed, trainable=True)
    first = publish(learner, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learner.trainable().values():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return first, publish(learner, 1)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_arrived_weights_are_proven(run_config: Callable[..., RunConfig], tuning: str, dtype: str) -> None:
    config = run_config(model={"tuning": tuning, "dtype": dtype})
    (offer_0, arrays_0, canary_0), (offer_1, arrays_1, canary_1) = versions(config)
    painter = Painter(config)
    before = painted(painter)
    proof = painter.load(offer_0, arrays_0, canary_0, None)
    assert (proof.version, proof.digest, proof.canary_to_previous) == (0, offer_0.digest, None)
    assert proof.canary_to_current == 0.0
    assert_equal_groups(before, painted(painter))
    proof = painter.load(offer_1, arrays_1, canary_1, canary_0)
    assert proof.canary_to_current == 0.0
    assert proof.canary_to_previous is not None
    assert proof.canary_to_previous > 0
    after = painted(painter, min_version=1)
    assert after.header.weight_version == 1
    assert not np.array_equal(after.arrays["clean"], before.arrays["clean"])


def test_a_version_that_changed_nothing_is_no_fault(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    (offer, arrays, answer), _ = versions(config)
    painter = Painter(config)
    painter.load(offer, arrays, answer, None)
    same = offer.model_copy(update={"version": 1})
    assert painter.load(same, arrays, answer, answer).canary_to_previous == 0.0


def test_a_load_that_does_nothing_is_found(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    first, second = versions(config)
    painter = Painter(config)
    monkeypatch.setattr("actors.painter.load_arrays", lambda *_: None)
    painter.load(*first, None)
    with pytest.raises(WeightsNotProven, match="digest"):
        painter.load(*second, first[2])
    with pytest.raises(WeightsError, match="held is -1"):  # and what is not proven does not paint
        painter.denoise(task())


def test_keys_that_lost_a_prefix_are_found(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(model={"tuning": "lora"})
    first, (offer, arrays, answer) = versions(config)
    painter = Painter(config)
    painter.load(*first, None)
    digest = live_digest(painter.policy)
    with pytest.raises(WeightsError, match="missing"):
        painter.load(offer, {n.removeprefix("transformer_blocks."): a for n, a in arrays.items()}, answer, first[2])
    assert live_digest(painter.policy) == digest


@pytest.mark.parametrize("fault", ["scale 0", "adapters off"])
def test_adapters_that_do_nothing_are_found(run_config: Callable[..., RunConfig], fault: str) -> None:
    config = run_config(model={"tuning": "lora"})
    first, second = versions(config)
    painter = Painter(config)
    painter.load(*first, None)
    for module in painter.policy.module.modules():
        if fault == "scale 0" and hasattr(module, "scaling"):
            module.scaling["default"] = 0.0
        elif fault == "adapters off" and hasattr(module, "_disable_adapters"):
            module._disable_adapters = True
    with pytest.raises(WeightsNotProven, match="canary"):
        painter.load(*second, first[2])


def test_a_changed_bit_on_the_way_is_found(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    first, (offer, arrays, answer) = versions(config)
    painter = Painter(config)
    name = sorted(arrays)[3]
    damaged = {**arrays, name: arrays[name].copy()}
    damaged[name].view(np.uint32).reshape(-1)[0] ^= 1
    with pytest.raises(WeightsNotProven, match="digest"):
        painter.load(offer, damaged, answer, first[2])


def test_without_verification_nothing_is_claimed(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(weights={"verify": False})
    first, _ = versions(config)
    proof = Painter(config).load(*first, None)
    assert proof.digest == "not verified"
    assert np.isnan(proof.canary_to_current)


def test_a_stale_painter_refuses_the_task(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(WeightsError, match="version 1"):
        Painter(run_config()).denoise(task(min_version=1))
