"""Weights across a process boundary: export to arrays, strict load, digest of live tensors, canary (law 5).

Names are canonical (those of the bare network), dtypes are the live ones: bfloat16 travels as uint16 bits, named in
`dtypes`. Does not own: transport (cluster), the decision that a load is proven (actors/painter.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from contracts.errors import WeightsError
from contracts.seeds import Stream, derive_seed
from policy.digests import digest_tensors, dtype_name
from policy.policy import Policy
from policy.types import EmbeddingBatch

_RAW_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_NUMPY_NAMES = {
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
}  # fmt: skip
_CANARY_LEVELS = (0.9, 0.4)
_CANARY_TOKENS = 8
_CANARY_SIDE = 32


def export_arrays(named: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays on the host, true dtypes of those stored as raw bits). The arrays are copies, safe to keep."""
    arrays, dtypes = {}, {}
    for name, tensor in named.items():
        host = tensor.detach().to("cpu", copy=True).contiguous()
        if dtype_name(host.dtype) not in _NUMPY_NAMES:
            dtypes[name] = dtype_name(host.dtype)
            host = host.view(_RAW_BITS[host.element_size()])
        arrays[name] = host.numpy()
    return arrays, dtypes


@torch.no_grad()
def load_arrays(policy: Policy, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> None:
    """Copy every array into the live parameter of its name.

    Nothing is changed unless all names, shapes and dtypes agree: raises WeightsError naming what does not.
    """
    live = policy.trainable()
    problems = _mismatches(live, arrays, dtypes)
    if problems:
        raise WeightsError(f"weights do not fit the policy: {'; '.join(problems[:5])} ({len(problems)} in all)")
    for name, parameter in live.items():
        _copy_bits(parameter.detach(), np.asarray(arrays[name]))


def _mismatches(live: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> list[str]:
    problems = [f"{name} is missing" for name in live if name not in arrays]
    problems += [f"{name} is unknown" for name in arrays if name not in live]
    for name, tensor in live.items():
        if name not in arrays:
            continue
        if tuple(arrays[name].shape) != tuple(tensor.shape):
            problems.append(f"{name} has shape {tuple(arrays[name].shape)}, not {tuple(tensor.shape)}")
        given = dtypes.get(name, arrays[name].dtype.name)
        if given != dtype_name(tensor.dtype):
            problems.append(f"{name} is {given}, the live tensor {dtype_name(tensor.dtype)}")
    return problems


def _copy_bits(target: Tensor, array: np.ndarray) -> None:
    """Arrays read from shared memory are read-only, which torch.from_numpy warns of: on the CPU numpy does the copy."""
    bits = target.view(_RAW_BITS[target.element_size()])
    array = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    if target.device.type == "cpu" and bits.is_contiguous():
        np.copyto(bits.numpy(), array)
    else:
        bits.copy_(torch.from_numpy(array.copy()))


def live_digest(policy: Policy) -> str:
    """Digest of the trained parameters as they are in memory now; equals digest_arrays of their export."""
    return digest_tensors(policy.trainable())


@torch.no_grad()
def canary(policy: Policy, module: nn.Module | None = None) -> np.ndarray:
    """fp32 [2,C,h',w']: what the live network answers to fixed, seeded inputs (at most 32 x 32 latents).

    It sees what a digest of tensors cannot: adapters that are switched off or scaled to nothing.
    """
    generator = torch.Generator().manual_seed(derive_seed(0, Stream.CANARY))
    channels, height, width = policy.latent_shape
    shape = (len(_CANARY_LEVELS), channels, min(height, _CANARY_SIDE), min(width, _CANARY_SIDE))
    x = torch.randn(shape, generator=generator).to(policy.device)
    embeddings = [policy.family.dummy_embedding(generator, _CANARY_TOKENS) for _ in _CANARY_LEVELS]
    cond = EmbeddingBatch.stack(embeddings, policy.device, policy.dtype)
    levels = torch.tensor(_CANARY_LEVELS, device=policy.device)
    return policy.velocity(x, levels, cond, module=module).cpu().numpy()
