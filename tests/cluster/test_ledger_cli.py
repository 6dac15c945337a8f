"""`python -m cluster ledger`: filters, one group with its images and scores, painting it again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console

from cluster import cli_show
from cluster.cli import main
from cluster.ledger_cli import show_group
from cluster.ledger_view import print_groups
from cluster.repaint import Repainted, nearest_weights
from cluster.run_folder import RunFolder
from contracts.digests import digest_images
from contracts.wire import DiscardReason, GroupState
from tests.cluster.made_up_run import config_of, images_of, make_run

DISCARDED, ALIVE = 8, 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs"))


def call(run: RunFolder, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["ledger", str(run.root), *arguments])


def groups(run: RunFolder, *arguments: str) -> list[dict[str, Any]]:
    done = call(run, "--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)["groups"]


def test_the_words_for_states_and_reasons_are_the_wires() -> None:
    assert set(cli_show.STATES) == {state.value for state in GroupState}
    assert set(cli_show.REASONS) == {reason.value for reason in DiscardReason}


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ([], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (["--limit", "2"], [9, 8]),
        (["--limit", "2", "--oldest-first"], [0, 1]),
        (["--state", "generated"], [ALIVE]),
        (["--reason", "zero_variance"], [DISCARDED]),
        (["--reason", "late"], []),
        (["--step", "2"], [3, 2]),
        (["--version", "4"], [9, 8]),
        (["--state", "trained", "--actor", "actor-1"], []),
    ],
)
def test_filters(run: RunFolder, filters: list[str], ids: list[int]) -> None:
    assert [group["group"] for group in groups(run, *filters)] == ids


def test_where_groups_went_in_a_table(run: RunFolder) -> None:
    done = call(run, "--limit", "3")
    for words in ("8 trained", "zero_variance 1", "40 painted = 32 trained + 4 discarded + 4 alive", "balance"):
        assert words in " ".join(done.output.split()), words


def test_a_group_whose_bytes_are_there(run: RunFolder, tmp_path: Path) -> None:
    group = show_group(run, ALIVE, tmp_path)
    assert group["where"] == "waits for the jury"
    assert group["seeds"] == [1, 2, 3, 4]
    assert group["painted_with"]["micro_batches"] == [2, 2]
    images = np.stack([np.asarray(Image.open(path)) for path in group["images"]])
    np.testing.assert_array_equal(images, images_of(ALIVE))
    assert group["images_digest"] == digest_images(images)
    assert [event["event"] for event in group["journal"]] == ["admitted", "generating", "generated"]


def test_a_group_whose_bytes_are_gone(run: RunFolder) -> None:
    done = call(run, "group", str(DISCARDED), "--json")
    group = json.loads(done.output)
    assert group["where"] == "discarded: zero_variance"
    assert group["images"] == []
    assert group["images_missing"]
    assert len(group["seeds"]) == 4, "derived from the run's seed"
    assert group["scores"]["given"]["values"] == [[0.0], [0.5], [None], [1.0]]
    assert group["scores"]["given"]["outcomes"] == [["ok"], ["ok"], ["failed"], ["ok"]]
    assert group["rewards"]["values"] == [0.0, 0.5, None, 1.0]
    shown = call(run, "group", str(DISCARDED)).output
    for words in ("discarded: zero_variance", "picture 8", "given/strict", "failed", "no answer", "ready"):
        assert words in shown, words


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["group", "99"], 2, "groups 0 to 9 exist"),
        (["group"], 2, "ledger RUN group ID"),
        (["--repaint"], 2, "--repaint is for one group"),
        (["--state", "lost"], 2, "lost"),
    ],
)
def test_a_mistake_is_one_message(run: RunFolder, arguments: list[str], code: int, words: str) -> None:
    done = call(run, *arguments)
    assert done.exit_code == code
    assert words in done.stderr
    assert "Traceback" not in done.output


def test_the_nearest_weights_that_are_kept(tmp_path: Path) -> None:
    run = RunFolder.create(config_of(tmp_path, objective={"name": "grpo"}, sampler={"name": "flow_sde"}))
    config = config_of(tmp_path, objective={"name": "grpo"}, sampler={"name": "flow_sde"})
    assert nearest_weights(run, config, 3) == (0, None), "without a checkpoint: the model folder's own"
    for step in (4, 8):
        folder = run.checkpoints / f"step-{step:06d}"
        folder.mkdir()
        (folder / "state.json").write_text('{"snapshots": []}')
    (run.checkpoints / ".step-000006.unfinished").mkdir()
    assert nearest_weights(run, config, 8) == (8, run.checkpoints / "step-000008" / "param.safetensors")
    assert nearest_weights(run, config, 6)[0] == 8, "of two as near the later"
    assert nearest_weights(run, config, 1)[0] == 0


@pytest.mark.parametrize(
    ("used", "equal", "words"),
    [
        (3, True, "weights of version 3; every byte is equal"),
        (3, False, "the bytes differ: another device"),
        (3, None, "nothing of the first painting was kept"),
        (
            5,
            False,
            "version 5, the nearest whose weights are kept: version 3, which painted it, is gone; the bytes differ",
        ),
    ],
)
def test_what_was_painted_again_is_said_plainly(used: int, equal: bool | None, words: str) -> None:
    assert words in Repainted(np.zeros((1, 2, 2, 3), np.uint8), 3, used, equal).words


@pytest.mark.parametrize("width", [80, 200])
def test_a_narrow_terminal_lacks_columns_but_no_figure_is_cut(run: RunFolder, width: int) -> None:
    listing = json.loads(call(run, "--json").output)
    console = Console(width=width, record=True, file=io.StringIO())
    print_groups(listing, console)
    header, *rows = [line for line in console.export_text().splitlines() if line.strip()][2:]
    assert ("actor" in header) == ("paint s" in header) == (width > 80)
    before_the_prompt = header.index("prompt")
    assert not any("…" in row[:before_the_prompt] for row in rows)
    assert all(len(row.rstrip()) <= width for row in rows)
