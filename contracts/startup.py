"""How a process of Salon begins: the collector of cyclic garbage looks seldom.

torch, diffusers and transformers make a million objects while they are imported, all of which live as long as the
process, and with Python's own settings the collector walks through them so often that it takes a quarter of the time
of a start. Does not own: what is imported, and what else a process does first (cluster/processes.py).
"""

from __future__ import annotations

import gc

_NEW_OBJECTS = 20_000
"""Made and not yet freed, before the youngest are looked at; Python's own number is 700."""


def collect_seldom() -> None:
    """Call before the heavy imports. Rare collections also spare the ranks of a step the wait for one that collects."""
    gc.set_threshold(_NEW_OBJECTS, 10, 10)
