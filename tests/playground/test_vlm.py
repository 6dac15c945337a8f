"""The small judge: what training feeds it is what its processor makes, and it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from playground.train import fit_vlm, vlm  # noqa: E402
from playground.world.captions import parse_caption  # noqa: E402
from playground.world.verify import verify  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vlm") / "judge"
    model, processor = vlm.build("tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vlm.save(model, processor, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return folder


def test_a_saved_judge_loads_anywhere_and_sees_what_training_shows_it(tiny: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tiny)
    assert {path.suffix for path in tiny.iterdir()} <= {".json", ".safetensors", ".jinja"}
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    text = vlm.QUESTION.replace("{prompt}", "a red circle")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[Image.fromarray(picture)], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == processor.tokenizer.encode(
        vlm.prompt_text(text), add_special_tokens=False
    )
    trainer = fit_vlm.Trainer(model, processor.tokenizer)
    with torch.no_grad():
        ours = trainer.answers(trainer.look(picture[None]), ["a red circle"])[0]
        theirs = model(**inputs).logits[0, -1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_every_word_of_a_question_is_one_token_and_both_answers_are() -> None:
    tokenizer = vlm.build_tokenizer()
    inside = ["a", "red", "circle", "left", "right", "of", "above", "below", "blue", "square", "and", "crosses", "cyan"]
    words = [f" {word}" for word in inside] + ["a", "two", "three"]  # a caption's first word follows a quotation mark
    assert all(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words)
    yes, no = vlm.answer_ids(tokenizer)
    assert yes != no
    assert tokenizer.decode(tokenizer.encode("Ünïcode ✓", add_special_tokens=False)) == "Ünïcode ✓"


def test_the_small_judge_fits_into_four_megabytes() -> None:
    model, _ = vlm.build("small")
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 4e6 - 300_000


def test_examples_are_labelled_by_the_verifier_and_never_all_alike() -> None:
    rng = np.random.default_rng(0)
    examples = [fit_vlm.draw(None, rng) for _ in range(60)]
    verdicts = [verdict for example in examples for verdict in example.verdicts]
    assert 0.25 < np.mean(verdicts) < 0.75
    for example in examples[:10]:
        assert len(example.captions) == fit_vlm.QUESTIONS
        for caption, verdict in zip(example.captions, example.verdicts, strict=True):
            assert verify(example.picture, parse_caption(caption)).strict == verdict
        if example.description is not None:
            assert verify(example.picture, parse_caption(example.description)).strict


def test_a_few_steps_lower_the_loss() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = vlm.build("tiny")
    trainer = fit_vlm.Trainer(model, processor.tokenizer)
    rng = np.random.default_rng(0)
    examples = [fit_vlm.draw(None, rng) for _ in range(4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, right = trainer.loss(examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert 0 <= right <= 1
    figures = fit_vlm.agreement(model, processor, 10, 0)
    assert 0 <= figures["all"] <= 1
