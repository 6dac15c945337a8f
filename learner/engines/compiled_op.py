"""DeepSpeed's CPU communication op: compiled once, by one process at a time, and never waited for in vain.

torch guards a build with a file that stays behind when the builder is killed, and every later process then waits for
it for ever. Here all builders take a lock that dies with its holder (flock) before they touch the build, so a guard
file that is there once the lock is held is a dead builder's and is removed.

Two ninjas (the environment's and the system's) hash a command differently, and each rebuilds what the other has built;
so the environment's own always comes first.
Does not own: whether a compiler exists (deepspeed.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

GUARDS = ("lock", ".ninja_lock")


def load_communication_op() -> None:
    """Compile (40 s, once) or load the op that DeepSpeed needs on a CPU. Does nothing where there is CUDA."""
    import torch

    if torch.cuda.is_available():
        return
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import get_default_build_root

    os.environ["PATH"] = path_with_environment()
    builder = ShareMemCommBuilder()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with sole_builder(root / "salon.lock"):
        remove_dead_guards(root, builder.name)
        builder.load(verbose=False)


def path_with_environment() -> str:
    """PATH with the folder of this interpreter's environment in front."""
    own = str(Path(sys.executable).parent)
    others = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry and entry != own]
    return os.pathsep.join([own, *others])


@contextlib.contextmanager
def sole_builder(path: Path) -> Iterator[None]:
    """Hold the lock that all builders take; it is released by the kernel when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_dead_guards(root: Path, name: str) -> list[Path]:
    """Delete guard files of builds of `name`; call it with the lock held. Returns what was deleted."""
    dead = [
        path
        for folder in (root / name, *root.glob(f"*/{name}"))
        for guard in GUARDS
        if (path := folder / guard).exists()
    ]
    for path in dead:
        path.unlink(missing_ok=True)
    return dead
