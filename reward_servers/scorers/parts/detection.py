"""Objects in an image by a detector of transformers: instance segmentation (Mask2Former) or boxes (DETR and its kin).

Reads the network's outputs itself, since post-processing merges overlapping instances, which a count must not.
Does not own: which objects a prompt asks for (geneval.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from contracts.config.scorers import GenevalOptions
from contracts.errors import ConfigError
from reward_servers.scorers.parts import loading
from reward_servers.scorers.parts.geneval_rules import Detected

_MOST = 100  # candidates an image, as in Mask2Former's own instance inference


class Detector:
    """Loads by the architecture named in config.json. Raises ConfigError for one that is no detector."""

    def __init__(self, source: str, options: GenevalOptions) -> None:
        from transformers import AutoConfig, AutoImageProcessor
        from transformers import AutoModelForObjectDetection as ForBoxes
        from transformers import AutoModelForUniversalSegmentation as ForMasks

        config = loading.load_tool(AutoConfig, source, options)
        kind = " ".join(getattr(config, "architectures", None) or [])
        self.segments = "UniversalSegmentation" in kind
        if not self.segments and "ObjectDetection" not in kind:
            raise ConfigError("detector", f"{source} is a {kind or config.model_type}, no detector",
                              "a model for universal segmentation or object detection")  # fmt: skip
        auto = ForMasks if self.segments else ForBoxes
        self.network = loading.load_network(auto, source, options)
        self.processor = loading.load_tool(AutoImageProcessor, source, options, backend="pil")
        self.names = {int(index): str(name) for index, name in self.network.config.id2label.items()}

    def __call__(self, image: np.ndarray) -> list[Detected]:
        """All candidates in uint8 [H,W,3], most confident first."""
        inputs = self.processor(images=Image.fromarray(image), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.network.device, self.network.dtype)
        with torch.no_grad():
            output = self.network(pixel_values=pixels)
        found = self._segmented(output, image) if self.segments else self._boxed(output, image)
        return sorted(found, key=lambda one: -one.score)

    def _segmented(self, output: Any, image: np.ndarray) -> list[Detected]:
        """Score = class probability x mean mask probability inside the mask (Mask2Former, section 4.1)."""
        probabilities = output.class_queries_logits[0].float().softmax(dim=-1)[:, :-1]
        logits = output.masks_queries_logits[:1].float()
        masks = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)[0]
        num_classes = probabilities.shape[1]
        scores, flat = probabilities.flatten().topk(min(_MOST, probabilities.numel()))
        found = []
        for score, index in zip(scores.tolist(), flat.tolist(), strict=True):
            logit = masks[index // num_classes]
            inside = logit > 0
            if inside.any():
                sure = float(logit.sigmoid()[inside].mean())
                mask = inside.cpu().numpy()
                found.append(Detected(self.names[index % num_classes], score * sure, box_of(mask), mask))
        return found

    def _boxed(self, output: Any, image: np.ndarray) -> list[Detected]:
        """The best class of each query; boxes are (centre x, centre y, width, height) as shares of the image."""
        logits, boxes = output.logits[0].float(), output.pred_boxes[0].float()
        background = logits.shape[-1] > len(self.names)  # DETR: softmax with a class for nothing; later ones: sigmoids
        probabilities = logits.softmax(dim=-1)[:, : len(self.names)] if background else logits.sigmoid()
        height, width = image.shape[:2]
        found = []
        for (score, label), (x, y, w, h) in zip(
            [(float(row.max()), int(row.argmax())) for row in probabilities], boxes.tolist(), strict=True
        ):
            box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            found.append(Detected(self.names[label], score, box))
        return found


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask that is not empty; its far edges lie one beyond the last pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
