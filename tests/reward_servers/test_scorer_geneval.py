"""GenEval: its rules on known detections, and the whole path (detector, colours, verdict) on tiny networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scorer_models import ask, build_clip, build_mask2former, build_yolos, pictures_of, reference_pixels
from transformers import (
    AutoTokenizer,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from contracts.config.scorers import GenevalOptions
from contracts.errors import ConfigError
from contracts.scores import Outcome
from reward_servers.construct import make_scorer
from reward_servers.scorers.geneval import cut_out
from reward_servers.scorers.parts.geneval_rules import (
    COLOURS,
    Detected,
    check_metadata,
    judge,
    kept_objects,
    overlap,
    relations,
)
from reward_servers.scorers.parts.regions import ScoredBox, signed_map

NAMES = ("dog", "cat", "mouse")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPTIONS = GenevalOptions()


def thing(name: str, score: float, *box: float) -> Detected:
    return Detected(name, score, box or (0, 0, 10, 10))  # type: ignore[arg-type]


def rule(
    metadata: dict[str, Any], *objects: Detected, colours: dict[Detected, str] | None = None
) -> tuple[bool, float, str]:
    check_metadata(metadata, NAMES)
    kept = kept_objects(objects, metadata["tag"], OPTIONS)
    verdict = judge(kept, metadata, lambda found, _: [(colours or {}).get(one, "black") for one in found], 0.1)
    return verdict.correct, verdict.fraction, "; ".join(verdict.reasons)


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def test_single_and_two_objects_must_be_there() -> None:
    single = {"tag": "single_object", "include": [clause("dog")]}
    assert rule(single, thing("dog", 0.31))[0]
    assert not rule(single, thing("dog", 0.3))[0], "the threshold itself is not enough"
    assert not rule(single, thing("cat", 0.9))[0]
    two = {"tag": "two_object", "include": [clause("dog"), clause("cat")]}
    assert rule(two, thing("dog", 0.5), thing("cat", 0.5)) == (True, 1.0, "")
    assert rule(two, thing("dog", 0.5)) == (False, 0.5, "expected at least 1 cat, found 0")
    assert rule({"tag": "single_object", "include": [clause("computer mouse")]}, thing("mouse", 0.9))[0]


def test_counting_is_exact_and_wants_sure_objects() -> None:
    three = {"tag": "counting", "include": [clause("dog", 3)], "exclude": [clause("dog", 4)]}
    dogs = [thing("dog", 0.95, i, 0, i + 5, 5) for i in range(4)]
    assert rule(three, *dogs[:3])[0]
    assert rule(three, *dogs[:2])[:2] == (False, 0.5)
    assert rule(three, *dogs)[:2] == (False, 0.5)
    assert rule(three, *dogs[:3], thing("dog", 0.85))[0], "below 0.9 nobody counts"


def test_colours_are_asked_of_the_most_confident_objects() -> None:
    red = {"tag": "colors", "include": [clause("dog", color="red")]}
    sure, unsure = thing("dog", 0.9), thing("dog", 0.5, 20, 20, 30, 30)
    assert rule(red, sure, unsure, colours={sure: "red", unsure: "blue"})[0]
    assert not rule(red, sure, unsure, colours={sure: "blue", unsure: "red"})[0]
    both = {"tag": "color_attr", "include": [clause("dog", color="red"), clause("cat", color="green")]}
    cat = thing("cat", 0.8)
    assert rule(both, sure, cat, colours={sure: "red", cat: "green"})[0]
    assert rule(both, sure, cat, colours={sure: "red", cat: "red"})[:2] == (False, 0.5)


def test_positions_are_of_centres_beyond_a_tenth_of_both_sizes() -> None:
    left = {"tag": "position", "include": [clause("dog"), clause("cat", position=["left of", 0])]}
    dog = thing("dog", 0.9, 50, 0, 70, 20)
    assert rule(left, dog, thing("cat", 0.9, 0, 0, 20, 20))[0]
    assert not rule(left, dog, thing("cat", 0.9, 90, 0, 99, 20))[0]
    assert not rule(left, dog, thing("cat", 0.9, 47, 0, 67, 20))[0], "3 aside is less than a tenth of 20 + 20"
    assert rule(left, thing("cat", 0.9, 0, 0, 20, 20))[2].endswith("nothing for cat to be left of")
    assert relations((0, 0, 10, 10), (100, 0, 110, 10), 0.1) == {"left of"}
    assert relations((0, 0, 10, 10), (0, 100, 10, 110), 0.1) == {"above"}
    assert relations((100, 100, 110, 110), (0, 0, 10, 10), 0.1) == {"right of", "below"}
    assert relations((0, 0, 10, 10), (0, 0, 10, 10), 0.1) == set()


def test_objects_are_limited_and_overlapping_ones_dropped_when_asked() -> None:
    many = [thing("dog", 0.4 + i / 100, i, 0, i + 50, 50) for i in range(20)]
    kept = kept_objects(many, "single_object", OPTIONS)["dog"]
    assert [one.score for one in kept] == sorted((one.score for one in many), reverse=True)[:16]
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    apart = kept_objects(many, "single_object", OPTIONS.model_copy(update={"max_overlap": 0.5}))["dog"]
    assert all(overlap(a.box, b.box) < 0.5 for a in apart for b in apart if a is not b)
    assert apart[0] is kept[0]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "tag"),
        ({"tag": "counting"}, "include"),
        ({"tag": "counting", "include": [clause("unicorn")]}, "unicorn"),
        ({"tag": "counting", "include": [clause("dog", 0)]}, "count"),
        ({"tag": "colors", "include": [clause("dog", color="teal")]}, "teal"),
        ({"tag": "position", "include": [clause("dog", position=["left of", 0])]}, "position"),
        ({"tag": "position", "include": [clause("dog"), clause("cat", position=["beside", 0])]}, "position"),
        ({"tag": "counting", "include": ["dog"]}, "include"),
    ],
)
def test_metadata_that_is_not_genevals_is_named(metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_metadata(metadata, NAMES)


def test_blame_falls_on_the_objects_that_are_wrong() -> None:
    metadata = {"tag": "color_attr", "include": [clause("dog", 2, color="red"), clause("cat", 2)],
                "exclude": [clause("mouse", 1)]}  # fmt: skip
    dogs, cat, mouse = [thing("dog", 0.9), thing("dog", 0.8)], thing("cat", 0.9), thing("mouse", 0.9)
    kept = kept_objects([*dogs, cat, mouse], "color_attr", OPTIONS)
    verdict = judge(kept, metadata, lambda found, name: ["red", "blue"][: len(found)], 0.1)
    assert verdict.right == (dogs[0], cat), "what is too few is right as far as it goes"
    assert verdict.wrong == (dogs[1], mouse)
    assert (verdict.correct, verdict.fraction) == (False, 0.0)


def test_maps_add_up_boxes_and_are_clipped() -> None:
    boxes = [ScoredBox((0, 0, 0.5, 1), 1.0), ScoredBox((0.25, 0, 0.75, 1), -1.0), ScoredBox((0, 0, 0.25, 0.5), 1.0)]
    drawn = signed_map(boxes, (2, 4))
    np.testing.assert_array_equal(drawn, [[1, 0, -1, 0], [1, 0, -1, 0]])
    assert not signed_map([ScoredBox((1.2, 0, 2, 1), 1.0), ScoredBox((0.5, 0.5, 0.5, 0.9), 1.0)], (4, 4)).any()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("geneval")
    return build_mask2former(root / "m2f", NAMES), build_clip(root / "clip"), build_yolos(root / "yolos", NAMES)


def masks_by_hand(folder: Path, image: np.ndarray) -> list[Detected]:
    """Mask2Former's own instance inference, query by query."""
    network = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    pixels = Mask2FormerImageProcessorPil.from_pretrained(folder)(images=Image.fromarray(image), return_tensors="pt")
    with torch.no_grad():
        output = network(pixel_values=pixels["pixel_values"])
    classes = output.class_queries_logits[0].softmax(dim=-1).double().numpy()
    logits = (
        torch.nn.functional.interpolate(
            output.masks_queries_logits, image.shape[:2], mode="bilinear", align_corners=False
        )[0]
        .double()
        .numpy()
    )
    found = []
    for query, row in enumerate(classes):
        inside = logits[query] > 0
        if inside.any():
            sure = (1 / (1 + np.exp(-logits[query][inside]))).mean()
            ys, xs = np.where(inside)
            box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
            found += [Detected(name, float(row[i] * sure), box, inside) for i, name in enumerate(NAMES)]
    return sorted(found, key=lambda one: -one.score)


def colour_by_hand(folder: Path, image: np.ndarray, one: Detected, name: str) -> str:
    network, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    shown = image.copy()
    if one.mask is not None:
        shown[~one.mask] = 153
    x0, y0, x1, y1 = map(int, one.box)
    pixels = reference_pixels(shown[None, y0:y1, x0:x1], 32, 32, MEAN, STD)
    cosines = []
    with torch.no_grad():
        picture = network.get_image_features(pixel_values=pixels)
        picture = getattr(picture, "pooler_output", picture)[0]
        for colour in COLOURS:
            texts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}",
                     f"a photo of a {colour} object"]  # fmt: skip
            features = network.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))
            features = getattr(features, "pooler_output", features)
            mean = torch.nn.functional.normalize(features, dim=1).mean(dim=0)
            cosines.append(float(torch.nn.functional.cosine_similarity(picture, mean, dim=0)))
    return COLOURS[int(np.argmax(cosines))]


def test_the_whole_path_is_what_a_reading_by_hand_gives(models: tuple[Path, Path, Path]) -> None:
    masks, clip, _ = models
    image = pictures_of((48, 60), 1, seed=8)[0]
    found = masks_by_hand(masks, image)
    middle = sorted(one.score for one in found)[len(found) // 2]
    options = [f"detector={masks}", f"colour_model={clip}", f"threshold={middle}", f"counting_threshold={middle}"]
    scorer: Any = make_scorer("geneval", options)
    scorer.load()
    ours = scorer.detector(image)
    assert len(ours) == len(found)
    for one, other in zip(ours, found, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4)
    kept = kept_objects(found, "counting", scorer.options)
    best = max(kept, key=lambda name: len(kept[name]))
    number = len(kept[best])
    seen = colour_by_hand(clip, image, kept[best][0], best)
    other = next(colour for colour in COLOURS if colour != seen)
    metadata: list[dict[str, Any]] = [
        {"tag": "counting", "include": [clause(best, number)], "exclude": [clause(best, number + 1)]},
        {"tag": "counting", "include": [clause(best, number)], "exclude": [clause(best, number)]},
        {"tag": "colors", "include": [clause(best, color=seen)]},
        {"tag": "colors", "include": [clause(best, color=other)]},
        {"tag": "colors", "include": [clause("unicorn")]},
    ]
    table = ask(make_scorer("geneval", options), np.stack([image] * 5), ["p"] * 5, metadata)
    np.testing.assert_array_equal(table.column("correct")[0][:4], [1, 0, 1, 0])
    np.testing.assert_array_equal(table.column("fraction")[0][:4], [1, 0.5, 1, 0])
    assert table.outcomes[:, 0].tolist() == [Outcome.OK] * 4 + [Outcome.FAILED]
    assert f"found {seen}" in table.reasons[3]

    mapper = make_scorer("geneval_regions", [*options, "grid=[6, 5]"])
    regions = ask(mapper, np.stack([image] * 4), ["p"] * 4, metadata[:4])
    x0, y0, x1, y1 = kept[best][0].box
    centres_y, centres_x = (np.arange(6) + 0.5) * 48 / 6, (np.arange(5) + 0.5) * 60 / 5
    inside = ((centres_y >= y0) & (centres_y < y1))[:, None] & ((centres_x >= x0) & (centres_x < x1))[None]
    assert (regions.kind, regions.values.shape) == ("region", (4, 1, 6, 5))
    np.testing.assert_array_equal(regions.values[2, 0], inside.astype(np.float32))
    np.testing.assert_array_equal(regions.values[3, 0], -inside.astype(np.float32))


def test_a_detector_of_boxes_serves_as_well(models: tuple[Path, Path, Path]) -> None:
    _, clip, boxes = models
    image = pictures_of((48, 60), 1, seed=8)[0]
    scorer: Any = make_scorer("geneval", [f"detector={boxes}", f"colour_model={clip}"])
    scorer.load()
    network = YolosForObjectDetection.from_pretrained(boxes).eval()
    processor = YolosImageProcessorPil.from_pretrained(boxes)
    pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = network(pixel_values=pixels)
    theirs = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[image.shape[:2]])[0]
    order = theirs["scores"].argsort(descending=True)
    ours = scorer.detector(image)
    np.testing.assert_allclose([one.score for one in ours], theirs["scores"][order].numpy(), rtol=1e-4)
    np.testing.assert_allclose([one.box for one in ours], theirs["boxes"][order].numpy(), atol=1e-2)
    assert [one.name for one in ours] == [NAMES[int(i)] for i in theirs["labels"][order]]
    beyond = Detected("dog", 0.9, (-5.0, 3.2, 200.0, 20.7))
    np.testing.assert_array_equal(cut_out(image, beyond), image[3:21])


def test_what_is_no_detector_is_refused(models: tuple[Path, Path, Path]) -> None:
    _, clip, _ = models
    with pytest.raises(ConfigError, match="no detector"):
        make_scorer("geneval", [f"detector={clip}", f"colour_model={clip}"]).load()
