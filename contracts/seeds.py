"""Seeds by name: every random number of a run is derived from (run seed, stream, ids), never drawn in sequence.

So a group can be painted again, a resumed run repeats itself, and no result depends on which worker did what when.
Does not own: generators (numpy in callers, torch.Generator in policy).
"""

from __future__ import annotations

import hashlib
from enum import StrEnum


class Stream(StrEnum):
    """What a random number is for. Two streams never share numbers."""

    INIT_NOISE = "init_noise"  # x at s=1 of a sample
    STEP_NOISE = "step_noise"  # z of one denoising step of a sample
    WINDOW = "window"  # start of a group's stochastic window
    TRAIN_TIME = "train_time"  # times s drawn by forward-process objectives
    TRAIN_NOISE = "train_noise"  # noise drawn by forward-process objectives
    TRUNCATION = "truncation"  # truncation index of reward back-propagation
    SHUFFLE = "shuffle"  # order of micro-batches within a step
    PROMPTS = "prompts"
    EVAL = "eval"
    CANARY = "canary"
    MODEL_INIT = "model_init"  # LoRA and critic initialisation
    ONLINE = "online"  # heads, references and labels drawn by reward models that learn beside the run


def derive_seed(run_seed: int, stream: Stream, *ids: int) -> int:
    """A 63-bit seed from (run_seed, stream, ids), by BLAKE2b; equal inputs give equal seeds on every machine.

    Example: derive_seed(0, Stream.STEP_NOISE, group_id, sample_index, step)
    """
    text = ":".join([str(int(run_seed)), stream.value, *(str(int(i)) for i in ids)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
