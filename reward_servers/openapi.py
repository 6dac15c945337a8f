"""What the application says of its own routes at GET /openapi.json: bodies, answers, statuses, the token.

Tests generate requests from it and hold every answer against it (schemathesis).
Does not own: the routes (app), the binary format (contracts.codec, which OpenAPI cannot describe).
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from contracts.scores import ScorerInfo

MEDIA_TYPE = "application/vnd.salon.score"

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ERROR = {
    "type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"], "additionalProperties": False,
}  # fmt: skip
_TOKEN: dict[str, Any] = {"security": [{"token": []}]}
_MISTAKES = {
    400: "The body cannot be read.",
    401: "No token, or a wrong one.",
    408: "The body did not arrive in time.",
    409: "The version that was asked for is gone.",
    413: "Too many bytes, images or pixels.",
    422: "The body can be read and does not fit this scorer.",
    429: "The queue is full; see Retry-After.",
    499: "The caller hung up.",
    503: "Loading, draining or away; see Retry-After.",
    504: "No score before the deadline.",
}


def _mistakes(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _MISTAKES[status], "content": content} for status in statuses}


def _text(what: str) -> dict[str, Any]:
    return {"description": what, "content": {"text/plain": {"schema": {"type": "string"}}}}


SCORE: dict[str, Any] = {
    "summary": "Score images, or latents, with their prompts",
    "response_class": Response,
    "responses": {
        200: {"description": "ScoreResponse and the table's arrays.", "content": {MEDIA_TYPE: _BINARY}},
        **_mistakes(*_MISTAKES),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True, "description": "ScoreRequest and arrays.", "content": {MEDIA_TYPE: _BINARY},
        },
        **_TOKEN,
    },
}  # fmt: skip
INFO: dict[str, Any] = {
    "summary": "What this scorer is: table, range, version, limits",
    "response_class": JSONResponse,
    "responses": {200: {"model": ScorerInfo, "description": "ScorerInfo."}, **_mistakes(401, 503)},
    "openapi_extra": _TOKEN,
}
LIVE: dict[str, Any] = {
    "summary": "Whether the process is worth keeping",
    "response_class": PlainTextResponse,
    "responses": {200: _text("ok"), 503: _text("The scorer hangs.")},
}
READY: dict[str, Any] = {
    "summary": "Whether it can score now",
    "response_class": PlainTextResponse,
    "responses": {200: _text("ok"), 503: _text("Why not.")},
}
METRICS: dict[str, Any] = {
    "summary": "Prometheus' text format",
    "response_class": PlainTextResponse,
    "responses": {200: _text("The series of this server.")},
}


def describe(app: FastAPI) -> None:
    """Let the document of `app` name the scheme of its token."""
    made = app.openapi

    def document() -> dict[str, Any]:
        found = made()
        found.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it
