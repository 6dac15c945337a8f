"""A user's own scorer, reward function, prompts, objective and model, from a working directory without a fork.

Everything goes through `python -m cluster` as a user types it, in a folder that holds nothing of Salon: a run, what it
exports, and another that starts from the export and from an adapter and is stopped by SIGTERM. No process outlives the
command that started it, however that ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
        "eval": {"before": True, "num_prompts": 4, "samples_to_save": 1},
        "telemetry": {"tensorboard": False, "report": False},
        "cluster": {"object_store_mb": 100},
        "stop": {"steps": 2},
    }


MARK, GONE_S = "SALON_TEST_STARTED_BY", 60.0


class Desk:
    """A working directory and the commands typed in it; what they start inherits a mark in its environment."""

    def __init__(self, folder: Path, repo_root: Path) -> None:
        self.folder = folder
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # a user's shell
        self.mark = uuid.uuid4().hex
        self.env = {**plain, "PYTHONPATH": str(repo_root), "HF_HUB_OFFLINE": "1", MARK: self.mark}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "cluster", *words]

    def type(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=900
        )
        self.check_nothing_is_left()
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words), cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def started(self) -> dict[int, str]:
        """pid -> command of what the commands have started and still runs, whatever session or parent it has."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())[:200]
            except psutil.Error:
                continue
        return found

    def check_nothing_is_left(self) -> None:
        """Once a command has ended."""
        deadline = time.monotonic() + GONE_S
        while left := self.started():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)

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
def pipeline(desk: Desk, own_run: object) -> Path:
    """The diffusers folder exported from the first run."""
    done = desk.type("export", "runs/own")
    assert done.returncode == 0, done.stderr
    return desk.folder / "runs" / "own" / "export"


@pytest.fixture(scope="module")
def adapter(desk: Desk, tiny_model_folder: Path) -> Path:
    """A LoRA whose B is no longer zero, as diffusers writes one."""
    import torch

    from contracts.config.model import LoraConfig, ModelConfig
    from policy.export import export_lora
    from policy.policy import Policy

    config = ModelConfig(path=str(tiny_model_folder), tuning="lora", lora=LoraConfig(rank=4, alpha=8))
    policy = Policy.load(config, seed=0, trainable=True)
    for tensor in (tensor for name, tensor in policy.trainable().items() if "lora_B" in name):
        torch.nn.init.normal_(tensor, std=0.02)
    return export_lora(policy, desk.folder / "adapter")


def test_a_run_of_own_parts(desk: Desk, own_run: subprocess.CompletedProcess[str]) -> None:
    assert own_run.returncode == 0, own_run.stderr
    summary = desk.summary("own")
    assert (summary["outcome"], summary["steps"], summary["images_trained"]) == ("finished", 2, 12)
    row = desk.rows("own")[-1]
    assert row["train_metric/advantage_size"] == pytest.approx(1.0), "the own objective's metric"
    assert 0 < row["reward_mean/bright/brightness"] < 128, "its options reached the scorer"
    assert {"reward_mean/contrast/contrast", "reward_mean/contrast/length"} <= row.keys()
    assert desk.prompts("own")[:2] == ["number 100", "number 101"]
    assert summary["held_out_strict_before"] is not None
    samples = desk.folder / "runs" / "own" / "samples"
    assert {path.name for path in samples.glob("*.png")} == {"before.png", "after.png"}
    assert "summary.json" in own_run.stdout
    assert "Traceback" not in own_run.stdout + own_run.stderr


@pytest.mark.long
def test_eval_of_a_run_and_of_its_export_agrees_with_the_run(desk: Desk, pipeline: Path) -> None:
    of_run = desk.type("eval", "runs/own", "--json")
    assert of_run.returncode == 0, of_run.stderr
    of_model = desk.type("eval", str(pipeline), "--config", "config.yaml", "--json")
    assert of_model.returncode == 0, of_model.stderr
    after = desk.summary("own")["evaluation_after"]
    assert json.loads(of_run.stdout) == after
    assert json.loads(of_model.stdout) == after


def test_the_export_loads_in_diffusers(desk: Desk, pipeline: Path) -> None:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(pipeline)
    live = dict(loaded.transformer.named_parameters())
    for name, array in desk.weights("own").items():
        np.testing.assert_array_equal(live[name].detach().numpy(), array, err_msg=name)


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
    running = "\n".join(desk.started().values())
    assert [what for what in ("reward_servers serve", "raylet", "gcs_server") if what not in running] == []
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    desk.check_nothing_is_left()
    summary = desk.summary("warm")
    assert summary["outcome"] == "stopped"
    assert summary["steps"] >= 1
    gone = sum(summary["images_discarded"].values())
    assert summary["images_painted"] == summary["images_trained"] + gone + summary["images_alive"], "a resume has them"
    assert desk.rows("warm")[0]["score_outcomes_total/contrast/ok"] > 0, "the function read each row's metadata"
    left = {text.split()[0] for text in desk.prompts("warm")}
    assert left == {"cat", "dog"}

    command.append(f"stop.steps={summary['steps'] + 1}")
    resumed = desk.type(*command)  # as a scheduler repeats it
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (desk.summary("warm")["outcome"], desk.summary("warm")["steps"]) == ("finished", summary["steps"] + 1)
    nothing_left = desk.type(*command)
    assert nothing_left.returncode == 0, nothing_left.stderr
    assert "is finished" in nothing_left.stdout
    check_exported_adapter(desk, pipeline, adapter)


def check_exported_adapter(desk: Desk, pipeline: Path, given: Path) -> None:
    """What a run that learnt next to nothing exports is the adapter that it was given, as diffusers loads it."""
    from diffusers import DiffusionPipeline

    done = desk.type("export", "runs/warm", "--lora", "--out", "exported")
    assert done.returncode == 0, done.stderr
    folders = given, desk.folder / "exported"
    before, after = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-5, err_msg=name)
    loaded = DiffusionPipeline.from_pretrained(pipeline)
    loaded.load_lora_weights(desk.folder / "exported")
    assert loaded.get_active_adapters()


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
