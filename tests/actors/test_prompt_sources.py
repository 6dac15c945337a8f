"""Prompt sources: pure access by position, held-out splits that never leak, and mistakes told with file and line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from actors import images
from actors.images import read_image
from actors.prompts.base import ListedPrompts, PromptSource, split_of
from contracts.config.prompts import PROMPT_OPTIONS, CaptionKind
from contracts.config.rollout import PromptsConfig
from contracts.errors import ConfigError
from contracts.registry import entries, resolve
from contracts.wire import PromptSpec
from playground.world.captions import KINDS


def source(name: str, path: Path | str | None = None, seed: int = 0, **keys: Any) -> PromptSource:
    config = PromptsConfig(source=name, path=None if path is None else str(path), **keys)
    made = resolve("prompts", name).load()(config, seed)
    assert isinstance(made, PromptSource)
    return made


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("entry", entries("prompts"), ids=lambda entry: entry.name)
def test_classes_declare_what_the_registry_says(entry: Any) -> None:
    assert resolve("prompts", entry.name).load().declares == entry.declares


def test_every_built_in_source_says_which_options_it_takes() -> None:
    assert set(PROMPT_OPTIONS) == {entry.name for entry in entries("prompts")}
    assert get_args(CaptionKind) == KINDS


# -- order and splits


def listed(num: int, seed: int = 0, **keys: Any) -> ListedPrompts:
    prompts = [PromptSpec(text=f"prompt {i}") for i in range(num)]
    return ListedPrompts(PromptsConfig(source="text", path="a list", **keys), seed, prompts)


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_holds_every_prompt_once(num: int, seed: int, epoch: int) -> None:
    prompts = listed(num, seed)
    assert {prompts.at(epoch * num + i).text for i in range(num)} == {f"prompt {i}" for i in range(num)}


def test_access_is_by_position_alone() -> None:
    one, other = listed(30), listed(30)
    forwards = [one.at(i).text for i in range(100)]
    backwards = [other.at(i).text for i in reversed(range(100))]
    assert forwards == backwards[::-1]
    assert forwards[:30] != forwards[30:60]
    assert forwards != [listed(30, seed=1).at(i).text for i in range(100)]
    assert [listed(30, shuffle=False).at(i).text for i in range(31)] == [f"prompt {i % 30}" for i in range(31)]


@given(st.floats(0.0, 0.9))
def test_held_out_prompts_never_train(fraction: float) -> None:
    prompts = listed(200, held_out_fraction=fraction)
    train = {prompts.at(i).text for i in range(200)}
    held_out = {
        split: {prompt.text for prompt in prompts.held_out(split, 200)}
        for split in ("validation", "test")
        if any(split_of(f"prompt {i}", fraction) == split for i in range(200))
    }
    for texts in held_out.values():
        assert not texts & train
    assert len(train) + sum(map(len, held_out.values())) == 200
    assert abs(len(train) / 200 - (1 - fraction)) < 0.2


def test_the_held_out_list_does_not_depend_on_the_runs_seed() -> None:
    one, other = listed(200, 0, held_out_fraction=0.3), listed(200, 9, held_out_fraction=0.3)
    assert one.held_out("test", 10) == other.held_out("test", 10)
    assert len(one.held_out("test", 10)) == 10


def test_growing_the_share_only_adds_to_what_is_held_out() -> None:
    small = {f"prompt {i}" for i in range(300) if split_of(f"prompt {i}", 0.1) != "train"}
    large = {f"prompt {i}" for i in range(300) if split_of(f"prompt {i}", 0.3) != "train"}
    assert small < large


def test_nothing_held_out_is_told() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.held_out_fraction"):
        listed(5).held_out("test", 3)
    assert listed(5).held_out("test", 0) == []


# -- playground


def test_playground_prompts_carry_their_spec() -> None:
    from playground.world.captions import Spec
    from playground.world.prompts import split_of as world_split

    prompts = source("playground", seed=3)
    stream = [prompts.at(i) for i in range(50)]
    assert stream == [source("playground", seed=3).at(i) for i in range(50)]
    assert stream != [source("playground", seed=4).at(i) for i in range(50)]
    for prompt in stream:
        spec = Spec.from_metadata(prompt.metadata["playground"])
        assert spec.text == prompt.text
        assert world_split(spec.things) == "train"
    held_out = prompts.held_out("test", 20)
    assert held_out == source("playground", seed=4).held_out("test", 20)
    assert {world_split(Spec.from_metadata(p.metadata["playground"]).things) for p in held_out} == {"test"}
    json.dumps([prompt.metadata for prompt in stream])


# -- files


def test_text_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.txt", ["ein roter Kreis", "", "  двa квадрата  "])
    prompts = source("text", path, shuffle=False)
    assert [prompts.at(i).text for i in range(3)] == ["ein roter Kreis", "двa квадрата", "ein roter Kreis"]


def test_prompts_by_fsspec_url() -> None:
    import fsspec

    with fsspec.open("memory://bucket/p.txt", "w") as file:
        file.write("a circle\n")
    assert source("text", "memory://bucket/p.txt").at(0).text == "a circle"


def test_jsonl_keeps_metadata(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a circle", "tag": "single", "metadata": {"include": [{"class": "circle"}]}},
        {"text": "a square", "negative": "blurry"},
    ]
    prompts = source("jsonl", write_lines(tmp_path / "p.jsonl", [*map(json.dumps, rows), ""]), shuffle=False)
    assert prompts.at(0) == PromptSpec(text="a circle", metadata={"tag": "single", "include": [{"class": "circle"}]})
    assert prompts.at(1) == PromptSpec(text="a square", negative="blurry")


def test_a_column_by_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", ['{"caption": "a circle", "prompt": "not this"}'])
    assert source("jsonl", path, column="caption").at(0).text == "a circle"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "p.jsonl:2 is not valid JSON"),
        ("[1]", "p.jsonl:2 holds no JSON object"),
        ('{"caption": "x"}', "p.jsonl:2 has no prompt or text"),
        ('{"prompt": 3}', "p.jsonl:2: prompt is no text"),
        ('{"prompt": " "}', "p.jsonl:2: prompt is no text"),
        ('{"prompt": "x", "metadata": 1}', "p.jsonl:2: metadata is no object"),
        ('{"prompt": "x", "negative": 1}', "p.jsonl:2: negative is no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", ['{"prompt": "fine"}', line])
    with pytest.raises(ConfigError) as caught:
        source("jsonl", path)
    assert message in str(caught.value)


def test_parquet_columns(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "prompt": ["a circle", "a square"], "count": [1, 2], "score": [0.5, float("nan")],
            "objects": [[{"shape": "circle"}], []], "image": [b"\x00", b"\x01"],
        }
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    prompts = source("parquet", tmp_path / "p.parquet", shuffle=False)
    assert prompts.at(0).metadata == {"count": 1, "score": 0.5, "objects": [{"shape": "circle"}]}
    assert prompts.at(1).metadata == {"count": 2, "objects": []}


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet", "pairs"])
def test_unreadable_files_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.path.*required"):
        source(name)
    for path in (tmp_path / "absent", "nosuchscheme://x/y"):
        with pytest.raises(ConfigError, match=r"prompts\.path"):
            source(name, path)
    (tmp_path / "garbage").write_bytes(b"\xff\xfe\x00\xd8\x80")
    with pytest.raises(ConfigError, match=r"prompts\.path"):
        source(name, tmp_path / "garbage")


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt to train on"):
        source("text", write_lines(tmp_path / "p.txt", ["", " "]))


# -- pairs and images


def write_image(path: Path, size: tuple[int, int] = (8, 6), seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_pairs_resolve_paths_beside_their_file(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "good.png")
    write_image(tmp_path / "bad.png")
    row = {"prompt": "a circle", "chosen": "images/good.png", "rejected": str(tmp_path / "bad.png"), "source": "raters"}
    pairs = source("pairs", write_lines(tmp_path / "pairs.jsonl", [json.dumps(row)]))
    assert pairs.at(0).metadata == {
        "chosen": str(tmp_path / "images" / "good.png"), "rejected": str(tmp_path / "bad.png"), "source": "raters",
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["absent", "no path", "too large"])
def test_bad_pairs_are_named(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    row = {"prompt": "a circle", "chosen": "a.png", "rejected": "b.png" if fault == "absent" else "a.png"}
    if fault == "no path":
        del row["rejected"]
    if fault == "too large":
        monkeypatch.setattr("actors.prompts.pairs.MAX_BYTES", 10)
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:1"):
        source("pairs", write_lines(tmp_path / "pairs.jsonl", [json.dumps(row)]))


def test_images_of_the_right_size_are_taken_as_they_are(tmp_path: Path) -> None:
    pixels = write_image(tmp_path / "a.png", (8, 6))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), (6, 8)), pixels)


def test_other_images_are_cropped_at_the_centre_and_scaled(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "wide.png")
    taken = read_image(str(tmp_path / "wide.png"), (5, 5))
    assert taken.shape == (5, 5, 3)
    assert taken.min() > 180  # Lanczos reaches a little over the edge


@pytest.mark.parametrize("fault", ["absent", "text", "bytes", "pixels"])
def test_images_that_cannot_be_read_are_told(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    if fault == "text":
        path.write_text("no image")
    elif fault != "absent":
        write_image(path)
        monkeypatch.setattr(images, "MAX_BYTES" if fault == "bytes" else "MAX_PIXELS", 20)
    with pytest.raises(ConfigError, match=r"a\.png"):
        read_image(str(path), (4, 4))
