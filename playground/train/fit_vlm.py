"""Owns the training of the playground's small judge to agree with the verifier.

    python -m playground.train.fit_vlm --base playground/base

Beside the answers it learns to describe the picture, which teaches it to see far sooner than one bit an answer does.
A lesson depends on the seed and its step alone, and a checkpoint is kept, so a run that was stopped goes on with
`--resume`, also to another number of steps. Reports agreement with the verifier on scenes of the test split, and by
kind. Does not own what is taught (see `vlm_lessons`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from playground.train import vlm
from playground.train.fit_scorer import Painted, paint_with
from playground.train.vlm_lessons import Lesson, draw
from playground.world.captions import Spec
from playground.world.prompts import held_out_prompts, prompt_stream
from playground.world.reliability import wrong_by_one
from playground.world.render import render
from playground.world.scenes import fits, sample_scene
from playground.world.verify import verify

NUM_PAINTED, NUM_VALIDATION, NUM_TEST = 1_024, 500, 2_000
_REPORT_EVERY, _SAVE_EVERY = 100, 500


@dataclass(frozen=True)
class Run:
    """Everything the training depends on. batch: pictures a step; decay: share of steps at the end in which the
    learning rate falls to zero.
    """

    steps: int = 8_000
    batch: int = 24
    lr: float = 2e-3
    warmup: int = 200
    decay: float = 0.3
    seed: int = 0
    size: str = "small"


@dataclass(frozen=True)
class Packed:
    """Texts about pictures: the picture's tokens once, then every text as a branch that sees them and itself alone.

    ids, positions, branches: [B, L], branch 0 is the picture, -1 padding; ends: where each text ends, as (row, column)
    indices, in order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    branches: torch.Tensor
    ends: tuple[torch.Tensor, torch.Tensor]

    @property
    def mask(self) -> torch.Tensor:
        """Which position [B, 1, L, L] attends to which: not later ones, the picture's and its own branch's."""
        length = self.ids.shape[1]
        seen = (self.branches[:, None, :] == 0) | (self.branches[:, None, :] == self.branches[:, :, None])
        return (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


class Trainer:
    """Forward passes that look at each picture once, however much is said about it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.yes, self.no = vlm.answer_ids(tokenizer)
        self._encode = cache(lambda text: tokenizer.encode(text, add_special_tokens=False))

    def look(self, pictures: np.ndarray) -> torch.Tensor:
        """Features [B, IMAGE_TOKENS, D] of uint8 [B,32,32,3], normalised as the image processor does."""
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        return torch.stack(list(self.model.model.get_image_features(pixels[:, None]).pooler_output))

    def pack(self, texts: Sequence[Sequence[str]]) -> Packed:
        """Texts [B][any number], each as it follows its row's picture."""
        start = self._encode(vlm.PICTURE)
        rows = [[self._encode(text) for text in row] for row in texts]
        length = len(start) + max(sum(map(len, row)) for row in rows)
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id)
        positions, branches = np.zeros_like(ids), np.full_like(ids, -1)
        ends: list[tuple[int, int]] = []
        for index, row in enumerate(rows):
            at = len(start)
            ids[index, :at], positions[index, :at], branches[index, :at] = start, range(at), 0
            for branch, tokens in enumerate(row, 1):
                part = slice(at, at + len(tokens))
                ids[index, part], branches[index, part] = tokens, branch
                positions[index, part] = range(len(start), len(start) + len(tokens))
                at = part.stop
                ends.append((index, at - 1))
        at_row, at_column = torch.tensor(ends).T
        made = [torch.from_numpy(each) for each in (ids, positions, branches)]
        return Packed(ids=made[0], positions=made[1], branches=made[2], ends=(at_row, at_column))

    def hidden(self, features: torch.Tensor, packed: Packed) -> torch.Tensor:
        """[B, L, D] of packed texts about pictures with features [B, IMAGE_TOKENS, D]."""
        embedded = self.model.model.inputs_merger(packed.ids, self.model.get_input_embeddings()(packed.ids), features)
        out = self.model.model.text_model(
            inputs_embeds=embedded, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
        )
        return out.last_hidden_state

    def answers(self, features: torch.Tensor, captions: Sequence[Sequence[str]]) -> torch.Tensor:
        """Logits [N, V] of the first token of every answer, captions [B][any number]."""
        packed = self.pack([[_question(caption) for caption in row] for row in captions])
        return self.model.lm_head(self.hidden(features, packed)[packed.ends])

    def loss(self, lessons: Sequence[Lesson]) -> tuple[torch.Tensor, float]:
        """(mean cross-entropy of the answers plus that of the descriptions' tokens, share of answers that are right).

        Each row ends with its description, the one text whose tokens are learnt beside what follows its end.
        """
        asked = [[_question(caption) for caption in lesson.captions] for lesson in lessons]
        told = [f"{vlm.DESCRIBE}{vlm.ANSWER}{lesson.description}{vlm.END}" for lesson in lessons]
        packed = self.pack([[*row, text] for row, text in zip(asked, told, strict=True)])
        hidden = self.hidden(self.look(np.stack([lesson.picture for lesson in lessons])), packed)
        each = torch.tensor([is_last for row in asked for is_last in (*[False] * len(row), True)])
        rows, columns = packed.ends
        logits = self.model.lm_head(hidden[rows[~each], columns[~each]])
        verdicts = torch.tensor([verdict for lesson in lessons for verdict in lesson.verdicts])
        right = ((logits[:, self.yes] > logits[:, self.no]) == verdicts).float().mean().item()
        loss = cross_entropy(logits, torch.where(verdicts, self.yes, self.no))
        prompt = len(self._encode(vlm.DESCRIBE + vlm.ANSWER))
        inside = packed.branches == torch.tensor([len(row) + 1 for row in asked])[:, None]
        inside &= packed.positions >= len(self._encode(vlm.PICTURE)) + prompt
        told_at = inside[:, 1:]  # a token is told by the position before it
        return loss + cross_entropy(self.model.lm_head(hidden[:, :-1][told_at]), packed.ids[:, 1:][told_at]), right


def _question(caption: str) -> str:
    return vlm.QUESTION.replace("{prompt}", caption) + vlm.ANSWER


def learning_rate(run: Run, step: int) -> float:
    """Up, level, and down to zero at the end: the level part may be left at any step."""
    up, down = (step + 1) / run.warmup, (run.steps - step) / (run.decay * run.steps)
    return run.lr * min(1.0, up, max(down, 0.0))


class Fitting:
    """One training: `advance` does a step; its state is written to and read from a folder."""

    def __init__(self, run: Run, painted: Painted | None) -> None:
        torch.manual_seed(run.seed)
        self.run, self.painted, self.step = run, painted, 0
        self.model, self.processor = vlm.build(run.size, run.seed)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=run.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.trainer = Trainer(self.model, self.processor.tokenizer)

    def advance(self) -> tuple[float, float]:
        """(loss, share of answers that are right) of one step. AdamW, gradients clipped at 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.run, self.step)
        seeds = ((self.run.seed, self.step, index) for index in range(self.run.batch))
        loss, right = self.trainer.loss([draw(self.painted, np.random.default_rng(seed)) for seed in seeds])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item(), right

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        state = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            state[f"parameter.{name}"] = parameter.detach()
            state |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        partial = path.with_suffix(".part")
        save_file(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on where `save` was called."""
        saved = load_file(path)
        self.step = int(saved["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[f"parameter.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {key: saved[f"optimizer.{key}.{name}"] for key in keys}


def fit(fitting: Fitting, folder: Path) -> None:
    """To the last step, with checkpoints and a line of progress.jsonl each 500 steps in the folder."""
    begun, first, losses, rights = time.process_time(), fitting.step, [], []
    while fitting.step < fitting.run.steps:
        loss, right = fitting.advance()
        losses.append(loss)
        rights.append(right)
        step = fitting.step
        if step % _REPORT_EVERY == 0:
            pace = (time.process_time() - begun) / (step - first)
            recent = f"loss {np.mean(losses[-_REPORT_EVERY:]):.4f} right {np.mean(rights[-_REPORT_EVERY:]):.3f}"
            print(f"step {step}/{fitting.run.steps} {recent} {pace:.3f} CPU seconds a step", flush=True)
        if step % _SAVE_EVERY == 0 or step == fitting.run.steps:
            fitting.save(folder / "checkpoint.safetensors")
            figures = agreement(fitting.model, fitting.processor, NUM_VALIDATION, 0, split="validation")
            with (folder / "progress.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "validation": figures}) + "\n")
            print(f"step {step} agreement on validation: {figures}", flush=True)


@torch.no_grad()
def agreement(
    model: Any, processor: Any, num: int, seed: int, painted: Painted | None = None, split: str = "test"
) -> dict[str, float]:
    """Share of yes/no answers that are the verifier's, on scenes of a split: all, by kind, and on painted ones.

    Half of the captions are the scene's own, half are wrong by one attribute (and do not fit by chance).
    """
    rng, trainer = np.random.default_rng(seed), Trainer(model, processor.tokenizer)
    rows: list[tuple[str, np.ndarray, Spec]] = []
    for spec in held_out_prompts(split, num, seed):
        scene = sample_scene(spec, rng)
        wrong = [each for each in wrong_by_one(spec) if not fits(scene, each)]
        rows.append((spec.kind, render(scene), spec if rng.random() < 0.5 else wrong[rng.integers(len(wrong))]))
    if painted is not None:
        rows += [("painted", *pair) for pair in zip(painted.pictures, painted.specs, strict=True)]
    agreed: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(rows), 64):
        part = rows[begin : begin + 64]
        logits = trainer.answers(trainer.look(np.stack([row[1] for row in part])), [[row[2].text] for row in part])
        said = (logits[:, trainer.yes] > logits[:, trainer.no]).tolist()
        for (kind, picture, spec), yes in zip(part, said, strict=True):
            agreed[kind].append(yes == verify(picture, spec).strict)
    scenes = [value for kind, values in agreed.items() if kind != "painted" for value in values]
    shares = {"all": scenes, **agreed}
    return {kind: round(float(np.mean(values)), 4) for kind, values in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=None, help="also show it what this base paints")
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--batch", type=int, default=Run.batch, help="pictures a step")
    parser.add_argument("--lr", type=float, default=Run.lr)
    parser.add_argument("--seed", type=int, default=Run.seed)
    parser.add_argument("--size", choices=tuple(vlm.SIZES), default=Run.size)
    parser.add_argument("--checkpoints", type=Path, default=Path(".cache/judge"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    parser.add_argument("--out", type=Path, default=vlm.FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(args.steps, args.batch, args.lr, seed=args.seed, size=args.size)
    painted = held_out = None
    if args.base is not None:
        stream = prompt_stream("train", run.seed)
        painted = paint_with(args.base, [next(stream) for _ in range(NUM_PAINTED)], run.seed)
        held_out = paint_with(args.base, held_out_prompts("test", NUM_VALIDATION, run.seed), run.seed + 1)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    fitting, checkpoint = Fitting(run, painted), args.checkpoints / "checkpoint.safetensors"
    if args.resume and checkpoint.exists():
        fitting.load(checkpoint)
    fit(fitting, args.checkpoints)
    model, processor = fitting.model.eval(), fitting.processor
    vlm.save(model, processor, args.out)
    figures = agreement(model, processor, NUM_TEST, 1, held_out)
    (args.out / "salon.json").write_text(json.dumps({"agreement": figures, "trained": asdict(run)}, indent=2) + "\n")
    print(f"agreement with the verifier on test scenes: {figures['all']:.3f}  {figures}")


if __name__ == "__main__":
    main()
