"""Writes dashboards/*.json: `python -m cluster.deploy.grafana.generate`; `--check` only compares.

Does not own: what they show (dashboards.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from cluster.deploy.grafana.dashboards import BOARDS
from cluster.deploy.grafana.panels import build

FOLDER = Path(__file__).parent / "dashboards"


def render() -> dict[str, str]:
    """File name -> JSON text of each dashboard."""
    return {
        f"{board.uid}.json": json.dumps(build(board), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for board in BOARDS
    }


def differing() -> list[str]:
    """Names of committed files that are not what would be written, and of those that would not be written at all."""
    wanted = render()
    held = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    return sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        stale = differing()
        print("\n".join(f"{name} is not what generate.py writes" for name in stale) or "dashboards are up to date")
        return bool(stale)
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
