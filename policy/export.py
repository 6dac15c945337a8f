"""From a live policy to files that diffusers loads without Salon.

A full policy becomes a pipeline folder, a LoRA policy a `pytorch_lora_weights.safetensors` (or, merged, a folder too).
Does not own: which weights are live (load_arrays first), where runs are written (cluster).
"""

from __future__ import annotations

from pathlib import Path

from policy.adapters import adapter_metadata, merged_parameters
from policy.policy import Policy


def export_pipeline(policy: Policy, folder: str | Path) -> Path:
    """Write the folder for `DiffusionPipeline.from_pretrained`. A LoRA is merged into the weights.

    Raises FileExistsError when the folder exists.
    """
    folder = Path(folder)
    if policy.config.tuning == "lora":
        tensors = merged_parameters(policy.module)
    else:
        tensors = {name: parameter.detach() for name, parameter in policy.module.named_parameters()}
    policy.family.save_pipeline(folder, {name: tensor.cpu() for name, tensor in tensors.items()})
    return folder


def export_lora(policy: Policy, folder: str | Path) -> Path:
    """Write `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(folder)`; alpha is in its metadata.

    Raises ValueError for a policy without LoRA.
    """
    if policy.config.tuning != "lora":
        raise ValueError("the policy has no LoRA: use export_pipeline")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in policy.trainable().items()}
    policy.family.save_lora(folder, tensors, adapter_metadata(policy.module))
    return folder
