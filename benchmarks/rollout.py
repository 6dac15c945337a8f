"""What painting costs beside the network: a painter's denoising against the bare denoising loop on the same tensors.

- painter: `Painter.denoise` as a rollout actor calls it: seeds derived, embeddings stacked, noise drawn sample by
  sample, the transition kernel with its log-probs, states recorded, header written. The prompt is cached, as it is for
  all groups but a prompt's first; decoding is left out, as it runs beside the next group.
- bare: the network's forwards (conditional and unconditional in one, with guidance) and x' = a x + b v + c noise in a
  plain loop, with noise and coefficients computed beforehand and nothing recorded.

Both end in the same latents, which is checked. The model is the playground's at full size with random weights, fp32, on
one thread. Pairs are interleaved, the first of a pair in turn; ratios are taken within pairs.

    python -m benchmarks.rollout [--json]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.measuring import interleaved, median, one_thread, ratios

TARGET = 1.05
STEPS = 10
PROMPT = "two red circles"
CASES = [(size, guidance) for size in (8, 2) for guidance in (1.0, 3.0)]


def run(repeats: int = 15) -> dict[str, Any]:
    """Rows by images painted together and guidance: ratio painter/bare by wall and by CPU time, seconds of both."""
    from playground.train.pipeline import build_pipeline

    with one_thread(), tempfile.TemporaryDirectory() as folder:
        build_pipeline(size="base", seed=0).save_pretrained(folder)
        rows = [_measure(folder, size, guidance, repeats) for size, guidance in CASES]
    return {"repeats": repeats, "target": TARGET, "steps": STEPS, "rows": rows}


def _measure(folder: str, size: int, guidance: float, repeats: int) -> dict[str, Any]:
    from actors.painter import Painter
    from contracts.wire import PromptSpec, PromptTask

    config = _config(folder, size, guidance)
    painter = Painter(config)
    bare = BareLoop(painter.policy, config)
    task = PromptTask(
        group_id=0, attempt=0, prompt=PromptSpec(text=PROMPT), group_size=size, min_version=0, deadline_s=60.0
    )

    def denoise() -> Any:
        return painter.denoise(task).trajectories[0].clean

    assert np.allclose(denoise().numpy(), bare().numpy(), atol=1e-4), "the two loops paint different images"
    pairs = interleaved(denoise, bare, repeats)
    return {
        "images": size, "guidance": guidance,
        "wall": median(ratios(pairs["wall"])), "cpu": median(ratios(pairs["cpu"])),
        "painter_seconds": median([ours for ours, _ in pairs["wall"]])["median"],
        "bare_seconds": median([theirs for _, theirs in pairs["wall"]])["median"],
    }  # fmt: skip


class BareLoop:
    """Group 0's latents by the network and a line of arithmetic a step; everything else was computed before."""

    def __init__(self, policy: Any, config: Any) -> None:
        import torch

        from contracts.seeds import Stream, derive_seed
        from policy.rollout import seeded_noise
        from policy.types import EmbeddingBatch

        self.network, self.guidance, self.size = policy.module, config.sampler.guidance_scale, config.rollout.group_size
        seeds = [derive_seed(config.seed, Stream.INIT_NOISE, 0, i) for i in range(self.size)]
        self.start = seeded_noise(seeds, policy)
        texts = [PROMPT] if self.guidance == 1 else [PROMPT, ""]
        embeddings = [policy.encode_prompt(text) for text in texts for _ in range(self.size)]
        self.condition = EmbeddingBatch.stack(embeddings, policy.device, policy.dtype)
        self.steps = []
        for step, (s, coefficients) in enumerate(_coefficients(config)):
            seeds = [derive_seed(config.seed, Stream.STEP_NOISE, 0, i, step) for i in range(self.size)]
            timesteps = torch.full((len(embeddings),), 1000.0 * s)
            self.steps.append((timesteps, coefficients, seeded_noise(seeds, policy)))

    def __call__(self) -> Any:
        import torch

        x = self.start
        with torch.no_grad():
            for timesteps, (a, b, c), noise in self.steps:
                x = a * x + b * self._velocity(x, timesteps) + c * noise
        return x

    def _velocity(self, x: Any, timesteps: Any) -> Any:
        import torch

        v = self.network(
            hidden_states=x if self.guidance == 1 else torch.cat([x, x]), timestep=timesteps,
            encoder_hidden_states=self.condition.text, pooled_projections=self.condition.pooled, return_dict=False,
        )[0]  # fmt: skip
        if self.guidance == 1:
            return v
        v_cond, v_uncond = v.chunk(2)
        return v_uncond + self.guidance * (v_cond - v_uncond)


def _coefficients(config: Any) -> list[tuple[float, tuple[float, float, float]]]:
    """(level, (of x, of v, of the noise)) of every step of group 0."""
    from policy import schedule
    from policy.samplers.base import build_sampler

    levels = schedule.sigmas(STEPS, config.sampler.shift).tolist()
    kernel, ode = build_sampler(config.sampler), build_sampler(config.sampler.model_copy(update={"name": "ode"}))
    stochastic = schedule.stochastic_steps(config.sampler, config.seed, 0)
    rows = []
    for step, (s, s_next) in enumerate(pairwise(levels)):
        sampler, s_max = (kernel, levels[1]) if step in stochastic else (ode, s_next)
        a, b, c, _ = sampler.rows_of(s, s_next, s_max).values.flatten().tolist()
        rows.append((s, (a, b, c)))
    return rows


def _config(folder: str, size: int, guidance: float) -> Any:
    from contracts.config.load import config_from_tree

    return config_from_tree(
        {
            "name": "bench",
            "model": {"path": folder, "device": "cpu"},
            "objective": {"name": "grpo"},
            "scorers": [{"name": "given", "urls": ["http://127.0.0.1:1"]}],
            "stop": {"steps": 1},
            "rollout": {"group_size": size, "micro_batch": size},
            "sampler": {"name": "flow_sde", "steps": STEPS, "guidance_scale": guidance},
            "learner": {"engine": "plain"},
        }
    )


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| images | guidance | painter / bare, wall | 95 % interval | CPU time | 95 % interval | painter, s | bare |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        wall, cpu = row["wall"], row["cpu"]
        lines.append(
            f"| {row['images']} | {row['guidance']:g} | {wall['median']:.3f} | {wall['low']:.3f} – {wall['high']:.3f} "
            f"| {cpu['median']:.3f} | {cpu['low']:.3f} – {cpu['high']:.3f} "
            f"| {row['painter_seconds']:.3f} | {row['bare_seconds']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = run()
    print(json.dumps(measured, indent=1) if "--json" in sys.argv else table(measured))
