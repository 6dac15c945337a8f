"""Small heads on frozen features, and the arrays they travel as. Does not own: what is fed to them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from contracts.errors import PayloadError

PREFIX = "head."


def make_head(width: int, hidden: int, seed: int) -> torch.nn.Sequential:
    """[..,width] to [..,1]: linear, or with one hidden layer and LeakyReLU(0.2); the same seed, the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not hidden:
            return torch.nn.Sequential(torch.nn.Linear(width, 1))
        return torch.nn.Sequential(
            torch.nn.Linear(width, hidden), torch.nn.LeakyReLU(0.2), torch.nn.Linear(hidden, 1)
        )  # fmt: skip


def head_arrays(head: torch.nn.Module) -> dict[str, np.ndarray]:
    return {PREFIX + name: tensor.detach().cpu().numpy().copy() for name, tensor in head.state_dict().items()}


def load_head(arrays: Mapping[str, np.ndarray]) -> torch.nn.Sequential:
    """The frozen head of a version. Raises PayloadError for arrays that are none."""
    try:
        first = arrays[f"{PREFIX}0.weight"]
        head = make_head(first.shape[1], first.shape[0] if f"{PREFIX}2.weight" in arrays else 0, 0)
        set_head(head, arrays)
    except (KeyError, IndexError, RuntimeError) as error:
        raise PayloadError(f"holds no head: {error}") from error
    return head.eval().requires_grad_(False)


def set_head(head: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises RuntimeError where names or shapes differ."""
    own = {
        name.removeprefix(PREFIX): torch.from_numpy(a.copy()) for name, a in arrays.items() if name.startswith(PREFIX)
    }
    head.load_state_dict(own)


def moments(optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]) -> dict[str, np.ndarray]:
    """Adam's state by parameter name, for `set_moments`."""
    return {
        f"{kind}/{name}": optimizer.state[parameter][kind].detach().cpu().numpy().copy()
        for name, parameter in named.items()
        if parameter in optimizer.state
        for kind in ("exp_avg", "exp_avg_sq", "step")
    }


def set_moments(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter], arrays: Mapping[str, np.ndarray]
) -> None:
    """The inverse of `moments`; parameters without any start anew."""
    optimizer.state.clear()
    for name, parameter in named.items():
        if f"step/{name}" in arrays:
            optimizer.state[parameter] = {
                kind: torch.from_numpy(arrays[f"{kind}/{name}"].copy()).to(
                    "cpu" if kind == "step" else parameter.device
                )
                for kind in ("exp_avg", "exp_avg_sq", "step")
            }
