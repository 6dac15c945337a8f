"""Law 10: a mismatch is found before the first image, with the fields concerned and the way out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_kit import local_ray

from cluster import validate
from contracts.config.load import config_from_tree
from contracts.config.run import RunConfig
from contracts.errors import ConfigErrors

NO_FILE = "/nonexistent"

HELD_OUT: dict[str, Any] = {
    "scorers": [{"name": "playground", "serve": "playground_verifier"},
                {"name": "size", "serve": "jpeg_size", "held_out": True}],
}  # fmt: skip

# name of the mistake: overrides of a run that works -> (fields named, words of the message or way out)
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "sampler without log-probs": ({"sampler.name": "ode"}, "sampler.name", "flow_sde"),
    "unknown sampler": ({"sampler.name": "euler"}, "sampler.name", "dance_sde"),
    "no noise": ({"sampler.noise_level": 0}, "sampler.noise_level", "above 0"),
    "no stochastic step": ({"sampler.steps": 1}, "sampler.steps", "2 or more"),
    "last step of cps": (
        {"sampler.name": "cps", "sampler.window": {"size": 2, "lo": 6, "hi": 8}}, "sampler.window.hi", "at most 7",
    ),
    "window without stochastic steps": (
        {"sampler.name": "ode", "sampler.window": {"size": 2}, "objective": {"name": "nft"}},
        "sampler.window", "remove",
    ),
    "form of another sampler": ({"sampler.density": "published"}, "sampler.density", "gaussian"),
    "guidance that is not trained": (
        {"objective": {"name": "nft"}, "sampler.guidance_scale": 4.5}, "sampler.guidance_scale", "=1",
    ),
    "pairs of one": (
        {"objective": {"name": "dpo"}, "rollout.group_size": 1, "rollout.micro_batch": 1, "reward.min_valid": 1,
         "learner.micro_batch": 2}, "rollout.group_size", "2 samples",
    ),
    "more pairs than samples": (
        {"objective": {"name": "dpo", "pairs_per_group": 3}}, "objective.pairs_per_group", "=2 or less",
    ),
    "half a pair a forward": (
        {"objective": {"name": "dpo"}, "learner.micro_batch": 1}, "learner.micro_batch", "2 or more",
    ),
    "group of one": (
        {"rollout.group_size": 1, "rollout.micro_batch": 1, "reward.min_valid": 1}, "rollout.group_size", "ppo",
    ),
    "never enough valid": ({"reward.min_valid": 5}, "reward.min_valid", "4 or less"),
    "more updates than batches": ({"learner.updates_per_step": 5}, "learner.updates_per_step", "lower it"),
    "more ranks than batches": ({"learner.ranks": 3, "learner.updates_per_step": 2}, "learner.ranks", "fewer ranks"),
    "trunk that is not shared": (
        {"objective": {"name": "ppo", "trunk": "separate", "trunk_gradient": True}},
        "objective.trunk_gradient", "shared",
    ),
    "own objective that is not there": ({"objective": {"name": "nowhere:Mine"}}, "objective.name", "working directory"),
    "own objective without declaration": (
        {"objective": {"name": "contracts.seeds:Stream"}}, "objective.name", "declares",
    ),
    "pairs for an online method": (
        {"prompts": {"source": "pairs", "path": __file__, "held_out_fraction": 0.1}}, "prompts.source", "dpo",
    ),
    "unknown scorer": ({"scorers.0.serve": "aesthetics"}, "scorers.0.serve", "playground_verifier"),
    "unknown column": ({"scorers.0.weights": {"beauty": 1}}, "scorers.0.weights", "strict"),
    "weights of nothing": ({"scorers.0.weights": {"strict": 0}}, "scorers.0.weights", "held_out"),
    "nothing required": ({"scorers.0.required": False}, "scorers", "required"),
    "function that is not there": (
        {"scorers": [{"name": "f", "function": "json:nothing"}]}, "scorers.0.function", "no 'nothing'",
    ),
    "function that is none": (
        {"scorers": [{"name": "f", "function": "json:__name__"}]}, "scorers.0.function", "not a function",
    ),
    "function without a name": (
        {"scorers": [{"name": "f", "function": "json"}]}, "scorers.0.function", "module:function",
    ),
    "no gradient": (
        {"objective": {"name": "alignprop"}, "sampler.name": "ode"}, "scorers.0, objective.name", "playground_cnn",
    ),
    "two scorers with gradient": (
        {"objective": {"name": "alignprop"}, "scorers": [
            {"name": "a", "serve": "playground_cnn"}, {"name": "b", "serve": "playground_cnn"}]},
        "scorers, objective.name", "held_out",
    ),
    "prompts without metadata": (
        {"prompts": {"source": "text", "path": __file__, "held_out_fraction": 0.1}}, "scorers.0, prompts.source",
        "playground",
    ),
    "judge that is not there": ({"eval.scorer": "critic"}, "eval.scorer", "playground"),
    "column that is not there": ({"eval.column": "beauty"}, "eval.column", "strict"),
    "nothing held out": ({"prompts": {"source": "jsonl", "path": __file__}}, "prompts.held_out_fraction", "0.1"),
    "no prompt file": ({"prompts": {"source": "text", "held_out_fraction": 0.1}}, "prompts.path", "path"),
    "prompt file that is not there": (
        {"prompts": {"source": "text", "path": NO_FILE, "held_out_fraction": 0.1}}, "prompts.path", "does not exist",
    ),
    "file for the playground": ({"prompts.path": NO_FILE}, "prompts.path", "remove"),
    "no model": ({"model.path": NO_FILE}, "model.path", "diffusers pipeline folder"),
    "folder that is no model": ({"model.path": str(Path(__file__).parent)}, "model.path", "model_index.json"),
    "unknown family": ({"model.family": "sd9"}, "model.family", "sd3"),
    "warm start that is not there": ({"model.warm_start": NO_FILE}, "model.warm_start", "LoRA"),
    "unsafe warm start": ({"model.warm_start": __file__}, "model.warm_start", "safetensors"),
    "warm start that is no LoRA": (
        {"model.warm_start": "playground/scorer/scorer.safetensors"}, "model.warm_start", "is no LoRA",
    ),
    "warm start of another model": ({"model.warm_start": "playground/base"}, "model.warm_start", "other layers"),
    "adapter of nothing": (
        {"model.tuning": "lora", "model.lora": {"targets": ["to_q", "nonsense"]}}, "model.lora.targets", "to_q",
    ),
    "unknown option of the prompts": ({"prompts.options": {"kindz": ["two"]}}, "prompts.options.kindz", "kinds"),
    "unknown kind of captions": ({"prompts.options": {"kinds": ["foo"]}}, "prompts.options.kinds.foo", "counting"),
    "no kind of captions": ({"prompts.options": {"kinds": {"two": 0}}}, "prompts.options.kinds", "one or more"),
    "option of a file of prompts": (
        {"prompts": {"source": "text", "path": __file__, "options": {"kinds": ["two"]}}},
        "prompts.options.kinds", "options are none",
    ),
    "unknown option of a scorer": (
        {"scorers.0.options": {"bogus": 1}}, "scorers.0.options.bogus", "options are none",
    ),
    "unknown option of an own scorer": (
        {"scorers.0": {"name": "own", "serve": "own_optioned_scorer:Optioned", "options": {"bogus": 1}}},
        "scorers.0.options", "options are limit",
    ),
    "adapter for full weights": ({"model.lora": {"rank": 8}}, "model.lora", "tuning=lora"),
    "cuda without a GPU": ({"model.device": "cuda"}, "rollout.gpus_per_actor, model.device", "=1"),
    "GPU for a CPU run": ({"model.device": "cpu", "learner.gpus_per_rank": 1}, "learner.gpus_per_rank", "=0"),
    "ranks that share a GPU": ({"learner.gpus_per_rank": 0.5, "learner.ranks": 2}, "learner.gpus_per_rank", "to 1"),
    "two GPUs an actor": ({"rollout.gpus_per_actor": 2}, "rollout.gpus_per_actor", "rollout.actors"),
    "bf16 in stage 0": (
        {"learner.engine": "deepspeed", "model.dtype": "bf16", "learner.zero_stage": 0}, "learner.zero_stage", "=1",
    ),
    "too few CPUs": ({"cluster.num_cpus": 1}, "cluster.num_cpus", "lower"),
    "guard of a metric that no step has": (
        {"guards": [{"name": "limit", "metric": "grad_nrom", "max": 1}]}, "guards.0.metric", "grad_norm",
    ),
    "guard of a KL that is not measured": (
        {"guards": [{"name": "limit", "metric": "kl", "max": 1}]}, "guards.0.metric, objective.kl_beta", "above 0",
    ),
    "guard of another objective's metric": (
        {"guards": [{"name": "limit", "metric": "value_loss", "max": 1}]}, "guards.0.metric", "no step of this run",
    ),
    "guard of a column that is not there": (
        {"guards": [{"name": "limit", "metric": "reward_mean/playground/beauty", "min": 0}]}, "guards.0.metric",
        "strict",
    ),
    "guard of no column": (
        {"guards": [{"name": "limit", "metric": "reward_std/playground", "min": 0}]}, "guards.0.metric",
        "reward_std/SCORER/COLUMN",
    ),
    "nothing held out for a guard": (
        {"guards": [{"name": "held_out_divergence", "held_out": "playground"}]}, "guards.0.held_out, scorers",
        "held_out: true",
    ),
    "guard of a scorer that is not there": (
        {"guards": [{"name": "held_out_divergence", "held_out": "critic"}]}, "guards.0.held_out", "'critic'",
    ),
    "guard of a reward that is held out": (
        {**HELD_OUT, "guards": [{"name": "held_out_divergence", "held_out": "size", "reward": "size/kilobytes"}]},
        "guards.0.reward", "scorer that trains",
    ),
    "guard of a reward that is relative": (
        {**HELD_OUT, "credit.aggregation": {"name": "win_rate"},
         "guards": [{"name": "held_out_divergence", "held_out": "size"}]},
        "guards.0.reward, credit.aggregation.name", "scorer/column",
    ),
    "guard of groups that no jury scores": (
        {"objective": {"name": "alignprop"}, "guards": [{"name": "held_out_divergence", "held_out": "playground"}]},
        "guards.0.held_out", "no jury",
    ),
    "own guard that is not there": ({"guards": [{"name": "nowhere:Mine"}]}, "guards.0.name", "working directory"),
    "own guard that is none": ({"guards": [{"name": "contracts.seeds:Stream"}]}, "guards.0.name", "guards.base.Guard"),
    "unknown file system": ({"runs_dir": "moon://bucket"}, "runs_dir", "moon://"),
}  # fmt: skip


@pytest.fixture(scope="module")
def make_run(tiny_model_folder: Path) -> Callable[[dict[str, Any]], RunConfig]:
    """A run that works, with overrides."""

    def make(overrides: dict[str, Any]) -> RunConfig:
        tree: dict[str, Any] = {
            "name": "law10",
            "model": {"path": str(tiny_model_folder)},
            "sampler": {"name": "flow_sde", "steps": 8},
            "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 2},
            "scorers": [{"name": "playground", "serve": "playground_verifier", "weights": {"reward": 1.0}}],
            "objective": {"name": "grpo"},
            "learner": {"engine": "plain"},
            "stop": {"steps": 1},
        }
        for path, value in overrides.items():
            *parents, last = path.split(".")
            node: Any = tree
            for key in parents:
                node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
            node[int(last) if isinstance(node, list) else last] = value
        return config_from_tree(tree)

    return make


def test_the_run_that_the_mistakes_are_made_in_works(make_run: Callable[..., RunConfig]) -> None:
    assert validate.check(make_run({})) == []


def test_guards_of_what_is_there_are_let_through(make_run: Callable[..., RunConfig]) -> None:
    limits = ["grad_norm", "reward_std", "drift_nats", "effective_sample_size", "reward_mean/size/kilobytes", "kl"]
    guards = [{"name": "limit", "metric": metric, "max": 1} for metric in limits]
    guards.append({"name": "held_out_divergence", "held_out": "size"})
    guards.append({"name": "held_out_divergence", "held_out": "size/kilobytes", "reward": "playground/strict"})
    assert validate.check(make_run({**HELD_OUT, "objective.kl_beta": 0.1, "guards": guards})) == []


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"name": "limit", "metric": "loss", "max": 1}, "guards have duplicate names"),
        ({"name": "limit", "metric": "lr", "maximum": 1, "max": 1}, "maximum"),
        ({"name": "limits", "metric": "lr", "max": 1}, "limits"),
    ],
)
def test_guards_of_one_name_and_unknown_keys_are_refused(
    guard: dict[str, Any], words: str, make_run: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigErrors, match=words):
        make_run({"guards": [{"name": "limit", "metric": "loss", "max": 2}, guard]})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_found_with_its_fields_and_the_way_out(mistake: str, make_run: Callable[..., RunConfig]) -> None:
    overrides, fields, words = MISTAKES[mistake]
    errors = validate.check(make_run(overrides))
    assert any(fields in error.field and words in f"{error.problem} {error.way_out}" for error in errors), (
        "\n".join(map(str, errors)) or "nothing was found"
    )


def test_every_mismatch_is_listed_at_once(make_run: Callable[..., RunConfig]) -> None:
    overrides = {"sampler.name": "ode", "model.path": NO_FILE, "eval.scorer": "critic", "reward.min_valid": 9}
    fields = {error.field for error in validate.check(make_run(overrides))}
    assert {
        "sampler.name, objective.name",
        "model.path",
        "eval.scorer",
        "reward.min_valid, rollout.group_size",
    } <= fields


def test_what_a_live_cluster_lacks_is_found(make_run: Callable[..., RunConfig]) -> None:
    config = make_run({"rollout.actors": 4, "rollout.gpus_per_actor": 1, "learner.gpus_per_rank": 1})
    assert validate.check_cluster(config, {"CPU": 8.0, "GPU": 5.0}) == []
    (error,) = validate.check_cluster(config, {"CPU": 8.0, "GPU": 4.0})
    assert "rollout.gpus_per_actor" in error.field
    assert "asks for 5 GPUs" in error.problem
    assert len(validate.check_cluster(config, {})) == 2


@pytest.mark.parametrize("command", ["validate", "train"])
def test_a_cluster_that_does_not_answer_is_told_before_ray_gives_up(
    command: str, repo_root: Path, tmp_path: Path
) -> None:
    """Ray itself would try for two minutes, and then end the process without a word of the address."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", command, "configs/playground_grpo.yaml", "cluster.address=127.0.0.1:1",
         "learner.engine=plain", f"runs_dir={tmp_path}/runs"],
        cwd=repo_root, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cluster.address: no Ray cluster answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_is_named_is_asked_what_it_has(make_run: Callable[..., RunConfig], repo_root: Path) -> None:
    """validate joins it: the plan where everything fits, one message where an actor is too many."""
    import ray

    with local_ray(make_run({"cluster.num_cpus": 3})):
        address = ray.get_runtime_context().gcs_address
        fits, too_many = (
            subprocess.run(
                [sys.executable, "-m", "cluster", "validate", "configs/playground_grpo.yaml", "learner.engine=plain",
                 f"cluster.address={address}", f"rollout.actors={actors}"],
                cwd=repo_root, capture_output=True, text=True, timeout=120,
            )
            for actors in (2, 3)
        )  # fmt: skip
    assert fits.returncode == 0, fits.stderr
    assert "who runs where" in fits.stdout
    assert too_many.returncode == 2, too_many.stderr
    assert "the run asks for 4 CPUs and the cluster has 3" in too_many.stderr


PROBE = """
import json, sys
from contracts.config import load_config
from cluster.validate import check
errors = check(load_config(sys.argv[1], sys.argv[2:]))
heavy = [name for name in ("torch", "ray", "deepspeed", "diffusers", "transformers") if name in sys.modules]
print(json.dumps({"errors": [error.field for error in errors], "heavy": heavy}))
"""


def test_nothing_is_started_or_loaded_for_it(repo_root: Path) -> None:
    """So no image can have been painted: neither Ray nor torch is even imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "configs/playground_grpo.yaml", "sampler.name=ode", f"model.path={NO_FILE}"],
        cwd=repo_root, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert {"sampler.name, objective.name", "model.path"} <= set(answer["errors"])
    assert answer["heavy"] == []


def test_train_refuses_before_ray_starts(repo_root: Path, tmp_path: Path) -> None:
    """The whole command: exit code 2, one message, no traceback, no run folder, no Ray."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "train", "configs/playground_grpo.yaml", "sampler.name=ode",
         f"model.path={NO_FILE}", f"runs_dir={tmp_path}/runs"],
        cwd=repo_root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert "sampler.name, objective.name" in done.stderr
    assert "model.path" in done.stderr
    assert not (tmp_path / "runs").exists()
