"""The pipeline is a stock one: it loads without our code, and our shortcuts agree with it."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from playground.train.pipeline import TEXT_TOKENS, build_pipeline, build_tokenizer, identity_vae
from playground.train.pretrain import Trainee
from playground.train.sample import Settings, encode, paint, sigmas, to_uint8
from playground.world.captions import parse_caption
from playground.world.prompts import all_specs
from playground.world.render import render
from playground.world.scenes import sample_scene

TEXTS = ["a red circle", "two squares"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build_pipeline("tiny").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_a_saved_folder_loads_and_paints(pipeline):
    assert type(pipeline) is StableDiffusion3Pipeline
    images = pipeline(TEXTS, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


def test_a_missing_t5_makes_no_difference(folder, pipeline):
    without = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    for ours, theirs in zip(encode(pipeline, TEXTS), encode(without, TEXTS), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_paint_agrees_with_the_pipeline(pipeline, guidance_scale):
    settings = Settings(steps=3, shift=3.0, guidance_scale=guidance_scale)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    levels = np.linspace(1.0, 1 / 3, 3)  # the scheduler bends them by its shift of 3
    images = pipeline(
        TEXTS,
        sigmas=levels,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        latents=noise,
        max_sequence_length=TEXT_TOKENS,
        output_type="np",
    ).images
    ours = paint(pipeline, TEXTS, settings, seed=5)
    assert np.abs(ours / 255 - images).max() < 0.5 / 255 + 1e-3
    assert torch.allclose(sigmas(3, 3.0)[:-1], pipeline.scheduler.sigmas[:-1])


def test_pretraining_sees_the_text_as_the_pipeline_gives_it(pipeline):
    ids = pipeline.tokenizer(TEXTS, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    noise, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.9])
    embeds, pooled = encode(pipeline, TEXTS)
    assert embeds.shape[1] == 2 * TEXT_TOKENS
    expected = pipeline.transformer(noise, embeds, pooled, sigma * 1000, return_dict=False)[0]
    assert torch.allclose(Trainee(pipeline)(noise, sigma, ids), expected, atol=1e-5)


def test_the_vae_is_the_identity():
    vae = identity_vae()
    scenes = [sample_scene(spec, np.random.default_rng(0)) for spec in all_specs()[:8]]
    pictures = np.stack([render(scene) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    latents = vae.encode(images).latent_dist
    assert (latents.mode() - images).abs().max() < 1e-4
    assert (vae.decode(latents.sample()).sample - images).abs().max() < 1e-4
    assert np.array_equal(to_uint8(vae.decode(images).sample), pictures)


def test_the_vae_holds_in_half_precision():
    vae = identity_vae().half()
    images = torch.rand(2, 3, 32, 32).half() * 2 - 1
    assert (vae.decode(images).sample - images).abs().max() < 1 / 255


def test_the_tokenizer_knows_every_caption_and_fits_it():
    tokenizer = build_tokenizer()
    for spec in all_specs():
        ids = tokenizer(spec.text).input_ids
        assert len(ids) == len(spec.text.split()) + 2 <= TEXT_TOKENS
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.eos_token_id != 2
    assert tokenizer("a Red dog").input_ids[2:4] == [
        tokenizer.convert_tokens_to_ids("red"),
        tokenizer.unk_token_id,
    ]


def test_builds_repeat_by_seed():
    first, again, other = (build_pipeline("tiny", seed=seed).transformer for seed in (0, 0, 1))
    assert torch.equal(first.pos_embed.proj.weight, again.pos_embed.proj.weight)
    assert not torch.equal(first.pos_embed.proj.weight, other.pos_embed.proj.weight)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="no such size"):
        build_pipeline("huge")


def test_words_order_matters_to_the_embedding(pipeline):
    one = encode(pipeline, [parse_caption("a circle left of a square").text])[0]
    two = encode(pipeline, [parse_caption("a square left of a circle").text])[0]
    assert not torch.allclose(one, two)
