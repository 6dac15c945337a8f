"""The tensors that travel through the policy: prompt embeddings, one or a batch, and painted trajectories.

Does not own: the wire format of groups (contracts.wire), how embeddings are made (families/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbedding:
    """One prompt, detached, on the CPU, fp32. text [L,D]: token states; pooled [Dp]: the sentence."""

    text: Tensor
    pooled: Tensor

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The two arrays a vault stores under the prompt's digest."""
        return {"text": self.text.numpy(), "pooled": self.pooled.numpy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PromptEmbedding:
        """The inverse of to_arrays. Copies, because arrays read from shared memory are read-only."""
        return cls(
            torch.from_numpy(np.array(arrays["text"], dtype=np.float32)),
            torch.from_numpy(np.array(arrays["pooled"], dtype=np.float32)),
        )


@dataclass(frozen=True)
class EmbeddingBatch:
    """N prompts on the device, in the compute dtype. text [N,L,D], pooled [N,Dp]."""

    text: Tensor
    pooled: Tensor

    @classmethod
    def stack(
        cls, embeddings: Sequence[PromptEmbedding], device: torch.device | str, dtype: torch.dtype
    ) -> EmbeddingBatch:
        """One row an embedding. A prompt that fills the batch is moved once and repeated on the device."""
        first = embeddings[0]
        if all(embedding is first for embedding in embeddings):
            num = len(embeddings)
            text, pooled = first.text.to(device, dtype), first.pooled.to(device, dtype)
            return cls(text.repeat(num, 1, 1), pooled.repeat(num, 1))
        return cls(
            torch.stack([embedding.text for embedding in embeddings]).to(device, dtype),
            torch.stack([embedding.pooled for embedding in embeddings]).to(device, dtype),
        )

    def __len__(self) -> int:
        return self.text.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> EmbeddingBatch:
        return EmbeddingBatch(self.text[rows], self.pooled[rows])

    def join(self, other: EmbeddingBatch) -> EmbeddingBatch:
        """The rows of both, this one's first."""
        return EmbeddingBatch(torch.cat([self.text, other.text]), torch.cat([self.pooled, other.pooled]))

    def repeat_rows(self, times: int) -> EmbeddingBatch:
        """Each row `times` times in succession: [N,..] -> [N*times,..], sample-major as replay lays out its rows."""
        if times == 1:
            return self
        return EmbeddingBatch(self.text.repeat_interleave(times, 0), self.pooled.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Trajectory:
    """One painted micro-batch of N samples with K recorded stochastic steps, on the device.

    clean [N,C,h,w] fp32: final latents x_0; states [N,K+1,C,h,w] in the storage dtype; log_prob_sum [N,K] fp32;
    means [N,K,C,h,w] fp32; previews [N,S,C,h,w] fp32: clean latents that S steps pointed to (contracts.previews).
    What was not recorded is None.
    """

    clean: Tensor
    states: Tensor | None = None
    log_prob_sum: Tensor | None = None
    means: Tensor | None = None
    previews: Tensor | None = None
