"""How Ray says that an actor's process is gone, whatever ended it.

Does not own: who brings it back (actor_fleet.py, learner_group.py, Ray itself for those with restarts).
"""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError

ActorGone = (RayActorError, OutOfMemoryError)
"""For `except` and isinstance. Where a node's memory gets full Ray ends a process, and says so by another error."""


def how(error: BaseException) -> str:
    """One line about a death: Ray's account begins with a full memory, and ends with how any other process went."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, OutOfMemoryError):
        return f"Ray ended it, because its node's memory is full: {lines[0]}"[:500]
    return lines[-1][:300]
