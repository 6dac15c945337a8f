"""The one contract of all scorers, over every row of the registry: what it declares is what it is and what it answers.

Scorers with a model get a tiny one in the official format. A new row needs an entry in `options_of`, or none when it
has nothing to load.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from online_kit import adversarial, distilled, flat, guarded, publish, write_references
from reward_helpers import post, score_body, served
from scorer_models import (
    ask,
    build_clip,
    build_dino,
    build_head,
    build_mask2former,
    build_siglip,
    build_vlm,
    pictures_of,
)
from test_scorer_imagereward import write_imagereward

from contracts.config.scorers import SCORER_OPTIONS
from contracts.declarations import ScorerGives
from contracts.registry import Entry, entries, import_target
from contracts.scores import Outcome, ScorerInfo
from reward_servers.construct import make_scorer
from reward_servers.isolation import score_isolated
from reward_servers.scorers.base import ScoreBatch, Scorer


def needs_judge(entry: Entry) -> bool:
    """Scorers behind an OpenAI-compatible endpoint have a contract suite of their own, with an endpoint."""
    return hasattr(import_target(entry.target), "make_protocol")


SCORERS = entries("scorer")


@pytest.fixture(scope="session")
def options_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Options of every scorer that has something to load, by name."""
    root = tmp_path_factory.mktemp("contract")
    clip, dino = build_clip(root / "clip"), build_dino(root / "dino")
    detector = build_mask2former(root / "detector", ("dog", "cat"))
    calibration = root / "calibration.json"
    calibration.write_text(json.dumps({"brightness": [0.1, 0.9]}))
    of_clip = {name: [f"model={clip}"] for name in
               ("clip", "clip_goal", "pickscore", "pickscore_pairs", "trained", "hpsv2", "attrictrl_clip")}  # fmt: skip
    of_geneval = [f"detector={detector}", f"colour_model={clip}"]
    return of_clip | {
        "aesthetic": [f"model={clip}", f"head={build_head(root / 'head.safetensors', 24)}"],
        "siglip": [f"model={build_siglip(root / 'siglip')}"],
        "dino_similarity": [f"model={dino}"],
        "consistency": [f"model={dino}"],
        "imagereward": [f"model={write_imagereward(root / 'imagereward')}"],
        "geneval": of_geneval,
        "geneval_regions": of_geneval,
        "latent": [f"model={build_clip(root / 'latent', channels=4, size=16)}"],
        "artifact": [f"model={build_vlm(root / 'vlm')}", "min_mass=0"],
        "ocr": ["engine=test_scorer_pixels:read_first_pixel"],
        "attrictrl_target": [f"calibration={calibration}"],
        "d2_align": [f"model={clip}", f"direction={write_direction(root / 'direction.safetensors')}"],
        **online_options(root, clip, dino),
    }


def write_direction(path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"direction": torch.linspace(-0.2, 0.2, 24), "strength": torch.tensor([1.5])}, path)
    return path


def online_options(root: Path, clip: Path, dino: Path) -> dict[str, list[str]]:
    """Of the scorers whose weights come in versions: each with the one its trainer starts from."""
    references = write_references(root / "references", flat((200, 0, 0)))
    trainers = {
        "adversarial_dino": (adversarial(references, dino), [f"model={dino}", "size=null"]),
        "guarded_pickscore": (guarded(references, clip), [f"model={clip}"]),
        "distilled": (distilled("judges_of_tests:redness", clip), [f"model={clip}"]),
    }
    options = {}
    for name, (trainer, given) in trainers.items():
        trainer.load()
        publish(root / name, trainer)
        trainer.close()
        options[name] = [*given, f"versions={root / name}"]
    return options


@pytest.fixture(scope="session")
def loaded(options_of: dict[str, list[str]]) -> dict[str, Scorer]:
    """Every scorer, made and loaded once."""
    scorers = {}
    for entry in SCORERS:
        if not needs_judge(entry):
            scorers[entry.name] = make_scorer(entry.name, options_of.get(entry.name, []))
            scorers[entry.name].load()
    return scorers


def test_every_listed_scorer_answers_as_its_registry_row_says(loaded: dict[str, Scorer]) -> None:
    for entry in SCORERS:
        if entry.name not in loaded:
            continue
        scorer, gives = loaded[entry.name], entry.declares
        assert isinstance(gives, ScorerGives)
        assert (scorer.name, scorer.declares) == (entry.name, gives)
        assert scorer.paper == entry.paper, f"{entry.name}: class and row name different papers"
        assert scorer.version
        canary = scorer.canary()
        assert all(set(gives.metadata_keys) <= set(metadata) for metadata in canary.metadata)
        table = score_isolated(scorer, canary)
        assert (table.scorer, table.kind, table.columns) == (entry.name, gives.kind, gives.columns), entry.name
        assert table.num_images == len(canary)
        known = table.valid() | (np.eye(len(canary), dtype=bool)[..., None] if gives.kind == "pair" else False)
        assert known.all(), f"{entry.name}: {table.reasons}"
        low, high = scorer.value_range
        values = table.values[table.valid()]
        assert (values >= (-np.inf if low is None else low)).all(), entry.name
        assert (values <= (np.inf if high is None else high)).all(), entry.name


def test_every_listed_scorer_gives_the_gradients_it_declares_and_no_others(loaded: dict[str, Scorer]) -> None:
    able = [name for name, scorer in loaded.items() if scorer.declares.gradients]
    assert len(able) >= 10
    for name in able:
        canary = loaded[name].canary()
        wanted = ScoreBatch(canary.images, canary.prompts, canary.metadata, canary.latents, want_gradients=True)
        table = score_isolated(loaded[name], wanted)
        assert table.valid()[:, 0].all(), f"{name}: {table.reasons}"
        assert table.gradients is not None, name
        assert table.gradients.shape == wanted.inputs.shape
        assert np.isfinite(table.gradients).all()


def test_scores_do_not_depend_on_company(loaded: dict[str, Scorer]) -> None:
    """Except where the declaration says that they do: alone or among others an image has one score."""
    images = pictures_of((40, 48), 3, seed=6)
    for name, scorer in loaded.items():
        if scorer.declares.needs_group or scorer.declares.accepts == "latents" or name.startswith("playground"):
            continue
        canary = scorer.canary()
        prompts, metadata = canary.prompts * 3, canary.metadata * 3
        together = score_isolated(scorer, ScoreBatch(images, prompts, metadata))
        alone = [score_isolated(scorer, ScoreBatch(images, prompts, metadata).one(row)) for row in range(3)]
        np.testing.assert_allclose(
            together.values, np.concatenate([table.values for table in alone]), rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_missing_metadata_fails_the_image_and_is_never_a_number(loaded: dict[str, Scorer]) -> None:
    for name, scorer in loaded.items():
        if not scorer.declares.metadata_keys:
            continue
        canary = scorer.canary()
        batch = ScoreBatch(np.repeat(canary.images, 2, axis=0), canary.prompts * 2, (canary.metadata[0], {}))
        table = score_isolated(scorer, batch)
        assert (table.outcomes[0] == Outcome.OK).all(), name
        assert (table.outcomes[1] == Outcome.FAILED).all(), name
        assert np.isnan(table.values[1]).all()
        assert table.reasons[1], name


def test_everything_with_weights_names_them(loaded: dict[str, Scorer]) -> None:
    with_weights = [name for name, scorer in loaded.items() if scorer.weight_digest]
    models = {name for name, section in SCORER_OPTIONS.items() if {"model", "detector"} & set(section.model_fields)}
    assert models & set(loaded) <= set(with_weights)
    for name in with_weights:
        assert loaded[name].weight_digest[:8] in loaded[name].version, name


def test_options_are_those_of_the_registrys_scorers() -> None:
    assert set(SCORER_OPTIONS) == {entry.name for entry in SCORERS}


def test_info_over_http_tells_range_direction_version_and_weights(options_of: dict[str, list[str]]) -> None:
    scorer = make_scorer("siglip", options_of["siglip"])
    with served(scorer) as server:
        info = ScorerInfo.model_validate_json(httpx.get(f"{server.url}/v1/info").content)
        assert (info.value_range, info.higher_is_better, info.columns) == ((-1, 1), True, ("cosine", "probability"))
        assert (info.version, info.weight_digest) == (scorer.version, scorer.weight_digest)
        assert len(info.weight_digest) == 32
        assert info.offers_gradients
        assert not info.whole_group
        images = pictures_of((32, 32), 1)
        assert post(server.url, score_body(images, version=info.version)).status_code == 200
        gone = post(server.url, score_body(images, version="1-00000000"))
        assert gone.status_code == 409
        assert info.version in gone.json()["error"]
    assert ask(make_scorer("consistency", options_of["consistency"]), pictures_of((32, 32), 2), ["p"] * 2).valid().all()


def test_listing_and_making_a_scorer_import_no_torch() -> None:
    """Options are checked at once; torch and transformers come with load()."""
    code = (
        "import sys\n"
        "from contracts.registry import entries, import_target\n"
        "from reward_servers.construct import make_scorer\n"
        "from contracts.config.scorers import SCORER_OPTIONS\n"
        "for entry in entries('scorer'):\n"
        "    if hasattr(import_target(entry.target), 'make_protocol'):\n"
        "        continue\n"
        "    section = SCORER_OPTIONS.get(entry.name)\n"
        "    fields = section.model_fields if section else {}\n"
        "    make_scorer(entry.name, [f'{name}=x' for name, field in fields.items() if field.is_required()])\n"
        "heavy = {'torch', 'transformers', 'ray', 'deepspeed', 'policy', 'rapidocr'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
