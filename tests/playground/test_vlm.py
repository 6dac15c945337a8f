"""The small judge: what training feeds it is what its processor makes, and it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from playground.train import fit_vlm, vlm, vlm_lessons  # noqa: E402
from playground.train.fit_scorer import Painted  # noqa: E402
from playground.world.captions import COLOURS, SHAPES, parse_caption  # noqa: E402
from playground.world.prompts import specs_by_kind, split_of  # noqa: E402
from playground.world.render import render  # noqa: E402
from playground.world.scenes import Placed, Scene  # noqa: E402
from playground.world.verify import look, verify  # noqa: E402


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
    """Packed into one row with other questions, a question is answered as it is alone, by transformers' own path."""
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tiny)
    assert {path.suffix for path in tiny.iterdir()} <= {".json", ".safetensors", ".jinja"}
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    captions = [["a red circle", "a red circle left of a blue square"], ["three crosses", "a circle and a square"]]
    trainer = fit_vlm.Trainer(model, processor.tokenizer)
    with torch.no_grad():
        ours = iter(trainer.answers(trainer.look(pictures), captions))
    for picture, row in zip(pictures, captions, strict=True):
        for caption in row:
            text = vlm.QUESTION.replace("{prompt}", caption)
            message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            prompt = processor.apply_chat_template(message, add_generation_prompt=True)
            inputs = processor(text=prompt, images=[Image.fromarray(picture)], return_tensors="pt")
            encoded = processor.tokenizer.encode(vlm.prompt_text(text), add_special_tokens=False)
            assert inputs["input_ids"][0].tolist() == encoded
            with torch.no_grad():
                theirs = model(**inputs).logits[0, -1]
            torch.testing.assert_close(next(ours), theirs, atol=1e-4, rtol=1e-4)


def test_a_description_is_learnt_as_a_text_on_its_own_is(tiny: Path) -> None:
    """The loss of packed lessons against a forward pass for each text, tokens shifted by hand."""
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32).eval()
    trainer = fit_vlm.Trainer(model, AutoProcessor.from_pretrained(tiny).tokenizer)
    lessons = [vlm_lessons.draw(None, np.random.default_rng(seed)) for seed in range(3)]
    answered, told = [], []
    with torch.no_grad():
        loss, _ = trainer.loss(lessons)
        for lesson in lessons:
            features = trainer.look(lesson.picture[None])
            for caption, verdict in zip(lesson.captions, lesson.verdicts, strict=True):
                wanted = torch.tensor([trainer.yes if verdict else trainer.no])
                answered.append(torch.nn.functional.cross_entropy(trainer.answers(features, [[caption]]), wanted))
            prompt = vlm.DESCRIBE + vlm.ANSWER
            packed = trainer.pack([[prompt + lesson.description + vlm.END]])
            start = len(trainer.tokenizer.encode(vlm.PICTURE + prompt, add_special_tokens=False))
            logits = model.lm_head(trainer.hidden(features, packed))[0]
            told += [
                torch.nn.functional.cross_entropy(logits[at - 1], packed.ids[0, at])
                for at in range(start, packed.ids.shape[1])
            ]
    assert loss.item() == pytest.approx(float(torch.stack(answered).mean() + torch.stack(told).mean()), rel=1e-4)


def test_every_word_of_a_caption_is_one_token_and_so_is_what_stands_round_it() -> None:
    tokenizer = vlm.build_tokenizer()
    inside = ["a", "left", "right", "of", "above", "below", "and", "crosses", *COLOURS, *SHAPES]
    words = [f" {word}" for word in inside] + ["a", "two", "three"]  # a caption's first word follows a quotation mark
    words += [vlm.BEFORE, vlm.AFTER, vlm.DESCRIBE, *(f" {digit}" for digit in range(10))]
    assert all(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words)
    yes, no = vlm.answer_ids(tokenizer)
    assert yes != no
    assert tokenizer.decode(tokenizer.encode("Ünïcode ✓", add_special_tokens=False)) == "Ünïcode ✓"


def test_the_small_judge_fits_into_four_megabytes() -> None:
    model, _ = vlm.build("small")
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 4e6 - 300_000


def test_lessons_are_labelled_by_the_verifier_and_never_all_alike() -> None:
    rng = np.random.default_rng(0)
    captions = specs_by_kind("train")["attribute"][:20]
    painted = Painted(np.stack([rng.integers(0, 256, (32, 32, 3), np.uint8)] * 20), captions)
    lessons = [vlm_lessons.draw(painted, rng) for _ in range(80)]
    verdicts = [verdict for lesson in lessons for verdict in lesson.verdicts]
    assert 0.25 < np.mean(verdicts) < 0.75
    assert any(np.array_equal(lesson.picture, painted.pictures[0]) for lesson in lessons)
    for lesson in lessons:
        assert len(lesson.captions) == vlm_lessons.QUESTIONS
        for caption, verdict in zip(lesson.captions, lesson.verdicts, strict=True):
            assert split_of(parse_caption(caption).things) == "train"
            assert verify(lesson.picture, parse_caption(caption)).strict == verdict


def test_right_captions_are_all_the_ways_to_say_what_is_there() -> None:
    rng = np.random.default_rng(0)
    two = look(render(Scene((Placed("circle", "red", 8, 16, 5), Placed("square", "blue", 24, 16, 5)))))
    assert vlm_lessons.describe(two) == " red circle 2 4 blue square 6 4"
    said = {spec.text for spec in vlm_lessons.right_captions(two, rng)}
    things = [(first, second) for first in ("a circle", "a red circle") for second in ("a square", "a blue square")]
    expected = {text for one, other in things for text in (f"{one} and {other}", f"{other} and {one}",
                f"{one} left of {other}", f"{other} right of {one}")}  # fmt: skip
    assert said == {text for text in expected if split_of(parse_caption(text).things) == "train"}
    three = look(render(Scene(tuple(Placed("cross", "red", x, 16 + (x % 3), 4) for x in (5, 16, 27)))))
    assert {spec.text for spec in vlm_lessons.right_captions(three, rng)} == {"three crosses", "three red crosses"}
    assert not list(vlm_lessons.right_captions((), rng))
    assert vlm_lessons.describe(()) == ""


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run = fit_vlm.Run(steps=12, batch=4, lr=3e-3, warmup=1, size="tiny")
    whole, first = fit_vlm.Fitting(run, None), fit_vlm.Fitting(run, None)
    losses = [whole.advance()[0] for _ in range(run.steps)]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert fit_vlm.learning_rate(run, run.steps) == 0.0
    for _ in range(5):
        first.advance()
    first.save(tmp_path / "checkpoint.safetensors")
    again = fit_vlm.Fitting(replace(run, seed=0), None)
    again.load(tmp_path / "checkpoint.safetensors")
    assert [again.advance()[0] for _ in range(run.steps - 5)] == losses[5:]
    figures = fit_vlm.agreement(whole.model, whole.processor, 10, 0)
    assert 0 <= figures["all"] <= 1
    assert set(figures) > {"all", "counting"}


def test_the_judge_that_is_shipped_agrees_with_the_verifier() -> None:
    """On scenes of the test split, from the weights in the repository; the card's figure comes from more scenes."""
    if not (vlm.FOLDER / "config.json").exists():
        pytest.skip("no judge is shipped: python -m playground.train.fit_vlm makes one")
    torch.set_num_threads(1)
    assert sum(path.stat().st_size for path in vlm.FOLDER.iterdir()) < 4_000_000
    model = AutoModelForImageTextToText.from_pretrained(vlm.FOLDER, dtype=torch.float32).eval()
    figures = fit_vlm.agreement(model, AutoProcessor.from_pretrained(vlm.FOLDER), 300, seed=2)
    assert figures["all"] >= 0.94  # 97 % measured on 2,000 scenes; 300 scenes are 1 % either way
