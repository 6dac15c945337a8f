"""Starting a process quickly: while modules are imported and a model is built, nothing looks for cyclic garbage.

torch, diffusers and transformers make a million objects that live as long as the process; the collector walks through
them again and again meanwhile, for a quarter of the time of a start. Does not own: what is imported, and what else a
process does first (cluster/processes.py).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection within; later ones leave out what is there at the end.

    For the one long start of a process, not for repeated work: what is garbage by then stays. Afterwards the collector
    works as ever, since a rare one keeps files and connections open that only garbage holds.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
