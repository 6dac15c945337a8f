"""Ray references as coroutines, and what lies behind Ray's errors.

Does not own: deadlines, which belong to whoever waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def value(ref: Any) -> Any:
    """The referenced value; a reference itself is awaitable, but is no coroutine that asyncio could wrap."""
    return await ref


async def all_or_none(*works: Awaitable[Any]) -> list[Any]:
    """The results of all; when one fails, the others are cancelled and have ended before its error is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def root_cause(error: BaseException) -> BaseException:
    """What was raised in the first place: Ray wraps an error once for each actor it passed through."""
    from ray.exceptions import RayTaskError

    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
