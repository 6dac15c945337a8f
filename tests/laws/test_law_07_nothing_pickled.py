"""Law 7: nothing pickled over HTTP, no unsafe load.

Two halves: no file of the tree loads or runs what a stranger wrote, and a server that is sent a pickle refuses it
without running it. Ray's own serialisation stays inside the authenticated cluster and needs no import of ours.
"""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from contracts.codec import encode
from contracts.errors import ConfigError
from contracts.scores import ScoreRequest
from reward_servers.scorers.base import weights_file
from reward_servers.scorers.jpeg_size import JpegSize
from reward_servers.serving import RewardServer
from reward_servers.settings import ServerSettings

ALLOWED: dict[str, str] = {}
"""'path:line' -> why this one is safe. Empty, and meant to stay so."""

PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {
    "eval": "eval", "exec": "exec", "torch.load": "torch.load", "torch.save": "torch.save",
    "yaml.unsafe_load": "unsafe YAML", "yaml.full_load": "unsafe YAML", "yaml.unsafe_load_all": "unsafe YAML",
    "yaml.full_load_all": "unsafe YAML", "np.lib.format.read_array": "numpy pickles",
}  # fmt: skip
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def violations(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) for each way the source could load or run foreign code."""
    for node in ast.walk(ast.parse(source)):
        yield from ((getattr(node, "lineno", 0), what) for what in _found(node))


def _found(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import {alias.name}" for alias in node.names if PICKLING & set(alias.name.split(".")))
    elif isinstance(node, ast.ImportFrom):
        names = set((node.module or "").split(".")) | {alias.name for alias in node.names}
        yield from (f"import {name}" for name in names & PICKLING)
        if node.module == "torch":
            yield from (f"torch.{alias.name}" for alias in node.names if alias.name in ("load", "save"))
    elif isinstance(node, ast.Attribute) and node.attr in PICKLING:
        yield f"use of {node.attr}"
    elif isinstance(node, ast.Call):
        yield from _found_in_call(node)


def _found_in_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    if name in CALLS:
        yield CALLS[name]
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if name in ("yaml.load", "yaml.load_all") and not SAFE_LOADERS & {ast.unparse(a).split(".")[-1] for a in given}:
        yield "unsafe YAML"
    if name.split(".")[-1] in ("import_module", "__import__"):
        yield from (f"import {a.value}" for a in call.args if isinstance(a, ast.Constant) and a.value in PICKLING)
    for keyword in call.keywords:
        is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in ("allow_pickle", "trust_remote_code") and not is_false:
            yield keyword.arg


def python_files(root: Path) -> list[Path]:
    """Every Python file that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [root / name for name in listing.stdout.splitlines() if (root / name).is_file()]


def test_no_file_of_the_tree_unpickles_or_runs_foreign_code(repo_root: Path) -> None:
    files = python_files(repo_root)
    assert len(files) > 40, "the scan found no tree to look at"
    found = [
        f"{path.relative_to(repo_root)}:{line} {what}"
        for path in files
        for line, what in violations(path.read_text())
        if f"{path.relative_to(repo_root)}:{line}" not in ALLOWED
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import ray.cloudpickle",
        "from ray import cloudpickle", "import marshal", "import shelve", "import dill", "import joblib",
        "import importlib; importlib.import_module('pickle')", "__import__('marshal')", "ray.cloudpickle.loads(b)",
        "torch.load(p)", "torch.load(p, weights_only=True)", "from torch import load", "torch.save(x, p)",
        "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)", "yaml.load(t)",
        "yaml.load(t, Loader=yaml.UnsafeLoader)", "yaml.load(t, yaml.Loader)", "yaml.unsafe_load(t)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "eval(text)", "exec(text)",
    ],
)  # fmt: skip
def test_the_scan_sees_each_way_of_doing_it(source: str) -> None:
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()", "yaml.safe_load(t)", "yaml.load(t, Loader=yaml.SafeLoader)", "np.load(p)",
        "np.load(p, allow_pickle=False)", "safetensors.torch.load_file(p)", "cursor.execute(q)",
        "from_pretrained(x, trust_remote_code=False)", "load_file(p)",
    ],
)  # fmt: skip
def test_the_scan_lets_the_safe_ways_pass(source: str) -> None:
    assert not list(violations(source))


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    server = RewardServer(JpegSize(), ServerSettings(), None)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server.run(lambda _: ready.set())), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield server.url
    server.stop()
    thread.join(10)


def pickled_touch(path: Path) -> bytes:
    """A protocol-0 pickle that runs `touch path` when loaded, written by hand."""
    return f"cos\nsystem\n(S'touch {path}'\ntR.".encode()


def test_the_hand_written_pickle_would_do_harm_if_it_were_loaded(tmp_path: Path) -> None:
    """Else the next tests would pass against a server that unpickles."""
    path = tmp_path / "pickled"
    path.write_bytes(pickled_touch(tmp_path / "harm"))
    subprocess.run([sys.executable, "-m", "pickle", str(path)], capture_output=True, timeout=60)
    assert (tmp_path / "harm").exists()


def test_a_pickle_sent_to_a_server_is_refused_and_not_run(server_url: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = pickled_touch(marker)
    header = ScoreRequest(request_id="r", prompts=("p",))
    image = np.zeros((1, 4, 4, 3), np.uint8)
    good = encode(header, {"images": image})
    length = int.from_bytes(good[:8], "little")
    bodies = {
        "bare": payload,
        "behind a length": len(payload).to_bytes(8, "little") + payload,
        "as the header": good[:8] + payload.ljust(length, b" ") + good[8 + length :],
        "as an array of bytes": encode(header, {"images": np.frombuffer(payload, np.uint8)}),
        "beside the images": encode(header, {"images": image, "pickled": np.frombuffer(payload, np.uint8)}),
    }
    for content_type in ("application/octet-stream", "application/x-pickle", "application/python-pickle"):
        for name, body in bodies.items():
            answer = httpx.post(f"{server_url}/v1/score", content=body, headers={"Content-Type": content_type})
            assert 400 <= answer.status_code < 500, f"{name}: {answer.status_code}"
            assert answer.json()["error"], name
    assert httpx.post(f"{server_url}/v1/score", content=good).status_code == 200
    assert not marker.exists()


def test_a_pickle_in_the_metadata_stays_text(server_url: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = pickled_touch(marker).decode()
    header = ScoreRequest(request_id="r", prompts=(text,), metadata=({"x": text, "__reduce__": text},))
    body = encode(header, {"images": np.zeros((1, 4, 4, 3), np.uint8)})
    assert httpx.post(f"{server_url}/v1/score", content=body).status_code == 200
    assert not marker.exists()


def test_an_object_array_cannot_even_be_written() -> None:
    with pytest.raises(SafetensorError, match="object"):
        encode(ScoreRequest(request_id="r", prompts=("p",)), {"images": np.array([{"a": 1}], dtype=object)})


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ""])
def test_weights_that_are_not_safetensors_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickled_touch(tmp_path / "executed"))
    with pytest.raises(ConfigError, match="not a safetensors file"):
        weights_file(path)


def test_a_pickle_named_safetensors_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickled_touch(tmp_path / "executed"))
    with pytest.raises(SafetensorError):
        load_file(weights_file(path))
    assert not (tmp_path / "executed").exists()
