"""Adv-GRPO's discriminator: a small head on frozen DINO features, references against what the policy paints now.

    L_x = 1/2 (mean relu(1 - h(real_x)) + mean relu(1 + h(fake_x))),   x = CLS or `patches` random patch tokens
    L_D = L_cls + patch_weight L_patch;      Adam(lr 1e-4, betas (.5, .999));      features L2-normalised before h

"The Image as Its Own Reward" (showlab/Adv-GRPO: scripts/train_sd3_fast_dino_patch.py). The sheet normalises features in
the reward alone; here also in the loss, so that the head is trained on what it scores. Its width is our choice.
Does not own: the reward made of it (scorers.py), the 9:1 schedule (updates_per_step of its section).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contracts.config.online import AdversarialDinoConfig
from contracts.config.scorers import AdversarialDinoOptions
from reward_servers.online.heads import head_arrays, make_head, moments, set_head, set_moments
from reward_servers.online.inbox import FedGroup
from reward_servers.online.references import References
from reward_servers.online.trainer import Arrays, Metrics, OnlineTrainer
from reward_servers.scorers.parts.loading import device_of, dtype_of, tensors_digest

REFERENCE_PROMPTS = "reference_prompts"


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 (mean relu(1 - real) + mean relu(1 + fake)) of outputs of any shapes; 0 once all margins are 1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class AdversarialDino(OnlineTrainer):
    """Trains the head; the features stay as they are."""

    config: AdversarialDinoConfig

    def __init__(self, config: AdversarialDinoConfig, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(config, options, seed)
        self.options = AdversarialDinoOptions.model_validate(dict(options))

    def load(self) -> None:
        self.references = References(self.config.references, self.config.per_prompt)
        self.features = DinoFeatures(self.options)
        self.head = make_head(self.features.width, self.config.hidden, self.seed).to(device_of(self.options))
        self.named = dict(self.head.named_parameters())
        self.optimizer = torch.optim.Adam(self.named.values(), lr=self.config.lr, betas=self.config.betas)

    def restore(self, weights: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
        set_head(self.head, weights)
        set_moments(self.optimizer, self.named, state)

    def learn(self, item: FedGroup) -> Metrics | None:
        rng = self.rng()
        references = self.references.draw(item.prompt, self.config.references_per_update, rng)
        if not references:
            return None
        real, fake = self.features(references), self.features(list(item.images))
        patches = self.features.some_patches(self.options.patches, rng)
        return self.update(real, fake, patches)

    def update(self, real: Tensor, fake: Tensor, patches: Tensor) -> Metrics:
        """One step on unit features [N,1+P,D] of references and of painted images; token 0 is CLS."""
        real_out, fake_out = self.head(real)[..., 0], self.head(fake)[..., 0]
        loss = hinge(real_out[:, 0], fake_out[:, 0])
        if self.config.patch_weight:
            loss = loss + self.config.patch_weight * hinge(real_out[:, patches], fake_out[:, patches])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        reals, fakes = real_out[:, 0].detach(), fake_out[:, 0].detach()
        return {
            "loss": float(loss.detach()), "real": float(reals.mean()), "fake": float(fakes.mean()),
            "accuracy": 0.5 * float((reals > 0).float().mean() + (fakes < 0).float().mean()),
        }  # fmt: skip

    def pack(self) -> tuple[Arrays, Arrays, dict[str, Any]]:
        weights = {**head_arrays(self.head), REFERENCE_PROMPTS: self.references.keys()}
        return weights, moments(self.optimizer, self.named), {"base": self.features.digest}


class DinoFeatures:
    """Unit features [N,1+P,D] of uint8 images by a frozen DINO: CLS, then its patches."""

    def __init__(self, options: AdversarialDinoOptions) -> None:
        from reward_servers.scorers.parts.dino import load_dino

        self.options = options
        edge = options.size
        square = {} if edge is None else {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
        self.network, self.preprocess = load_dino(options, **square)
        self.width = int(self.network.config.hidden_size)
        self.skip = 1 + int(getattr(self.network.config, "num_register_tokens", 0))
        crop = self.preprocess.processor.crop_size
        patch = int(self.network.config.patch_size)
        self.num_patches = (int(crop["height"]) // patch) * (int(crop["width"]) // patch)
        self.digest = tensors_digest(self.network)

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> Tensor:
        return self.of_pixels(self.pixels(self.preprocess.exact(images)))  # type: ignore[arg-type]

    def pixels(self, pixels: Tensor) -> Tensor:
        return pixels.to(device_of(self.options), dtype_of(self.options))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """With gradient where pixels have one."""
        tokens = self.network(pixel_values=pixels).last_hidden_state.float()
        return F.normalize(torch.cat([tokens[:, :1], tokens[:, self.skip :]], dim=1), dim=-1)

    def some_patches(self, number: int, rng: np.random.Generator) -> Tensor:
        """Indices of `number` random patch tokens (all where there are fewer), as of __call__'s result."""
        chosen = rng.permutation(self.num_patches)[:number]
        return torch.from_numpy(1 + np.sort(chosen)).to(device_of(self.options))
