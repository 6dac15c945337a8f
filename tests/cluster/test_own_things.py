"""A user's own scorer, reward function, prompts, objective and model, from a working directory without a fork.

Everything goes through `python -m cluster` as a user types it, in a folder that holds nothing of Salon:
two runs, what they export, and a third that starts from both exports and is stopped by SIGTERM.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from cluster.ledger.reader import LedgerReader

OWN_MODULES = {
    "my_scorers.py": """
from contracts.declarations import ScorerGives
from reward_servers.scorers.base import Scorer

class Brightness(Scorer):
    declares = ScorerGives(columns=("brightness",))

    def __init__(self, scale=1.0):
        self.scale = scale

    def score(self, batch):
        return self.table(self.scale * batch.images.mean(axis=(1, 2, 3)))
""",
    "unloaded.py": """
from my_scorers import Brightness

class Heavy(Brightness):
    def load(self):
        raise FileNotFoundError("heavy.safetensors is nowhere")
""",
    "my_rewards.py": """
def contrast(images, prompts, metadata):
    kinds = [one["kind"] for one in metadata]
    assert all(text.startswith(kind) for text, kind in zip(prompts, kinds))
    return {"contrast": images.std(axis=(1, 2, 3)), "length": [len(text) for text in prompts]}
""",
    "my_prompts.py": """
from actors.prompts.base import PromptSource
from contracts.declarations import PromptsGive
from contracts.wire import PromptSpec

class Numbers(PromptSource):
    declares = PromptsGive(has_held_out=True, metadata_keys=("kind",))

    def at(self, position):
        return PromptSpec(text=f"number {100 + position}", metadata={"kind": "number"})

    def held_out(self, split, num):
        return [PromptSpec(text=f"number {index}", metadata={"kind": "number"}) for index in range(num)]
""",
    "my_objectives.py": """
from dataclasses import replace
from learner.objectives.base import Means
from learner.objectives.grpo import GRPO
from learner.types import LossSum

class SignGRPO(GRPO):
    '''GRPO that learns whether an image was better than its group, not by how much.'''

    def loss(self, model, batch, p):
        signed = replace(batch, advantage=batch.advantage.sign())
        result = super().loss(model, signed, p)
        means = Means(batch.weight)
        means.add("advantage_size", signed.advantage.abs())
        return LossSum(result.loss, {**result.metrics, **means.pairs})
""",
    "broken.py": "raise RuntimeError('no such luck')\n",
}


def base_config() -> dict[str, Any]:
    return {
        "name": "own",
        "model": {"path": "model"},
        "prompts": {"source": "my_prompts:Numbers"},
        "sampler": {"steps": 3},
        "rollout": {"groups_per_step": 2, "group_size": 3, "micro_batch": 3},
        "scorers": [
            {"name": "bright", "serve": "my_scorers:Brightness", "options": {"scale": 0.5}},
            {"name": "contrast", "function": "my_rewards:contrast", "weights": {"contrast": 0.1}},
        ],
        "objective": {"name": "my_objectives:SignGRPO", "options": {"clip_range": 1e-3}},
        "learner": {"engine": "plain", "optimizer": {"lr": 1e-2}},
        "eval": {"before": False, "num_prompts": 4, "samples_to_save": 1},
        "telemetry": {"tensorboard": False, "report": False},
        "cluster": {"object_store_mb": 100},
        "stop": {"steps": 2},
    }


class Desk:
    """A working directory and the commands typed in it."""

    def __init__(self, folder: Path, repo_root: Path) -> None:
        self.folder = folder
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # a user's shell
        self.env = {**plain, "PYTHONPATH": str(repo_root), "HF_HUB_OFFLINE": "1"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "cluster", *words]

    def type(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=900
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words), cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def summary(self, run: str) -> dict[str, Any]:
        return json.loads((self.folder / "runs" / run / "summary.json").read_text())

    def rows(self, run: str) -> list[dict[str, Any]]:
        file = self.folder / "runs" / run / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def weights(self, run: str) -> dict[str, np.ndarray]:
        return load_file(max((self.folder / "runs" / run / "checkpoints").glob("step-*")) / "param.safetensors")

    def prompts(self, run: str) -> list[str]:
        with closing(LedgerReader(self.folder / "runs" / run / "ledger.sqlite")) as ledger:
            return [ledger.prompt(row.group_id).text for row in ledger.rows()]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, repo_root: Path) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    for name, text in OWN_MODULES.items():
        (folder / name).write_text(text)
    shutil.copytree(tiny_model_folder, folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(base_config()))
    write_prompts(folder)
    return Desk(folder, repo_root)


def write_prompts(folder: Path) -> None:
    """24 captions as JSON lines with metadata and as parquet with a column of it."""
    import pyarrow
    import pyarrow.parquet

    captions = [f"{kind} {index}" for kind in ("cat", "dog") for index in range(12)]
    lines = [json.dumps({"prompt": text, "metadata": {"kind": text.split()[0]}}) for text in captions]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"text": captions, "kind": [text.split()[0] for text in captions]})
    pyarrow.parquet.write_table(table, folder / "prompts.parquet")


@pytest.fixture(scope="module")
def own_run(desk: Desk) -> subprocess.CompletedProcess[str]:
    """Own scorer, function, prompts and objective, full weights."""
    return desk.type("train", "config.yaml")


@pytest.fixture(scope="module")
def adapter_run(desk: Desk) -> subprocess.CompletedProcess[str]:
    """The same scorers on prompts from JSON lines, an adapter instead of full weights."""
    return desk.type(
        "train", "config.yaml", "name=adapter", "model.tuning=lora", "model.lora.rank=4", "model.lora.alpha=8",
        "prompts.source=jsonl", "prompts.path=prompts.jsonl", "prompts.held_out_fraction=0.3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(desk: Desk, own_run: object) -> Path:
    """The diffusers folder exported from the first run."""
    done = desk.type("export", "runs/own")
    assert done.returncode == 0, done.stderr
    return desk.folder / "runs" / "own" / "export"


@pytest.fixture(scope="module")
def adapter(desk: Desk, adapter_run: object) -> Path:
    """The LoRA exported from the second run."""
    done = desk.type("export", "runs/adapter", "--lora", "--out", "adapter")
    assert done.returncode == 0, done.stderr
    return desk.folder / "adapter"


def test_a_run_of_own_parts(desk: Desk, own_run: subprocess.CompletedProcess[str]) -> None:
    assert own_run.returncode == 0, own_run.stderr
    summary = desk.summary("own")
    assert (summary["outcome"], summary["steps"], summary["images_trained"]) == ("finished", 2, 12)
    row = desk.rows("own")[-1]
    assert row["train_metric/advantage_size"] == pytest.approx(1.0), "the own objective's metric"
    assert 0 < row["reward_mean/bright/brightness"] < 128, "its options reached the scorer"
    assert {"reward_mean/contrast/contrast", "reward_mean/contrast/length"} <= row.keys()
    assert desk.prompts("own")[:2] == ["number 100", "number 101"]
    assert "summary.json" in own_run.stdout
    assert "Traceback" not in own_run.stdout + own_run.stderr


def test_an_adapter_on_prompts_with_metadata(desk: Desk, adapter_run: subprocess.CompletedProcess[str]) -> None:
    assert adapter_run.returncode == 0, adapter_run.stderr
    assert desk.summary("adapter")["outcome"] == "finished"
    assert {text.split()[0] for text in desk.prompts("adapter")} <= {"cat", "dog"}
    assert desk.rows("adapter")[-1]["score_outcomes_total/contrast/ok"] > 0, "the function read each row's metadata"


@pytest.mark.long
def test_eval_of_a_run_and_of_its_export_agrees_with_the_run(desk: Desk, pipeline: Path) -> None:
    of_run = desk.type("eval", "runs/own", "--json")
    assert of_run.returncode == 0, of_run.stderr
    of_model = desk.type("eval", str(pipeline), "--config", "config.yaml", "--json")
    assert of_model.returncode == 0, of_model.stderr
    after = desk.summary("own")["evaluation_after"]
    assert json.loads(of_run.stdout) == after
    assert json.loads(of_model.stdout) == after


def test_the_exports_load_in_diffusers(desk: Desk, pipeline: Path, adapter: Path) -> None:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(pipeline)
    live = dict(loaded.transformer.named_parameters())
    for name, array in desk.weights("own").items():
        np.testing.assert_array_equal(live[name].detach().numpy(), array, err_msg=name)
    loaded.load_lora_weights(adapter)
    assert loaded.get_active_adapters()


def test_a_warm_start_on_an_own_model_ends_on_sigterm_and_goes_on(desk: Desk, pipeline: Path, adapter: Path) -> None:
    command = [
        "train", "config.yaml", "name=warm", f"model.path={pipeline}", f"model.warm_start={adapter}",
        "model.tuning=lora", "model.lora.rank=4", "model.lora.alpha=8", "learner.optimizer.lr=1e-9",
        "prompts.source=parquet", "prompts.path=prompts.parquet", "prompts.held_out_fraction=0.3",
        "stop.steps=100000", "exist=resume",
    ]  # fmt: skip
    process = desk.start(*command)
    deadline = time.monotonic() + 600
    while process.poll() is None and not desk.rows("warm") and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    summary = desk.summary("warm")
    assert summary["outcome"] == "stopped"
    assert summary["steps"] >= 1
    gone = sum(summary["images_discarded"].values())
    assert summary["images_painted"] == summary["images_trained"] + gone + summary["images_alive"], "a resume has them"
    before, after = desk.weights("adapter"), desk.weights("warm")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-5, err_msg=name)
    assert max(np.abs(array).max() for name, array in before.items() if "lora_B" in name) > 1e-3, "B starts at 0"
    left = {text.split()[0] for text in desk.prompts("warm")}
    assert left == {"cat", "dog"}

    command.append(f"stop.steps={summary['steps'] + 1}")
    resumed = desk.type(*command)  # as a scheduler repeats it
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (desk.summary("warm")["outcome"], desk.summary("warm")["steps"]) == ("finished", summary["steps"] + 1)
    nothing_left = desk.type(*command)
    assert nothing_left.returncode == 0, nothing_left.stderr
    assert "is finished" in nothing_left.stdout


MISTAKES = {
    "a module that fails": ("objective.name=broken:Thing", "broken:Thing fails on import: RuntimeError"),
    "a class that is not there": ("scorers.0.serve=my_scorers:Darkness", "has no 'Darkness'"),
    "an unknown key": ("rollout.actor=3", "did you mean 'actors'?"),
    "no model": ("model.path=nowhere", "model.path"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(mistake: str, desk: Desk) -> None:
    override, message = MISTAKES[mistake]
    done = desk.type("train", "config.yaml", "name=never", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not (desk.folder / "runs" / "never").exists()


WORKERS_FIND = {
    "a scorer that does not load": ("scorers.0.serve=unloaded:Heavy", 1, "heavy.safetensors is nowhere"),
    "an option of an own objective": ("objective.options.clip_rang=1", 2, "objective.options.clip_rang"),
}


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(name, marks=pytest.mark.long if code == 2 else ()) for name, (_, code, _) in WORKERS_FIND.items()],
)
def test_what_only_a_worker_can_find_is_one_message_too(mistake: str, desk: Desk) -> None:
    override, code, message = WORKERS_FIND[mistake]
    done = desk.type("train", "config.yaml", "name=failed", "exist=replace", override)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "ray::" not in done.stderr
