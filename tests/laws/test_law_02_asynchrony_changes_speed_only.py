"""Law 2: at max_staleness 0 a cluster run equals, bit for bit, the same pure functions composed in one process.

And a loop written here from the formulas, without Salon's policy, objective, credit or engine, agrees with both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.inprocess import start_in_process
from contracts.config import RunConfig
from contracts.seeds import Stream, derive_seed
from tests.laws.run_kit import events, run_on_cluster, state_tensors, tiny_config

STEPS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "alignprop": {
        "scorers": [{"name": "brightness", "serve": "tests.cluster.own_scorers:Brightness"}], "sampler__name": "ode",
    },
}  # fmt: skip
"""What an objective needs, in the cluster and in one process."""
ON_CLUSTER: dict[str, dict[str, Any]] = {
    "nft": {"weights__transport": "collective", "rollout__actors": 2, "rollout__cpus_per_actor": 0.5},
    "ppo": {"eval__before": True, "eval__every_steps": 1, "eval__during_prompts": 3},
}
"""What the cluster does besides, which must change no weight: two actors that get theirs by host copies over real gloo;
evaluations before and beside the training."""


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("objective", ["grpo", "nft", "ppo", "dpo", "alignprop"])
def test_cluster_run_equals_in_process_run_bit_for_bit(objective: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    settings = SETTINGS.get(objective, {})
    config = tiny_config(tiny_model_folder, tmp_path, objective, **settings, **ON_CLUSTER.get(objective, {}))
    summary = run_on_cluster(config)
    assert summary["steps"] == STEPS
    assert summary["max_staleness_seen"] == 0
    check_circumstances(objective, config, summary)
    run = start_in_process(tiny_config(tiny_model_folder, tmp_path, objective, **settings))
    for _ in range(STEPS):
        run.step()
    run.learner.save_state(tmp_path / "reference")
    cluster_state = state_tensors(tmp_path / "tiny" / "checkpoints" / f"step-{STEPS:06d}")
    reference = state_tensors(tmp_path / "reference")
    assert cluster_state.keys() == reference.keys()
    assert len(reference) > 10
    different = [name for name in reference if not np.array_equal(cluster_state[name], reference[name])]
    assert different == []


def check_circumstances(objective: str, config: RunConfig, summary: dict[str, Any]) -> None:
    """What the cluster was to do besides has been done."""
    if objective == "nft":
        assert [len(event["processes"]) for event in events(config, "host_copies")] == [1], "one copy a node"
        assert events(config, "host_copies_lost") == []
        assert {event["version"] for event in events(config, "weights_proven")} >= {1, 2}
    if objective == "ppo":
        assert summary["held_out_strict_before"] is not None
        measured = [event for event in events(config, "evaluation") if event["tag"].startswith("step ")]
        assert measured, "every step was due"
        assert {event["result"]["num_images"] for event in measured} == {3}
        assert events(config, "evaluation_failed") == []


def test_weights_change_so_that_equality_means_something(tiny_model_folder: Path, tmp_path: Path) -> None:
    run = start_in_process(tiny_config(tiny_model_folder, tmp_path))
    before = {name: p.detach().clone() for name, p in run.learner.policy.trainable().items()}
    run.step()
    assert any(not torch.equal(before[name], p) for name, p in run.learner.policy.trainable().items())


def test_a_loop_written_from_the_formulas_agrees(tiny_model_folder: Path, tmp_path: Path) -> None:
    # A larger eps than AdamW's own keeps the sign of rounding errors from becoming steps of size lr.
    optimizer = {"lr": FormulaLoop.LR, "eps": FormulaLoop.EPS}
    config = tiny_config(tiny_model_folder, tmp_path, learner__epochs=2, learner__optimizer=optimizer)
    run = start_in_process(config)
    ours = [run.step()[0].metrics for _ in range(STEPS)]
    loop = FormulaLoop(tiny_model_folder, config.seed, run.source)
    for mine, other in zip(ours, loop.train(STEPS), strict=True):
        # A group's advantages cancel at ratio 1, so the loss is a small sum of terms of size 1.
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    others = dict(loop.net.named_parameters())
    moved = 2 * STEPS * loop.LR
    for name, parameter in run.learner.policy.trainable().items():
        assert (parameter - others[name]).abs().max() < 0.02 * moved, name


class FormulaLoop:
    """Flow-GRPO from the paper's equations on a diffusers pipeline: P=2, G=4, T=4, a=0.7, lr=1e-3, two epochs."""

    P, G, T, A_NOISE, LR, EPS, CLIP = 2, 4, 4, 0.7, 1e-3, 1e-5, 1e-3

    def __init__(self, folder: Path, seed: int, source: object) -> None:
        from diffusers import StableDiffusion3Pipeline

        self.pipe = StableDiffusion3Pipeline.from_pretrained(folder)
        self.net = self.pipe.transformer
        self.seed, self.source, self.position = seed, source, 0
        parameters = [p for _, p in sorted(self.net.named_parameters())]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.LR, betas=(0.9, 0.999), eps=self.EPS, weight_decay=1e-4)
        even = torch.linspace(1, 0, self.T + 1, dtype=torch.float64)
        self.s = (3.0 * even / (1 + 2.0 * even)).float()

    def train(self, steps: int) -> list[dict[str, float]]:
        reports = []
        for _ in range(steps):
            groups = [self.paint() for _ in range(self.P)]
            rewards = torch.stack([group["reward"] for group in groups])
            advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
            updates = [self.update(groups, advantage.clamp(-5, 5)) for _ in range(2)]
            reports.append({key: sum(u[key] for u in updates) / 2 for key in updates[0]})
        return reports

    def paint(self) -> dict[str, torch.Tensor]:
        gid = self.position
        self.position += 1
        with torch.no_grad():
            text, _, pooled, _ = self.pipe.encode_prompt(
                self.source.at(gid).text, None, None, do_classifier_free_guidance=False, max_sequence_length=12
            )
            text, pooled = text.expand(self.G, -1, -1), pooled.expand(self.G, -1)
            x = torch.stack([self.noise(Stream.INIT_NOISE, gid, i) for i in range(self.G)])
            states, log_probs = [x], []
            for k in range(self.T - 1):
                mean, std = self.step_distribution(x, k, text, pooled)
                z = torch.stack([self.noise(Stream.STEP_NOISE, gid, i, k) for i in range(self.G)])
                x = mean + std * z
                states.append(x)
                log_probs.append(self.log_prob(x, mean, std))
            x = x + self.velocity(x, self.T - 1, text, pooled) * (self.s[self.T] - self.s[self.T - 1])
            pixels = self.pipe.vae.decode(x / self.pipe.vae.config.scaling_factor + self.pipe.vae.config.shift_factor)
            images = ((pixels.sample / 2 + 0.5).clamp(0, 1) * 255).round()
        return {
            "states": torch.stack(states, 1), "log_prob": torch.stack(log_probs, 1), "text": text, "pooled": pooled,
            "reward": torch.tensor([colourfulness(image) for image in images.double()], dtype=torch.float64),
        }  # fmt: skip

    def update(self, groups: list[dict[str, torch.Tensor]], advantage: torch.Tensor) -> dict[str, float]:
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for group, a in zip(groups, advantage, strict=True):
            for k in range(self.T - 1):
                mean, std = self.step_distribution(group["states"][:, k], k, group["text"], group["pooled"])
                ratio = (self.log_prob(group["states"][:, k + 1], mean, std) - group["log_prob"][:, k]).exp()
                clipped = ratio.clamp(1 - self.CLIP, 1 + self.CLIP)
                total = total + torch.maximum(-a * ratio, -a * clipped).sum()
        loss = total / (self.P * self.G * (self.T - 1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    def step_distribution(self, x: torch.Tensor, k: int, text: torch.Tensor, pooled: torch.Tensor) -> tuple:
        """Flow-GRPO eq. 9: x + (v + sd^2/(2s) (x + (1-s) v)) ds, sd sqrt(-ds); 1-s is 1-s_1 where s = 1."""
        s, ds = self.s[k], self.s[k + 1] - self.s[k]
        sd = self.A_NOISE * torch.sqrt(s / (1 - (self.s[1] if k == 0 else s)))
        v = self.velocity(x, k, text, pooled)
        return x + (v + sd**2 / (2 * s) * (x + (1 - s) * v)) * ds, sd * torch.sqrt(-ds)

    def velocity(self, x: torch.Tensor, k: int, text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        time = (self.s[k] * 1000).expand(len(x))
        return self.net(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=time).sample

    def log_prob(self, x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(mean.double(), std.double()).log_prob(x.double()).mean((1, 2, 3))

    def noise(self, stream: Stream, *ids: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, stream, *ids))
        return torch.randn(3, 32, 32, generator=generator)


def colourfulness(image: torch.Tensor) -> float:
    """Hasler and Suesstrunk 2003, eq. 2; image [3,H,W] in 0..255."""
    red, green, blue = image
    rg, yb = red - green, 0.5 * (red + green) - blue
    deviation = (rg.var(correction=0) + yb.var(correction=0)).sqrt()
    return float(deviation + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2).sqrt())
