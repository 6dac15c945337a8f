"""The report at the end of a run, however the run ends. Does not own: the page (page.py).

Invariant: nothing that fails or takes long here changes how the run ends.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.run_folder import RunFolder
from contracts.config import RunConfig

LIMIT_S = 120.0


async def write_at_end(config: RunConfig, folder: RunFolder, telemetry: Any) -> None:
    """Write report.html beside the event loop, unless telemetry.report is off; a failure is one event."""
    if not config.telemetry.report:
        return
    try:
        await asyncio.wait_for(asyncio.to_thread(_write, folder), LIMIT_S)
    except Exception as error:
        telemetry.event("report_failed", error=f"{type(error).__name__}: {error}")


def _write(folder: RunFolder) -> None:
    from cluster.report.page import write_own_report  # matplotlib takes half a second, at the end and only then

    write_own_report(folder)
