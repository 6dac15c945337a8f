"""SD3, SD3.5 and the playground's small model: any diffusers StableDiffusion3Pipeline folder, with or without T5.

Sizes, scaling and shift factors are read from the folder's own configurations. Prompts are encoded by the pipeline's
own `encode_prompt`, so an exported model sees what training saw. Only safetensors from local folders are read.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contracts.errors import ConfigError
from policy.cpu_kernels import last_key_stands_for, repeated_tail
from policy.families.base import Family
from policy.types import EmbeddingBatch, PromptEmbedding

_NETWORK = "transformer"
_T5_TOKENS = 256
_TIMESTEPS = 1000.0
_OPTIONAL = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")


class SD3Family(Family):
    """One StableDiffusion3Pipeline folder."""

    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(folder, dtype, device)
        self._index = _read_json(folder, "model_index.json")
        if self._index.get("_class_name") != "StableDiffusion3Pipeline":
            name = self._index.get("_class_name")
            raise ConfigError("model.path", f"{folder} holds a {name}", "family sd3 takes a StableDiffusion3Pipeline")
        self._network_config = _read_json(folder / _NETWORK, "config.json")
        self._vae_config = _read_json(folder / "vae", "config.json")
        size, channels = self._network_config["sample_size"], self._network_config["in_channels"]
        self.latent_shape = (channels, size, size)
        scale = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        self.image_size = (size * scale, size * scale)
        self.feature_dim = self._network_config["num_attention_heads"] * self._network_config["attention_head_dim"]
        self._lock = threading.Lock()

    # -- the network

    def load_network(self, folder: Path | None = None) -> nn.Module:
        folder = folder or self.folder
        subfolder = _NETWORK if (folder / _NETWORK).is_dir() else None
        with _quietly():
            from diffusers import SD3Transformer2DModel

            return SD3Transformer2DModel.from_pretrained(
                folder, subfolder=subfolder, dtype=self.dtype, use_safetensors=True, local_files_only=True
            )

    def forward(self, module: nn.Module, x: Tensor, s: Tensor, cond: EmbeddingBatch) -> Tensor:
        # Without T5 its tokens are zeros, which carry no position: one of them does for all.
        repeats = repeated_tail(cond.text) if self.merge_repeats else 1
        with last_key_stands_for(repeats):
            return module(
                hidden_states=x,
                timestep=s * _TIMESTEPS,
                encoder_hidden_states=cond.text[:, : cond.text.shape[1] - repeats + 1],
                pooled_projections=cond.pooled,
                return_dict=False,
            )[0]

    def feature_layer(self, network: nn.Module) -> nn.Module:
        return network.get_submodule("norm_out")

    def dummy_embedding(self, generator: torch.Generator, tokens: int) -> PromptEmbedding:
        width, pooled = self._network_config["joint_attention_dim"], self._network_config["pooled_projection_dim"]
        return PromptEmbedding(
            torch.randn(tokens, width, generator=generator), torch.randn(pooled, generator=generator)
        )

    # -- prompts

    def encode_prompt(self, text: str) -> PromptEmbedding:
        with torch.no_grad():
            states, _, pooled, _ = self._text_pipeline.encode_prompt(
                prompt=text, prompt_2=text, prompt_3=text, device=self.device, do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )  # fmt: skip
        return PromptEmbedding(states[0].float().cpu(), pooled[0].float().cpu())

    @cached_property
    def max_sequence_length(self) -> int:
        """T5 tokens: what the folder's salon.json says, else the pipeline's default, else what its tokenizer allows."""
        card = self.folder / "salon.json"
        if card.is_file():
            length = json.loads(card.read_text()).get("max_sequence_length")
            if length is not None:
                return int(length)
        tokenizer = getattr(self._text_pipeline, "tokenizer_3", None)
        return min(_T5_TOKENS, tokenizer.model_max_length) if tokenizer is not None else _T5_TOKENS

    @property
    def _text_pipeline(self) -> Any:
        with self._lock:
            return self._loaded_text_pipeline

    @cached_property
    def _loaded_text_pipeline(self) -> Any:
        """The pipeline with its text encoders only; an empty shell of the network gives encode_prompt its widths."""
        with _quietly():
            from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        absent = {name: None for name in _OPTIONAL if not self._has(name)}
        with torch.device("meta"):
            shell = SD3Transformer2DModel.from_config(self._network_config)
        with _quietly():
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                self.folder, transformer=None, vae=None, dtype=self.dtype, use_safetensors=True,
                local_files_only=True, **absent,
            )  # fmt: skip
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                encoder.requires_grad_(False).eval().to(self.device)
        pipeline.register_modules(transformer=shell)
        return pipeline

    def _has(self, name: str) -> bool:
        declared = self._index.get(name) or [None]
        return declared[0] is not None and (self.folder / name).is_dir()

    # -- images

    @property
    def _vae(self) -> Any:
        with self._lock:
            return self._loaded_vae

    @cached_property
    def _loaded_vae(self) -> Any:
        """In fp32 whatever the compute dtype: half precision overflows in SD3's decoder and blurs the jury's images."""
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(
            self.folder, subfolder="vae", dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        return vae.requires_grad_(False).eval().to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        config = self._vae_config
        unscaled = latents.float() / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
        return self._vae.decode(unscaled, return_dict=False)[0]

    def encode(self, images: Tensor) -> Tensor:
        config = self._vae_config
        latents: Tensor = self._vae.encode(images.float()).latent_dist.mode()
        return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    # -- export

    def save_lora(self, folder: Path, tensors: dict[str, Tensor], adapter: dict[str, object]) -> None:
        from diffusers import StableDiffusion3Pipeline

        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=adapter, safe_serialization=True
        )

    def save_pipeline(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(_NETWORK, "*.bin", "*.ckpt"))
        network: Any = self.load_network()
        parameters = dict(network.named_parameters())
        assert parameters.keys() == tensors.keys(), "an export holds every parameter of the network"
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        network.save_pretrained(folder / _NETWORK, safe_serialization=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars and remarks on optional packages: many processes load at once and share one terminal."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, shown) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if shown:
                log.enable_progress_bar()


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text())
    except OSError as error:
        raise ConfigError(
            "model.path", f"{folder / name} cannot be read ({error.strerror})", "give a local diffusers pipeline folder"
        ) from error
    except ValueError as error:
        raise ConfigError("model.path", f"{folder / name} is not valid JSON") from error
