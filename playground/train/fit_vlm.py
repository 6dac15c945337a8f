"""Owns the training of the playground's small judge to agree with the verifier.

    python -m playground.train.fit_vlm --base playground/base --steps 12000

Trains on captions of the train split: pictures that are right, spoilt, empty, or painted by the base, each with several
captions, right ones and ones wrong by one attribute, labelled by the verifier's strict verdict. Beside the answers it
learns to describe the picture, which teaches it to see far sooner than one bit an answer does. Reports agreement with
the verifier on scenes of the test split, and by kind.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from playground.train import vlm
from playground.train.fit_scorer import Painted, paint_with, spoil
from playground.world.captions import Spec
from playground.world.prompts import allowed_in_train, held_out_prompts, prompt_stream, specs_by_kind
from playground.world.reliability import wrong_by_one
from playground.world.render import render
from playground.world.scenes import fits, sample_scene
from playground.world.verify import verify

QUESTIONS = 6
"""Asked about each picture of a batch: seeing costs most, so a picture is used several times."""


@dataclass(frozen=True)
class Example:
    """A picture uint8 [32,32,3], captions asked about it, the verifier's verdicts, and its true caption if known."""

    picture: np.ndarray
    captions: tuple[str, ...]
    verdicts: tuple[bool, ...]
    description: str | None


def draw(painted: Painted | None, rng: np.random.Generator) -> Example:
    """One training example."""
    kind = rng.random()
    spec, known = _random_spec("train", rng), True
    picture = render(sample_scene(spec, rng, allowed_in_train))
    if kind < 0.03:
        level = rng.integers(0, 256, 3) if rng.random() < 0.5 else rng.integers(0, 256)
        picture, known = np.full_like(picture, level), False
        if rng.random() < 0.3:
            picture = rng.integers(0, 256, picture.shape).astype(np.uint8)
    elif kind < 0.30 and painted is not None:
        index = int(rng.integers(len(painted.specs)))
        picture, spec, known = painted.pictures[index], painted.specs[index], False
    elif kind < 0.45:
        picture, known = spoil(picture, rng).astype(np.uint8), False
    asked = [spec] * (QUESTIONS // 2)
    wrong = wrong_by_one(spec)
    asked += [wrong[rng.integers(len(wrong))] for _ in range(QUESTIONS - len(asked) - 1)]
    asked.append(_random_spec("train", rng))
    if kind >= 0.30 and len(spec.objects) == 2 and not spec.relation:
        asked[0] = Spec(spec.kind, spec.objects[::-1], spec.relation, spec.count)  # the same said the other way round
    verdicts = tuple(verify(picture, each).strict for each in asked)
    return Example(picture, tuple(each.text for each in asked), verdicts, spec.text if known else None)


def _random_spec(split: str, rng: np.random.Generator) -> Spec:
    by_kind = list(specs_by_kind(split).values())
    of_kind = by_kind[rng.integers(len(by_kind))]
    return of_kind[rng.integers(len(of_kind))]


class Trainer:
    """Forward passes that look at each picture once, however many questions are asked about it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.yes, self.no = vlm.answer_ids(tokenizer)

    def look(self, pictures: np.ndarray) -> torch.Tensor:
        """Features [B, IMAGE_TOKENS, D] of uint8 [B,32,32,3], normalised as the image processor does."""
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        return torch.stack(list(self.model.model.get_image_features(pixels[:, None]).pooler_output))

    def hidden(self, features: torch.Tensor, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden [N,L,D], ids [N,L], lengths [N]) of texts, each with its picture's features [N,IMAGE_TOKENS,D]."""
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.tokenizer.pad_token_id)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        embedded = self.model.get_input_embeddings()(ids)
        embedded = self.model.model.inputs_merger(ids, embedded, features)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        out = self.model.model.text_model(inputs_embeds=embedded, attention_mask=mask.long(), use_cache=False)
        return out.last_hidden_state, ids, lengths

    def answers(self, features: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Logits [N,V] of the answer's first token."""
        texts = [vlm.prompt_text(vlm.QUESTION.replace("{prompt}", caption)) for caption in captions]
        hidden, _, lengths = self.hidden(features, texts)
        return self.model.lm_head(hidden[torch.arange(len(texts)), lengths - 1])

    def loss(self, examples: Sequence[Example]) -> tuple[torch.Tensor, float]:
        """(mean cross-entropy of answers plus half of the descriptions', share of answers that are right)."""
        features = self.look(np.stack([example.picture for example in examples]))
        captions = [caption for example in examples for caption in example.captions]
        verdicts = torch.tensor([verdict for example in examples for verdict in example.verdicts])
        logits = self.answers(features.repeat_interleave(QUESTIONS, dim=0), captions)
        target = torch.where(verdicts, self.yes, self.no)
        right = ((logits[:, self.yes] > logits[:, self.no]) == verdicts).float().mean().item()
        loss = cross_entropy(logits, target)
        described = [i for i, example in enumerate(examples) if example.description is not None]
        if described:
            loss = loss + 0.5 * self._describing(features[described], [examples[i].description for i in described])
        return loss, right

    def _describing(self, features: torch.Tensor, descriptions: Sequence[str | None]) -> torch.Tensor:
        prefix = vlm.prompt_text(vlm.DESCRIBE)
        start = len(self.tokenizer.encode(prefix, add_special_tokens=False))
        hidden, ids, lengths = self.hidden(features, [f"{prefix}{text}<|end|>" for text in descriptions])
        inside = torch.arange(ids.shape[1] - 1)[None] < lengths[:, None] - 1
        inside[:, : start - 1] = False
        return cross_entropy(self.model.lm_head(hidden[:, :-1][inside]), ids[:, 1:][inside])


def fit(
    painted: Painted | None, steps: int, seed: int, *, size: str = "small", lr: float = 2e-3, batch: int = 16
) -> tuple[Any, Any]:
    """(model, processor). batch: pictures a step. AdamW, one cycle, gradients clipped at 1."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, processor = vlm.build(size, seed)
    trainer = Trainer(model, processor.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start, losses, rights = time.monotonic(), [], []
    for step in range(steps):
        loss, right = trainer.loss([draw(painted, rng) for _ in range(batch)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        rights.append(right)
        if (step + 1) % 250 == 0:
            done = f"step {step + 1}/{steps} loss {np.mean(losses[-250:]):.4f} right {np.mean(rights[-250:]):.3f}"
            print(f"{done} {(time.monotonic() - start) / (step + 1):.3f} s a step", flush=True)
    return model.eval(), processor


@torch.no_grad()
def agreement(model: Any, processor: Any, num: int, seed: int, painted: Painted | None = None) -> dict[str, float]:
    """Share of yes/no answers that are the verifier's, on scenes of the test split: all, by kind, and on painted ones.

    Half of the captions are the scene's own, half are wrong by one attribute (and do not fit by chance).
    """
    rng, trainer = np.random.default_rng(seed), Trainer(model, processor.tokenizer)
    rows: list[tuple[str, np.ndarray, Spec]] = []
    for index, spec in enumerate(held_out_prompts("test", num, seed)):
        scene = sample_scene(spec, rng)
        wrong = [each for each in wrong_by_one(spec) if not fits(scene, each)]
        rows.append((spec.kind, render(scene), spec if index % 2 else wrong[rng.integers(len(wrong))]))
    if painted is not None:
        rows += [("painted", *pair) for pair in zip(painted.pictures, painted.specs, strict=True)]
    agreed: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(rows), 64):
        part = rows[begin : begin + 64]
        logits = trainer.answers(trainer.look(np.stack([row[1] for row in part])), [row[2].text for row in part])
        said = (logits[:, trainer.yes] > logits[:, trainer.no]).tolist()
        for (kind, picture, spec), yes in zip(part, said, strict=True):
            agreed[kind].append(yes == verify(picture, spec).strict)
    shares = {kind: float(np.mean(values)) for kind, values in agreed.items()}
    scenes = [value for kind, values in agreed.items() if kind != "painted" for value in values]
    return {"all": float(np.mean(scenes)), **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=None, help="also show it what this base paints")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=tuple(vlm.SIZES), default="small")
    parser.add_argument("--out", type=Path, default=vlm.FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    painted = held_out = None
    if args.base is not None:
        stream = prompt_stream("train", args.seed)
        painted = paint_with(args.base, [next(stream) for _ in range(3_072)], args.seed)
        held_out = paint_with(args.base, held_out_prompts("test", 512, args.seed), args.seed + 1)
    model, processor = fit(painted, args.steps, args.seed, size=args.size, lr=args.lr, batch=args.batch)
    vlm.save(model, processor, args.out)
    figures = agreement(model, processor, 2_000, 1, held_out)
    settings = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed, "size": args.size}
    (args.out / "salon.json").write_text(json.dumps({"agreement": figures, "trained": settings}, indent=2) + "\n")
    print(f"agreement with the verifier on test scenes: {figures['all']:.3f}  {figures}")


if __name__ == "__main__":
    main()
