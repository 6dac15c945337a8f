"""What all protocols share: a name with a version, and how the answer to one question is counted.

Does not own: asking (judge), reading (reading).
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

from reward_servers.judging.judge import Judge
from reward_servers.judging.question import Question, Reply


class Protocol:
    """A way of asking. paper: where it comes from; version: raised with every change of wording or reading."""

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    paper: ClassVar[str]

    @property
    def label(self) -> str:
        """Name and version, part of every cache key."""
        return f"{self.name}/{self.version}"

    def fingerprint(self, model: str) -> str:
        """Eight digits for a scorer's version: this protocol, its settings and the judge's model."""
        settings = ",".join(f"{key}={value!r}" for key, value in sorted(vars(self).items()))
        return hashlib.blake2b(f"{model}|{self.label}|{settings}".encode(), digest_size=4).hexdigest()

    async def _ask(self, judge: Judge, question: Question) -> Reply:
        return await judge.ask(question)


def bounded(schema: Any, max_text: int | None) -> Any:
    """A JSON schema whose free texts have at most max_text characters; as it is for None."""
    if max_text is None:
        return schema
    if isinstance(schema, list):
        return [bounded(entry, max_text) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: bounded(value, max_text) for key, value in schema.items()}
    return inner | {"maxLength": max_text} if inner.get("type") == "string" and "enum" not in inner else inner


def quoted(prompt: str) -> str:
    """A prompt inside quotation marks of a question: on one line, its own quotation marks single."""
    return " ".join(prompt.replace('"', "'").split())
