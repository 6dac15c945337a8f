"""What all tests share: one thread a process, explicit Ray authentication, the GPU marker, the miniature model."""

from __future__ import annotations

import os
import secrets
import sys

# Before torch or Ray is imported: two busy OpenMP threads on two cores are ruinous, and Ray's token mode must be
# the same for every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # no run uses the workers that Ray starts in advance
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if sys.prefix != sys.base_prefix:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from contracts.startup import collector_paused
from tests import kept_ray

ROOT = Path(__file__).resolve().parent.parent
WHOLE_RUNS = ("laws", "ops", "cluster")
SHARING = pytest.StashKey[set[Path]]()
"""Modules whose tests share a Ray."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nearly everything is imported by now or will be in it."""
    with collector_paused():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole runs first, so that short tests fill the gaps at the end, and of them those that share a Ray, so that it
    can be kept. Skip `gpu` tests without CUDA."""
    sharing = {item.path for item in items if "shared_ray" in getattr(item, "fixturenames", ())}
    config.stash[SHARING] = sharing
    items.sort(key=lambda item: (item.path.parent.name not in WHOLE_RUNS, item.path not in sharing))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path not in item.config.stash[SHARING]:
        kept_ray.end_ray()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        kept_ray.spoil_ray()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the playground's architecture at miniature size, with random weights (seed 0)."""
    import torch

    from playground.train.pipeline import build_pipeline

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_pipeline(size="tiny", seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """A local Ray with CPUs to spare, shared with the runs of other modules."""
    kept_ray.keep_ray()
    yield
    kept_ray.leave_ray()


@pytest.fixture(autouse=True)
def _no_debug_left_behind() -> Iterator[None]:
    """`--debug` is for a process; a command line run within the tests' own must not turn it on for the others."""
    yield
    os.environ.pop("SALON_DEBUG", None)
