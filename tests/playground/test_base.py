"""The base in the repository: small, stock, decent and clearly imperfect."""

import json
from pathlib import Path

import pytest
import torch

import playground
from playground.train.choose import load
from playground.train.sample import Settings, strict_by_kind
from playground.world.prompts import held_out_prompts

BASE = Path(playground.__file__).parent / "base"


@pytest.fixture(scope="module")
def card():
    return json.loads((BASE / "salon.json").read_text())


def test_at_most_six_megabytes():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 6_000_000


def test_weights_are_safetensors_only():
    assert not [path for path in BASE.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]


def test_strict_accuracy_is_what_the_card_says(card):
    torch.set_num_threads(1)
    settings = Settings(**card["eval"])
    accuracy = strict_by_kind(load(BASE), held_out_prompts("test", 80, seed=4), settings, seed=4)
    assert accuracy["all"] == pytest.approx(card["measured"]["test_strict"]["all"], abs=0.16)


def test_the_card_names_a_base_to_learn_from(card):
    assert 0.30 <= card["measured"]["test_strict"]["all"] <= 0.60
    assert card["max_sequence_length"] == 12
