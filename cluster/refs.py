"""Ray references as coroutines. Does not own: deadlines, which belong to whoever waits."""

from __future__ import annotations

from typing import Any


async def value(ref: Any) -> Any:
    """The referenced value; a reference itself is awaitable, but is no coroutine that asyncio could wrap."""
    return await ref
