"""Validation beyond the table of law 10: own plug-ins, prompt files, engines, live servers, and open input."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import plan, validate
from cluster.checks import machines
from cluster.cli import main
from contracts.config import to_yaml
from contracts.config.load import config_from_tree, load_config
from contracts.config.run import RunConfig
from contracts.errors import ConfigError, ConfigErrors
from contracts.scores import ScorerInfo

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def make_run(folder: Path, /, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "v",
        "model": {"path": str(folder)},
        "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 2},
        "scorers": [{"name": "playground", "serve": "playground_verifier"}],
        "objective": {"name": "grpo"},
        "learner": {"engine": "plain"},
        "stop": {"steps": 3},
    }
    return config_from_tree({**tree, **sections})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_validates_but_for_the_model(path: Path, tiny_model_folder: Path) -> None:
    assert validate.check(load_config(path, [f"model.path={tiny_model_folder}"])) == []


def test_own_modules_are_found_in_the_working_directory(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_salon_plugins.py").write_text(
        "from contracts.declarations import ObjectiveNeeds, PromptsGive, ScorerGives\n"
        "class Objective:\n    declares = ObjectiveNeeds(states=True, log_probs=True, gaussian_density=True)\n"
        "class Prompts:\n    declares = PromptsGive(metadata_keys=('who',), has_held_out=True)\n"
        "class Scorer:\n    declares = ScorerGives(columns=('cute',), metadata_keys=('who',))\n"
        "def brightness(images, prompts, metadata):\n    return images.mean(axis=(1, 2, 3))\n"
    )
    (tmp_path / "broken_salon_plugin.py").write_text("import no_such_library_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    scorers = [
        {"name": "own", "serve": "own_salon_plugins:Scorer", "weights": {"cute": 1}},
        {"name": "f", "function": "own_salon_plugins:brightness", "weights": {"anything": 1}, "required": False},
    ]
    own = {"prompts": {"source": "own_salon_plugins:Prompts"}, "objective": {"name": "own_salon_plugins:Objective"}}
    assert validate.check(make_run(tiny_model_folder, scorers=scorers, **own)) == []
    published = {"name": "cps", "density": "published"}
    (error,) = validate.check(make_run(tiny_model_folder, scorers=scorers, sampler=published, **own))
    assert "density=gaussian" in error.way_out
    broken = make_run(tiny_model_folder, scorers=[{"name": "b", "serve": "broken_salon_plugin:Scorer"}])
    assert "no_such_library_anywhere" in "\n".join(map(str, validate.check(broken)))


def test_metadata_of_a_prompt_file_is_seen(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = {
        "nested.jsonl": {"prompt": "a", "metadata": {"playground": {}}},
        "flat.jsonl": {"text": "a", "playground": {}},
        "without.jsonl": {"prompt": "a", "colour": "red"},
    }
    found = {}
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        prompts = {"source": "jsonl", "path": str(tmp_path / name), "held_out_fraction": 0.5}
        found[name] = [error.field for error in validate.check(make_run(tiny_model_folder, prompts=prompts))]
    assert found == {"nested.jsonl": [], "flat.jsonl": [], "without.jsonl": ["scorers.0, prompts.source"]}


def test_metadata_of_a_parquet_file_is_seen(tmp_path: Path, tiny_model_folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "colour": ["red"]}), path)
    prompts = {"source": "parquet", "path": str(path), "held_out_fraction": 0.5}
    (error,) = validate.check(make_run(tiny_model_folder, prompts=prompts))
    assert "playground" in error.problem


def test_a_machine_without_a_compiler_is_told_of_the_plain_engine(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tiny_model_folder, learner={"engine": "deepspeed"})
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machines, "find_tool", lambda name: None)
    (error,) = validate.check(config)
    assert error.field == "learner.engine"
    assert "g++" in error.problem
    assert "ninja" in error.problem
    assert "learner.engine=plain" in error.way_out
    on_gpus = {"learner": {"engine": "deepspeed", "gpus_per_rank": 1}}
    assert validate.check(make_run(tiny_model_folder, **on_gpus)) == [], "NCCL needs no extension"


def test_a_tracker_that_is_not_installed_is_named(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("wandb", "mlflow") else object())
    config = make_run(tiny_model_folder, telemetry={"sinks": ["wandb", "mlflow"]})
    assert [error.problem for error in validate.check(config)] == ["wandb is not installed", "mlflow is not installed"]


class _Info(BaseHTTPRequestHandler):
    """Answers /v1/info with the server's `info` (bytes); asks for the token `secret`."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer secret"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(self.server.info if known else b"")  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """serve(info) -> URL of a server that answers it."""
    servers: list[ThreadingHTTPServer] = []
    monkeypatch.setenv("SALON_REWARD_TOKEN", "secret")

    def start(info: ScorerInfo | bytes) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Info)
        server.info = info if isinstance(info, bytes) else info.model_dump_json().encode()  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def info(**fields: Any) -> ScorerInfo:
    known = {"name": "s", "version": "1", "kind": "point", "columns": ("score",)}
    limits = {"max_images": 64, "max_pixels": 10**6, "max_body_bytes": 10**8}
    return ScorerInfo.model_validate({**known, **limits, **fields})


def ask(model: Path, *urls: str, **fields: Any) -> list[ConfigError]:
    config = make_run(model, scorers=[{"name": "s", "urls": urls, **fields}])
    return asyncio.run(validate.check_scorers_live(config)).errors


def test_running_servers_are_asked_what_they_are(tiny_model_folder: Path, serve: Any) -> None:
    url = serve(info())
    assert ask(tiny_model_folder, url, url) == []
    (error,) = ask(tiny_model_folder, url, weights={"beauty": 1})
    assert (error.field, error.way_out) == ("scorers.0.weights", "it has score")
    assert "write 1 or latest" in str(ask(tiny_model_folder, url, version="2")[0])
    assert "64 or less" in str(ask(tiny_model_folder, url, max_batch=65)[0])
    assert "reads latents" in str(ask(tiny_model_folder, serve(info(accepts="latents")))[0])
    assert "pair table" in str(ask(tiny_model_folder, serve(info(kind="pair")))[0])
    assert "differ" in str(ask(tiny_model_folder, url, serve(info(version="2")))[0])


def judged_by(model: Path, *urls: str, **fields: Any) -> RunConfig:
    """A run whose online scorer learns from a judge."""
    scorers = [{"name": "o", "serve": "distilled", "options": {"model": str(model)}}]
    judge = {"name": "j", "urls": urls, "max_batch": 8}
    return make_run(model, scorers=scorers, online=[{"name": "distilled", "scorer": "o", "judge": judge, **fields}])


def test_the_judge_of_an_online_scorer_is_asked_what_it_is(tiny_model_folder: Path, serve: Any) -> None:
    def said(*urls: str, **fields: Any) -> list[str]:
        config = judged_by(tiny_model_folder, *urls, **fields)
        return [str(error) for error in asyncio.run(validate.check_scorers_live(config)).errors]

    url = serve(info())
    assert said(url) == said(url, column="score") == []
    assert "online.0.column" in said(url, column="beauty")[0]
    assert "j answers a pair table of images" in said(serve(info(kind="pair")))[0]
    assert "online.0.judge.urls.0: http://127.0.0.1:9 does not answer" in said("http://127.0.0.1:9")[0]
    assert "online.0.judge.max_batch" in said(serve(info(max_images=4)))[0]


def test_names_of_deployed_scorers_need_a_cluster_to_join(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    named = make_run(tiny_model_folder, scorers=[{"name": "s", "urls": ["taste"]}])
    judged = judged_by(tiny_model_folder, "taste")
    for config, field in ((named, "scorers.0.urls"), (judged, "online.0.judge.urls")):
        (error,) = [one for one in validate.check(config) if "joins no Ray cluster" in one.problem]
        assert error.field == f"{field}, cluster.address"
        assert "taste names a deployed scorer" in error.problem
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "Ray cluster" not in str([*validate.check(named), *validate.check(judged)])


def test_a_server_that_does_not_answer_is_one_message(
    tiny_model_folder: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "does not answer" in str(ask(tiny_model_folder, "http://127.0.0.1:9")[0])
    assert "does not answer" in str(ask(tiny_model_folder, "http://not a url")[0])
    with pytest.raises(ConfigErrors, match="neither a URL nor the name of a deployed scorer"):
        ask(tiny_model_folder, "not a url")
    assert "no reward server" in str(ask(tiny_model_folder, serve(b"<html>"))[0])
    url = serve(info())
    monkeypatch.delenv("SALON_REWARD_TOKEN")
    assert "SALON_REWARD_TOKEN" in str(ask(tiny_model_folder, url)[0])


def test_the_plan_counts_what_a_step_takes(tiny_model_folder: Path) -> None:
    config = make_run(
        tiny_model_folder, sampler={"name": "flow_sde", "steps": 5}, pipeline={"max_staleness": 0},
        scorers=[{"name": "playground", "serve": "playground_verifier", "max_batch": 3}],
    )  # fmt: skip
    made = plan.make_plan(config)
    pixels, latent = 32 * 32 * 3, 3 * 32 * 32
    assert made.images == 8
    assert made.reward_requests == {"playground": 2 * 2}
    assert made.micro_batches == 4
    assert made.group_bytes == 4 * (pixels + latent * 4 + 5 * latent * 4 + 4 * 4)
    assert made.live_groups == 2
    text = plan.describe(config, validate.warnings(config))
    assert "flow_sde in 5 steps" in text
    assert "max_staleness=0" in text


def asked_pairs(made: plan.RunPlan, text: str) -> tuple[int | None, int | None, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(("  reward calls", "  comparisons"))]
    return made.reward_requests["s"], made.comparisons.get("s", -1), [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize(
    ("said", "calls", "comparisons", "told"),
    [
        ({"kind": "pair", "whole_group": True, "pairs": "all"}, 2, 2 * 4 * 3, "s 24"),
        ({"kind": "pair", "whole_group": True, "pairs": 2}, 2, 2 * 2 * 2, "s 8"),
        ({"kind": "pair", "whole_group": True}, 2, None, "s unknown, as its server does not say"),
        ({"whole_group": True}, 2, -1, None),
        ({}, 4, -1, None),
        (None, None, None, "s unknown until the server is asked"),
    ],
    ids=["all pairs", "two pairs", "pairs, not how many", "whole groups", "single images", "not asked"],
)  # fmt: skip
def test_the_plan_says_how_often_a_scorer_behind_a_url_is_asked_if_it_can(
    said: dict[str, Any] | None, calls: int | None, comparisons: int | None, told: str | None, serve: Any,
    tiny_model_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Two groups of four a step; of single images three go into a request. The plan as `validate` prints it."""
    scorer = {"name": "s", "urls": [serve(info(**(said or {})))], "max_batch": 3, "held_out": True}
    judge = {"name": "judge", "serve": "jpeg_size"}  # accuracy is not read from pairs
    config = make_run(tiny_model_folder, scorers=[scorer, judge], eval={"scorer": "judge"})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    arguments = ["validate", str(tmp_path / "run.yaml"), *([] if said is not None else ["--offline"])]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    infos = {} if said is None else {"s": info(**said)}
    requests, compared, lines = asked_pairs(plan.make_plan(config, infos), result.output)
    assert (requests, compared) == (calls, comparisons)
    asked = "unknown until the server is asked" if calls is None else calls
    assert lines[0] == f"reward calls s {asked}, judge 2"
    assert lines[1:] == ([] if told is None else [f"comparisons {told} (both orders)"])


def test_the_plan_knows_the_models_size_from_its_headers(tiny_model_folder: Path) -> None:
    import torch

    from contracts.config.model import ModelConfig
    from policy.policy import Policy

    for tuning in ("full", "lora"):
        model = {"path": str(tiny_model_folder), "tuning": tuning}
        policy = Policy.load(ModelConfig(**model), seed=0, trainable=True)
        trained = sum(parameter.numel() for parameter in policy.trainable().values())
        made = plan.make_plan(make_run(tiny_model_folder, model=model))
        assert made.weight_bytes == trained * torch.float32.itemsize


def test_a_lora_is_held_against_the_model_by_its_header(tiny_model_folder: Path, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from cluster.checks.headers import adapted_layers, read_model_card
    from contracts.config.model import LoraConfig

    card = read_model_card(tiny_model_folder)
    assert card is not None

    def problems(tensors: dict[str, Any], **lora: Any) -> str:
        path = tmp_path / "warm.safetensors"
        save_file({f"transformer.{name}": np.zeros(shape, np.float32) for name, shape in tensors.items()}, path)
        model = {"path": str(tiny_model_folder), "tuning": "lora", "lora": lora, "warm_start": str(path)}
        return "\n".join(map(str, validate.check(make_run(tiny_model_folder, model=model))))

    tensors = {}
    for name, (rows, columns) in adapted_layers(card.layers, LoraConfig()).items():
        tensors |= {f"{name}.lora_A.weight": (4, columns), f"{name}.lora_B.weight": (rows, 4)}
    assert problems(tensors, rank=4) == ""
    assert "set model.lora.rank=4" in problems(tensors, rank=8)
    assert "set model.lora.targets" in problems(tensors, rank=4, targets=["to_q"])
    name = next(iter(tensors))
    assert "of another size" in problems({**tensors, name: (4, 1)}, rank=4)
    assert "is no LoRA" in problems({key: shape for key, shape in tensors.items() if key != name}, rank=4)


def test_the_plan_says_which_memory_it_does_not_know(tiny_model_folder: Path) -> None:
    lines = plan.describe(make_run(tiny_model_folder)).splitlines()
    rows = [line for line in lines if line.strip().startswith(("controller", "dispatcher", "reward server", "rank"))]
    assert ["not estimated" in row for row in rows] == [True, True, False, True]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
LEAVES = st.none() | st.booleans() | st.integers(-3, 10**9) | st.floats() | TEXT
KEYS = st.sampled_from(sorted(RunConfig.model_fields)) | TEXT


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(KEYS, st.recursive(LEAVES, lambda x: st.lists(x, max_size=2) | st.dictionaries(TEXT, x)))
)
def test_whatever_stands_in_a_file_is_a_run_or_a_clear_refusal(
    changes: dict[str, Any], tiny_model_folder: Path
) -> None:
    try:
        config = make_run(tiny_model_folder, **changes)
    except ConfigErrors:
        return
    for error in validate.check(config):
        assert error.field


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    objective=st.sampled_from(["grpo", "ppo", "nft", "dpo", "alignprop"]),
    sampler=st.sampled_from(["ode", "flow_sde", "cps", "dance_sde"]),
    prompts=st.sampled_from(["playground", "text", "jsonl", "pairs"]),
    scorer=st.sampled_from(["playground_verifier", "playground_cnn", "jpeg_size", "colourfulness"]),
    sizes=st.tuples(*[st.integers(1, 6)] * 5),
)
def test_every_combination_is_decided_and_a_sound_one_has_a_plan(
    objective: str, sampler: str, prompts: str, scorer: str, sizes: tuple[int, ...], tiny_model_folder: Path
) -> None:
    groups, size, micro_batch, updates, ranks = sizes
    config = make_run(
        tiny_model_folder, objective={"name": objective}, sampler={"name": sampler}, prompts={"source": prompts},
        scorers=[{"name": "s", "serve": scorer}],
        rollout={"groups_per_step": groups, "group_size": size, "micro_batch": min(size, micro_batch)},
        learner={"engine": "plain", "updates_per_step": updates, "ranks": ranks},
    )  # fmt: skip
    errors = validate.check(config)
    if not errors:
        assert plan.describe(config, validate.warnings(config))
    if sampler == "ode" and objective in ("grpo", "ppo"):
        assert errors
