"""Health of a container, for HEALTHCHECK: exit status 0 or 1. The standard library alone, so it starts in no time.

healthcheck.py url URL       a GET answers 200
healthcheck.py run FOLDER    a controller of a run in FOLDER answers its /metrics (FOLDER/<run>/metrics_address)
"""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

TIMEOUT_S = 3.0


def answers(url: str) -> bool:
    """Whether a GET of an http URL is answered with 200 in time."""
    if not url.startswith(("http://", "https://")):
        return False
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def run_answers(folder: Path) -> bool:
    """Whether the newest run's controller answers; it listens on every address of this container, or on one."""
    files = sorted(folder.glob("*/metrics_address"), key=lambda path: path.stat().st_mtime)
    if not files:
        return False
    url = files[-1].read_text(encoding="utf-8").strip()
    return answers(url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"))


def main(arguments: list[str]) -> int:
    match arguments:
        case ["url", url]:
            return int(not answers(url))
        case ["run", folder]:
            return int(not run_answers(Path(folder)))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
