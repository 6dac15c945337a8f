"""The Ray that modules of whole runs share: started once a process of tests, kept from one such module to the next.

Each start costs six processes and some seconds of processor time. It is ended before a module that does not use it,
by a test that fails, and when a module leaves something of its runs behind. Does not own: a Ray with other options,
which a test starts for itself (tests/laws/run_kit.py `local_ray`, or ray.init).
"""

from __future__ import annotations

import sys
import time

CPUS = 6
"""Declared, as many as the largest run asks for; Ray counts them and looks at none."""
RETURNED_S = 20.0
"""Time that what a module's runs held has to come back."""

_kept = _spoilt = False


def keep_ray() -> None:
    """Start Ray unless the one before still stands."""
    global _kept
    import ray

    if not _kept:
        ray.init(
            address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, logging_level="WARNING",
            object_store_memory=300 * 2**20,
        )  # fmt: skip
        _kept = True


def spoil_ray() -> None:
    """A test failed: what it left behind is unknown."""
    global _spoilt
    _spoilt = True


def leave_ray() -> None:
    """A module is done with it: the next one gets it only as it was in the beginning."""
    if _spoilt or not _all_returned():
        end_ray()


def end_ray() -> None:
    """No-op where none is kept: a test's own Ray is left alone."""
    global _kept, _spoilt
    if _kept:
        sys.modules["ray"].shutdown()
    _kept = _spoilt = False


def _all_returned() -> bool:
    import ray
    from ray.util.placement_group import placement_group_table

    deadline = time.monotonic() + RETURNED_S
    while time.monotonic() < deadline:
        placed = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if not placed and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.1)
    return False
