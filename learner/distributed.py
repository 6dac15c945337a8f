"""The process group of the ranks: who finds whom, and how long a collective may take.

A rank that died makes the others' collectives fail at once (gloo) or within the timeout (NCCL); a rank that hangs is
found by the timeout alone. DeepSpeed makes process groups of its own and honours no timeout it is given, so torch's
default is set as well.

Does not own: rebuilding the ranks (cluster/controller.py).
"""

from __future__ import annotations

import os
import zlib
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from contracts.config import RunConfig
from contracts.errors import LearnerError


def init_distributed(config: RunConfig, rank: int, world_size: int) -> None:
    """Join the process group; does nothing where one exists, or where a single plain rank needs none.

    Several ranks meet through MASTER_ADDR and MASTER_PORT in the environment; a single one needs neither.
    """
    if dist.is_initialized() or (world_size == 1 and config.learner.engine == "plain"):
        return
    timeout = timedelta(seconds=config.learner.hang_timeout_s)
    set_default_timeout(timeout)
    backend = "nccl" if config.learner.gpus_per_rank > 0 and torch.cuda.is_available() else "gloo"
    if world_size == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even where there is one rank
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)


def set_default_timeout(timeout: timedelta) -> None:
    """The timeout of every process group made from now on, by whomever."""
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    dist.constants.default_pg_timeout = timeout


def sum_over_ranks(values: Tensor, world_size: int) -> Tensor:
    """The sum of `values` over ranks, in place. Collective."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, world_size: int, device: torch.device) -> bool:
    """Whether `flag` is set on any rank. Collective."""
    if world_size == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device), world_size) > 0)


def check_same_names(names: list[str], world_size: int, device: torch.device) -> None:
    """Raises LearnerError where ranks are about to add up metrics of different names. Collective."""
    if world_size == 1:
        return
    own = zlib.crc32("\n".join(names).encode())
    bounds = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if int(bounds[0]) != -int(bounds[1]):
        raise LearnerError(f"ranks report different metrics; this one: {', '.join(names)}")


def barrier(world_size: int) -> None:
    """Wait for all ranks. Collective."""
    if world_size > 1:
        dist.barrier()
