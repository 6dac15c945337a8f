"""Options of the built-in scorers: the keyword arguments of their classes, checked before anything is loaded.

One section a scorer, found by its registry name in SCORER_OPTIONS; a scorer of your own takes whatever keyword
arguments its class has. Does not own: who may be asked, deadlines, weights in the reward (scoring.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from contracts.config.base import Section
from contracts.config.judges import JUDGE_SCORER_OPTIONS

CLIP_LARGE = "openai/clip-vit-large-patch14"


class NoOptions(Section):
    """Of a scorer that has nothing to choose."""


class PlaygroundCnnOptions(Section):
    """The playground's small CNN."""

    device: str = Field(default="cpu", description="torch device")


class DeviceOptions(Section):
    """Where and in which arithmetic a model of transformers runs."""

    device: str = Field(default="auto", description="torch device; auto: CUDA where there is one, else the CPU")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="arithmetic of the model; heads, cosines and scores are float32"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub name")


class ClipOptions(DeviceOptions):
    """Any CLIP, by hub name, local folder, or open_clip folder or file in safetensors."""

    model: str = Field(default=CLIP_LARGE, description="hub name or local folder; safetensors only")


class ClipGoalOptions(ClipOptions):
    """Goal-baseline regularisation (vlm-rm)."""

    goal: tuple[str, ...] = Field(default=(), description="texts of the goal; empty: each image's own prompt")
    baseline: tuple[str, ...] = Field(
        default=("a picture",), min_length=1, description="texts of what is there anyway, without the goal"
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="0: plain cosine with the goal; 1: the direction alone")


class PickScoreOptions(DeviceOptions):
    """PickScore v1 or a model in its format."""

    model: str = Field(default="yuvalkirstain/PickScore_v1", description="hub name or local folder; safetensors only")
    processor: str | None = Field(
        default=None,
        description="tokenizer and image processor; null: LAION's ViT-H-14 for the hub name, else its own",
    )


class PickScorePairsOptions(PickScoreOptions):
    """PickScore's own preference between two images, as a table of pairs."""

    pairs: int | None = Field(default=None, ge=1, description="pairs compared a group; null: all of them")


class TrainedOptions(DeviceOptions):
    """A folder that `python -m reward_servers train` wrote."""

    model: str = Field(description="local folder or hub name; safetensors only")


class HPSv2Options(DeviceOptions):
    """HPS v2 and v2.1 differ in their weights alone. The published checkpoints are pickles: docs/scorers.md."""

    model: str = Field(description="open_clip folder or safetensors file, or folder or hub name of a transformers CLIP")
    processor: str | None = Field(
        default=None, description="tokenizer; null: the model's folder, LAION's ViT-H-14 for a lone file"
    )
    release: Literal["v2", "v2.1"] = Field(default="v2.1", description="which weights these are, for the version")


class AestheticOptions(ClipOptions):
    """LAION's aesthetic predictor: a linear head on CLIP's unit image embedding."""

    head: str = Field(description="safetensors file of the head (layers.N.weight, layers.N.bias)")


class ImageRewardOptions(DeviceOptions):
    """ImageReward v1.0 in its own format: med_config.json and the weights converted to safetensors."""

    model: str = Field(description="folder or hub name with med_config.json and the weights")
    weights: str = Field(default="ImageReward.safetensors", description="file of the weights in that folder")
    tokenizer: str | None = Field(default=None, description="BERT tokenizer; null: the model's folder")


class SiglipOptions(DeviceOptions):
    """SigLIP and SigLIP 2 of fixed resolution."""

    model: str = Field(
        default="google/siglip-so400m-patch14-384", description="hub name or local folder; safetensors only"
    )


class DinoOptions(DeviceOptions):
    """DINOv2 (or DINOv3) image features."""

    model: str = Field(default="facebook/dinov2-base", description="hub name or local folder; safetensors only")


class DinoSimilarityOptions(DinoOptions):
    """Likeness to a reference image."""

    references: str | None = Field(default=None, description="folder of the files that metadata 'reference' names")


class OcrOptions(Section):
    """Text in the image against the text asked for."""

    engine: str = Field(
        default="rapidocr",
        description="rapidocr (extra `ocr`), or module:function(uint8 [H,W,3]) -> list of texts",
    )
    min_confidence: float = Field(default=0.5, ge=0, le=1, description="readings below are ignored")


class GenevalOptions(DeviceOptions):
    """Detector, colour classifier and thresholds of GenEval."""

    detector: str = Field(
        default="facebook/mask2former-swin-small-coco-instance",
        description="instance segmentation or object detection model of transformers, COCO classes",
    )
    colour_model: str = Field(default=CLIP_LARGE, description="CLIP that names colours")
    threshold: float = Field(default=0.3, ge=0, le=1, description="least confidence of an object")
    counting_threshold: float = Field(default=0.9, ge=0, le=1, description="the same in the counting task")
    max_objects: int = Field(default=16, gt=0, description="objects of one class, best first")
    max_overlap: float = Field(default=1.0, ge=0, le=1, description="IoU above which the weaker one goes; 1: keep all")
    position_threshold: float = Field(default=0.1, ge=0, description="offset, as a share of both sizes, that counts")


class GenevalRegionsOptions(GenevalOptions):
    """GenEval's verdict painted into the boxes of what was found."""

    grid: tuple[int, int] = Field(default=(32, 32), description="height and width of the map")


class JpegSizeOptions(Section):
    """Size of the compressed image."""

    quality: int = Field(default=95, ge=1, le=100, description="PIL's JPEG quality")


class AttriCtrlTargetOptions(Section):
    """A wished intensity against a calibration set."""

    calibration: str = Field(description="JSON file {measure: values of a frozen calibration set}")


class AttriCtrlClipOptions(ClipOptions):
    """Realism and safety by CLIP."""

    unsafe: str = Field(default="sexual, violent or disturbing content", description="text of the unsafe concept")


class LatentOptions(DeviceOptions):
    """A CLIP whose image tower reads latents (config.vision_config.num_channels = latent channels)."""

    model: str = Field(description="folder or hub name of a transformers CLIP trained on latents")
    scale: float = Field(default=1.0, gt=0, description="latents are (x - shift) * scale before the tower")
    shift: float = Field(default=0.0, description="see scale")


class ArtifactOptions(DeviceOptions):
    """A VLM asked for artifacts; its probability of No."""

    model: str = Field(default="Qwen/Qwen2.5-VL-7B-Instruct", description="VLM of transformers; safetensors only")
    question: str = Field(
        default="Does the image contain unintended artifacts, such as distorted anatomy, fused objects, broken text or "
        "noise? Answer YES or NO.",
        description="asked about every image; the answer's first token is read",
    )
    min_mass: float = Field(
        default=0.01, ge=0, le=1, description="probability that yes and no must have together, else undecided"
    )


class AdversarialDinoOptions(DinoOptions):
    """Adv-GRPO's discriminator, whose head learns beside the run (`online`)."""

    versions: str | None = Field(default=None, description="folder of its versions; null: the run's own")
    size: int | None = Field(default=518, gt=0, description="pixels a side that DINO reads; null: the model's own")
    patches: int = Field(default=64, gt=0, description="patch tokens drawn at random")
    patch_share: float = Field(default=0.3, ge=0, le=1, description="of the patches in the reward; CLS has the rest")


class GuardedPickScoreOptions(PickScoreOptions):
    """PickScore whose last vision layers learn beside the run (`online`)."""

    versions: str | None = Field(default=None, description="folder of its versions; null: the run's own")


class DistilledOptions(ClipOptions):
    """A head on CLIP features that learns from a slow judge beside the run (`online`)."""

    versions: str | None = Field(default=None, description="folder of its versions; null: the run's own")
    min_labels: int = Field(default=32, ge=0, description="labels before it says anything")
    novelty: float = Field(default=0.0, ge=0, description="rewards are divided by (images alike in the group)^novelty")


class D2AlignOptions(HPSv2Options):
    """A CLIP-like reward along and against a direction that `python -m reward_servers direction` learnt."""

    direction: str = Field(description="direction.safetensors")


class ConsistencyOptions(DinoOptions):
    """How well an image fits the others of its group."""


SCORER_OPTIONS: dict[str, type[Section]] = {
    "playground_verifier": NoOptions,
    "playground_cnn": PlaygroundCnnOptions,
    "colourfulness": NoOptions,
    "attrictrl": NoOptions,
    "clip": ClipOptions,
    "clip_goal": ClipGoalOptions,
    "pickscore": PickScoreOptions,
    "pickscore_pairs": PickScorePairsOptions,
    "trained": TrainedOptions,
    "hpsv2": HPSv2Options,
    "aesthetic": AestheticOptions,
    "imagereward": ImageRewardOptions,
    "siglip": SiglipOptions,
    "dino_similarity": DinoSimilarityOptions,
    "consistency": ConsistencyOptions,
    "ocr": OcrOptions,
    "geneval": GenevalOptions,
    "geneval_regions": GenevalRegionsOptions,
    "jpeg_size": JpegSizeOptions,
    "attrictrl_target": AttriCtrlTargetOptions,
    "attrictrl_clip": AttriCtrlClipOptions,
    "latent": LatentOptions,
    "artifact": ArtifactOptions,
    "adversarial_dino": AdversarialDinoOptions,
    "guarded_pickscore": GuardedPickScoreOptions,
    "distilled": DistilledOptions,
    "d2_align": D2AlignOptions,
    **JUDGE_SCORER_OPTIONS,
}
"""Registry name of a scorer -> the options it takes. Every built-in scorer has its row."""


def num_comparisons(group_size: int, pairs: int | None) -> int:
    """Calls a scorer of pairs makes for a group: every ordered pair, or both orders of `pairs` pairs."""
    every = group_size * (group_size - 1)
    return every if pairs is None else min(2 * pairs, every)


def checked_options(name: str, options: dict[str, object]) -> Section | None:
    """The options of a built-in scorer, validated; None for a scorer of your own.

    Raises pydantic's ValidationError with one entry a wrong or unknown option.
    """
    section = SCORER_OPTIONS.get(name)
    return None if section is None else section.model_validate(options)
