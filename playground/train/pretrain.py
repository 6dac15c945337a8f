"""Owns the pretraining of the playground's base: flow matching on scenes made as they are needed.

    python -m playground.train.pretrain --out .cache/pretrain --ranks 2

Scenes and noise of a step depend on the seed and the step alone, so a run may be stopped and
resumed with another number of ranks, or go on with other captions: `run.json` lists every part
of it. Held-out combinations never come up, neither in captions nor in pictures. Owns no choice
of the final snapshot or its settings (see `choose`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from playground.train.mistakes import careless
from playground.train.pipeline import (
    LATENT_SCALE,
    LATENT_SHIFT,
    SHIFT,
    TEXT_TOKENS,
    build_pipeline,
)
from playground.train.sample import Settings, strict_by_kind
from playground.world.captions import KINDS, Spec
from playground.world.prompts import allowed_in_train, held_out_prompts, specs_by_kind
from playground.world.render import render
from playground.world.scenes import SIZE, sample_scene
from policy.cpu_kernels import CpuKernels

EASY_KINDS = ("single", "colour")
"""Learnt first and never evaluated: drawn half as often as the others."""
RELATION_KINDS = ("position", "position_attribute")
"""Learnt last; `Run.relations` says how much more often they are drawn."""


@dataclass(frozen=True)
class Run:
    """Everything a pretraining run depends on, its folder and number of ranks excepted."""

    steps: int = 8_000
    horizon: int = 14_000  # of the cosine; stopping earlier leaves the learning rate up
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 300
    ema: float = 0.998
    caption_dropout: float = 0.1
    caption_mistakes: float = 0.0  # of every word that can be mistaken, see `mistakes`
    relations: float = 1.0
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    save_every: int = 500
    export_every: int = 500
    export_from: int = 4_000


class Trainee(nn.Module):
    """The transformer and both text encoders as one module, from token ids to velocity."""

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of x [B, 3, H, W], sigma [B] and ids [B, TEXT_TOKENS]."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        # T5's tokens, which the pipeline puts after the encoders' own.
        embeds = torch.cat([embeds, torch.zeros_like(embeds)], dim=-2)
        return self.transformer(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=torch.cat([first.text_embeds, second.text_embeds], dim=-1),
            return_dict=False,
        )[0]


def start_from_zero(trainee: Trainee) -> None:
    """The usual start of a diffusion transformer: blocks add nothing, the output is zero."""
    transformer = trainee.transformer
    modules = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        modules += [block.norm1.linear, block.norm1_context.linear]
    for module in modules:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def draw_spec(rng: np.random.Generator, relations: float = 1.0) -> Spec:
    """A caption of the train split; those with relations come this many times as often as others."""
    often = dict.fromkeys(EASY_KINDS, 0.5) | dict.fromkeys(RELATION_KINDS, relations)
    weights = np.array([often.get(kind, 1.0) for kind in KINDS])
    specs = specs_by_kind("train")[KINDS[rng.choice(len(KINDS), p=weights / weights.sum())]]
    return specs[rng.integers(len(specs))]


class Batches:
    """Training batches by step; each rank gets its part of the same global batch."""

    def __init__(self, run: Run, rank: int, num_ranks: int, tokenizer: PreTrainedTokenizerFast) -> None:
        if run.batch % num_ranks:
            raise ValueError(f"a batch of {run.batch} does not divide by {num_ranks} ranks")
        self._run = run
        self._mine = slice(rank * run.batch // num_ranks, (rank + 1) * run.batch // num_ranks)
        self._ids = cache(lambda text: tokenizer(text, padding="max_length", max_length=TEXT_TOKENS).input_ids)

    def at(self, step: int) -> tuple[torch.Tensor, ...]:
        """(noised [B, 3, 32, 32], velocity [B, 3, 32, 32], sigma [B], token ids [B, L])."""
        run = self._run
        pictures, ids = [], []
        for i in range(run.batch)[self._mine]:
            rng = np.random.default_rng((run.seed, step, i))
            spec = draw_spec(rng, run.relations)
            pictures.append(render(sample_scene(spec, rng, allowed_in_train)))
            dropped = rng.random() < run.caption_dropout
            ids.append(self._ids("" if dropped else careless(spec, run.caption_mistakes, rng).text))
        x_BHWC = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1
        clean = (x_BHWC.permute(0, 3, 1, 2) - LATENT_SHIFT) / LATENT_SCALE
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        noise = torch.randn(run.batch, 3, SIZE, SIZE, generator=generator)[self._mine]
        even = torch.rand(run.batch, generator=generator)[self._mine]
        sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
        noised = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        return noised, noise - clean, sigma, torch.tensor(ids)


def learning_rate(run: Run, step: int) -> float:
    warm = min(1.0, (step + 1) / run.warmup)
    return run.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / run.horizon)))


class Average:
    """An exponential moving average of parameters, shorter at the start."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        decay = min(self._decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1 - decay)

    def swap(self) -> None:
        """Exchanges averaged and live parameters; call again to undo."""
        for value, parameter in zip(self.values, self._parameters, strict=True):
            held = parameter.detach().clone()
            parameter.data.copy_(value)
            value.copy_(held)


class Trainer:
    """One rank of a run: `advance` does a step, rank 0 also saves, evaluates and exports."""

    def __init__(self, run: Run, out: Path, rank: int, num_ranks: int, device: str) -> None:
        self.run, self.out, self.rank, self.device = run, out, rank, torch.device(device)
        self.pipeline = build_pipeline("base", seed=run.seed)
        self.trainee = Trainee(self.pipeline).to(self.device)
        start_from_zero(self.trainee)
        self.parameters = list(self.trainee.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=run.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.average = Average(self.parameters, run.ema)
        self.batches = Batches(run, rank, num_ranks, self.pipeline.tokenizer)
        self.step = 0
        self.model = DistributedDataParallel(self.trainee) if num_ranks > 1 else self.trainee

    def advance(self) -> float:
        """One optimizer step; returns this rank's loss."""
        noised, velocity, sigma, ids = (t.to(self.device) for t in self.batches.at(self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.run, self.step)
        bf16 = self.run.precision == "bf16"
        on_cpu = CpuKernels() if self.device.type == "cpu" else nullcontext()
        with on_cpu, torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            predicted = self.model(noised, sigma, ids)
        loss = (predicted.float() - velocity).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.run.max_grad_norm)
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint holds, by name; the tensors are the live ones."""
        named = {"step": torch.tensor(self.step)}
        for i, parameter in enumerate(self.parameters):
            named[f"parameter.{i}"] = parameter.detach()
            named[f"average.{i}"] = self.average.values[i]
            for key, value in self.optimizer.state[parameter].items():
                named[f"optimizer.{key}.{i}"] = value
        return named

    def save(self) -> None:
        partial = self.out / "checkpoint.safetensors.part"
        save_file(self.state(), partial)
        partial.replace(self.out / "checkpoint.safetensors")

    def load(self) -> None:
        """Every rank reads the same file, so ranks agree without a broadcast."""
        saved = load_file(self.out / "checkpoint.safetensors", device=str(self.device))
        self.step = int(saved["step"])
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(saved[f"parameter.{i}"])
                self.average.values[i].copy_(saved[f"average.{i}"])
                self.optimizer.state[parameter] = {
                    key: saved[f"optimizer.{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def evaluate_average(self, export: bool) -> dict[str, float]:
        """Strict accuracy on validation prompts of the averaged weights, perhaps saved as well."""
        specs = held_out_prompts("validation", 150, seed=0)
        self.average.swap()
        try:
            if export:
                self.pipeline.save_pretrained(self.out / f"step-{self.step:05d}")
            return strict_by_kind(self.pipeline, specs, Settings(), seed=0)
        finally:
            self.average.swap()


def train(rank: int, num_ranks: int, port: int, run: Run, out: Path, device: str, resume: bool) -> None:
    """One rank, from the start or the last checkpoint to the last step."""
    torch.set_num_threads(1)
    if num_ranks > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks)
    trainer = Trainer(run, out, rank, num_ranks, device)
    if resume and (out / "checkpoint.safetensors").exists():
        trainer.load()
    started, first, losses = time.monotonic(), trainer.step, []
    while trainer.step < run.steps:
        losses.append(trainer.advance())
        step = trainer.step
        if rank != 0:
            continue
        if step % 100 == 0:
            pace = (time.monotonic() - started) / (step - first)
            left = pace * (run.steps - step) / 60
            print(
                f"step {step}/{run.steps} loss {np.mean(losses[-100:]):.4f} {pace:.3f} s/step, {left:.0f} min left",
                flush=True,
            )
        if step % run.save_every == 0 or step == run.steps:
            trainer.save()
        if step % run.export_every == 0 or step == run.steps:
            accuracy = trainer.evaluate_average(export=step >= run.export_from)
            shown = " ".join(f"{kind} {value:.2f}" for kind, value in accuracy.items())
            print(f"step {step} strict on validation: {shown}", flush=True)
    if num_ranks > 1:
        dist.destroy_process_group()


def note_run(path: Path, run: dict[str, Any], resume: bool) -> None:
    """Lists the parts of a run, in order: one more when it goes on with other settings, one when it starts anew."""
    parts = json.loads(path.read_text()) if resume and path.exists() else []
    if run not in parts[-1:]:
        parts.append(run)
    path.write_text(json.dumps(parts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/pretrain"))
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--seed", type=int, default=Run.seed)
    parser.add_argument(
        "--caption-dropout", type=float, default=Run.caption_dropout, help="share left out, for guidance"
    )
    parser.add_argument("--caption-mistakes", type=float, default=Run.caption_mistakes, help="share of words mistaken")
    parser.add_argument("--relations", type=float, default=Run.relations, help="how often captions with one come")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=Run.precision)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(**{field.name: getattr(args, field.name) for field in fields(Run) if hasattr(args, field.name)})
    note_run(args.out / "run.json", {**asdict(run), "ranks": args.ranks}, args.resume)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"  # two threads a process on busy cores are ruinous
    rest = (args.ranks, port, run, args.out, args.device, args.resume)
    if args.ranks == 1:
        train(0, *rest)
    else:
        mp.spawn(train, args=rest, nprocs=args.ranks)


if __name__ == "__main__":
    main()
