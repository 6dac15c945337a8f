"""DeepSpeed ZeRO 0 to 3 behind the engine interface, with torch's AdamW.

Owns the DeepSpeed configuration and the way to its partitioned tensors. What is particular here:

* `managed_gradient_accumulation: false`: any number of backwards, then `step()` is the boundary. An update has as many
  passes as its micro-batches need, which DeepSpeed's fixed gradient_accumulation_steps cannot say.
* torch's AdamW (`zero_allow_untested_optimizer`) compiles nothing and is the very optimizer of the plain engine.
* Under ZeRO-3 parameters below PERSISTENT_ELEMENTS stay gathered between forwards (fetching each bias costs more than
  it saves): whoever changes pieces releases those before (`before_swap`) and gathers them again (`after_swap`).
* On a CPU DeepSpeed compiles a small communication op at the first start (40 s, then cached).

Does not own: process groups (learner/distributed.py), canonical files (learner/state.py).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contracts.config.learner import OptimizerConfig
from contracts.errors import ConfigError, LearnerError
from learner.engines.base import Engine, EngineStep, ParamGroup, TensorKind, adamw, create_adam_state, ensure_adam_state
from learner.engines.compiled_op import load_communication_op, path_with_environment

Stage = Literal[0, 1, 2, 3]

PERSISTENT_ELEMENTS = 100_000
"""DeepSpeed's own default."""

_WAY_OUT = "set learner.engine=plain, or install g++ (Debian: apt-get install g++) and run again"


class DeepSpeedUnavailable(LearnerError):
    """DeepSpeed cannot start on this machine; the message names the way out."""


def deepspeed_usable() -> tuple[bool, str]:
    """Whether the DeepSpeed engine can start here, and if not, why not. Does not import deepspeed."""
    if importlib.util.find_spec("deepspeed") is None:
        return False, "the package deepspeed is not installed"
    if torch.cuda.is_available():
        return True, ""  # NCCL communicates, and torch's AdamW steps: nothing is compiled
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        return False, "no C++ compiler (g++): on a CPU DeepSpeed compiles its communication op"
    if shutil.which("ninja", path=path_with_environment()) is None:
        return False, "no ninja: on a CPU DeepSpeed compiles its communication op with it"
    return True, ""


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine at ZeRO `stage`. The process group must exist (learner/distributed.py)."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        config: OptimizerConfig,
        world_size: int = 1,
        *,
        stage: Stage = 1,
        dtype: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Raises DeepSpeedUnavailable, or ConfigError for bf16 at stage 0."""
        check_stage(stage, dtype)
        usable, reason = deepspeed_usable()
        if not usable:
            raise DeepSpeedUnavailable(f"the DeepSpeed engine cannot start: {reason}; {_WAY_OUT}")
        _prepare_process()
        load_communication_op()
        super().__init__(groups, config, world_size)
        self.stage, self.dtype = stage, dtype
        if dtype == "bf16":
            self._dtypes = dict.fromkeys(self._dtypes, torch.bfloat16)
        tensors = [(group.named.values(), group.lr_scale) for group in groups if group.named]
        self._base = adamw(tensors, config, _ClippingAdamW if stage == 0 else torch.optim.AdamW)
        if isinstance(self._base, _ClippingAdamW):
            self._base.max_norm = config.clip_grad_norm
        self._deepspeed = _initialize(module, self._base, _settings(stage, dtype, config, world_size))
        self.module = self._deepspeed

    @property
    def communicates_in_backward(self) -> bool:
        return self.stage >= 2

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss)

    def step(self) -> EngineStep:
        lr = self._set_lr(self._adamw())
        self._deepspeed.step()
        norm = self._base.grad_norm if isinstance(self._base, _ClippingAdamW) else self._zero._global_grad_norm
        grad_norm = float(norm)
        # ZeRO leaves its weights alone when the norm is not finite, and reports it as infinite or -1
        finite = 0 <= grad_norm < float("inf") and not bool(getattr(self._zero, "overflow", False))
        if finite:
            self.optimizer_steps += 1
        return EngineStep(grad_norm=grad_norm if finite else float("nan"), lr=lr, finite=finite)

    def zero_grad(self) -> None:
        if self.stage == 0:
            self._deepspeed.zero_grad()
            return
        self._zero.zero_grad(set_to_none=True)
        self._forget_accumulated()

    def full_tensor(self, name: str, kind: TensorKind) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        param = self._named[name]
        if kind != "param" and not self._has_moments():
            return torch.zeros(self._shapes[name], device=self._deepspeed.device)
        if self.stage == 0:
            return param.detach() if kind == "param" else self._base.state[param][kind]
        full = safe_get_full_fp32_param(param) if kind == "param" else safe_get_full_optimizer_state(param, kind)
        return full.detach().view(self._shapes[name])

    @torch.no_grad()
    def load_full(self, name: str, kind: TensorKind, tensor: Tensor) -> None:
        param = self._named[name]
        tensor = tensor.to(self._deepspeed.device, torch.float32)
        if kind != "param":
            self._create_moments()
        if self.stage == 0:
            (param if kind == "param" else self._base.state[param][kind]).copy_(tensor)
        elif self.stage == 3:
            self._load_partition(name, kind, tensor)
        else:
            param.set_full_hp_param(tensor, None if kind == "param" else kind)  # type: ignore[attr-defined]
            if kind == "param":
                param.copy_(tensor)

    def local_live(self, name: str) -> Tensor:
        param = self._named[name]
        return param.ds_tensor if self.stage == 3 else param  # type: ignore[attr-defined]

    def local_master(self, name: str) -> Tensor:
        if self.stage == 3:
            return self._zero.get_local_fp32_param(self._named[name])
        if self.dtype == "bf16":  # ZeRO-1 and 2 split masters without regard to parameters: collect the whole one
            return self.full_tensor(name, "param")
        return self._named[name]  # fp32 weights are what their masters are

    def local_to_full(self, name: str, local: Tensor) -> Tensor:
        if self.stage != 3:
            return super().local_to_full(name, local)
        pieces = [torch.empty_like(local) for _ in range(self.world_size)]
        torch.distributed.all_gather(pieces, local.contiguous())
        return torch.cat(pieces)[: self._numel(name)].view(self._shapes[name])

    def full_to_local(self, name: str, full: Tensor) -> Tensor:
        if self.stage != 3:
            return full
        piece = self.local_live(name).numel()
        padded = torch.zeros(piece * self.world_size, dtype=full.dtype, device=full.device)
        padded[: full.numel()] = full.reshape(-1)
        rank = torch.distributed.get_rank()
        return padded[rank * piece : (rank + 1) * piece].clone()

    def before_swap(self) -> None:
        if self.stage == 3:
            self._zero._partition_all_parameters()

    def after_swap(self) -> None:
        if self.stage == 3 and self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _zero(self) -> Any:
        return self._deepspeed.optimizer

    def _adamw(self) -> torch.optim.Optimizer:
        return self._zero.optimizer if self.stage > 0 else self._base

    def _numel(self, name: str) -> int:
        return torch.Size(self._shapes[name]).numel()

    def _has_moments(self) -> bool:
        return any("exp_avg" in state for state in self._adamw().state.values())

    def _create_moments(self) -> None:
        ensure_adam_state(self._adamw())
        if self.stage == 3:  # whose optimizer is lent its pieces only while it steps
            create_adam_state(self._adamw(), self._zero.fp32_partitioned_groups_flat)
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()

    def set_optimizer_steps(self, steps: int) -> None:
        self._create_moments()
        super().set_optimizer_steps(steps)

    def _load_partition(self, name: str, kind: TensorKind, tensor: Tensor) -> None:
        local = self.full_to_local(name, tensor)
        self._zero.set_local_hp_param(local, self._named[name], None if kind == "param" else kind)
        if kind == "param":
            self.local_live(name).copy_(local)
            param = self._named[name]
            if tuple(param.shape) == self._shapes[name]:  # it stays gathered
                param.copy_(tensor)

    def _forget_accumulated(self) -> None:
        """Drop what ZeRO has accumulated beside `.grad`, so that an update can start again."""
        zero = self._zero
        for name in ("averaged_gradients", "all_grad_tensors"):
            for key in getattr(zero, name, {}):
                getattr(zero, name)[key] = None
        if hasattr(zero, "_release_preflattened_grad_buffers"):
            zero._release_preflattened_grad_buffers()
        if hasattr(zero, "clear_hp_grads"):
            zero.clear_hp_grads()
        if hasattr(zero, "micro_step_id"):
            zero.micro_step_id = 0 if self.stage == 3 else -1
            zero._epilogue_ran_this_backward = False


class _ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm, remembers it and refuses a gradient that is not finite.

    For ZeRO-0, where DeepSpeed hands averaged gradients to the optimizer as they are.
    """

    grad_norm = 0.0
    max_norm: float | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for tensor in tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors])
        self.grad_norm = float(norm)
        if self.grad_norm < float("inf"):
            if self.max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(tensors, self.max_norm, norm)
            super().step(closure)


def check_stage(stage: int, dtype: str) -> None:
    """Raises ConfigError for bf16 at ZeRO-0, whose losses differ from those of every other stage."""
    if stage == 0 and dtype == "bf16":
        raise ConfigError(
            "learner.zero_stage", "0 keeps no fp32 master weights in bf16 and trains differently from all other stages",
            "use learner.zero_stage=1, which costs nothing more on one rank",
        )  # fmt: skip


def _settings(stage: int, dtype: str, config: OptimizerConfig, world_size: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if stage == 0 else (config.clip_grad_norm or 0.0),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": stage == 2 and torch.cuda.is_available(),
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _prepare_process() -> None:
    """What DeepSpeed finds out for itself with a warning, or not at all. Before it is imported."""
    os.environ["PATH"] = path_with_environment()  # ninja stands beside the interpreter; a worker's PATH may lack it
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # one a collective call of DeepSpeed's
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the import sets it
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine
