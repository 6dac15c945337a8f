"""`python -m cluster methods`: every plug-in as a row, from the registry alone. Imports no plug-in, so no torch."""

from __future__ import annotations

import json
from typing import Any

from contracts import registry


def rows(kind: str | None = None) -> list[dict[str, Any]]:
    """kind, name, slugs, paper, file and summary of every entry, or of one kind's."""
    return [entry.row() for entry in registry.ENTRIES if kind is None or entry.kind == kind]


def as_json(kind: str | None = None) -> str:
    return json.dumps(rows(kind), indent=2, ensure_ascii=False)


def as_text(kind: str | None = None) -> str:
    """One block a kind; paper and file on a line of their own."""
    blocks: dict[str, list[str]] = {}
    for row in rows(kind):
        slugs = f" [{', '.join(row['slugs'])}]" if row["slugs"] else ""
        lines = [f"  {row['name']}{slugs}: {row['summary']}", f"      {row['paper']} · {row['file']}"]
        blocks.setdefault(row["kind"], []).extend(lines)
    return "\n\n".join("\n".join([kind, *lines]) for kind, lines in blocks.items())
