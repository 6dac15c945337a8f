"""One OpenAI-compatible server: a single exchange, with every answer distrusted until checked.

Works with any server of POST /v1/chat/completions. Where the server has `logprob_token_ids` and /tokenize (vLLM), the
log-probs of exactly the asked words come back, at any rank; elsewhere those of the 20 most likely tokens.
Does not own: HTTP failures (client.endpoint), retries (client.persist), what an answer means (reading).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import httpx
from pydantic import BaseModel, Field, ValidationError

from contracts.errors import ConfigError
from reward_servers.client.breaker import CircuitBreaker
from reward_servers.client.endpoint import AttemptFailed, Endpoint
from reward_servers.judging.question import Question, Reply
from reward_servers.judging.reading import canonical

log = logging.getLogger(__name__)

LogProbs = Literal["auto", "ids", "top"]

_TOP = 20  # the most OpenAI and vLLM return
_ANSWER_BYTES = 2 * 2**20
_LARGE_PIXELS = 256 * 256


class _TokenLogProb(BaseModel):
    token: str
    logprob: float = Field(allow_inf_nan=False, le=1e-3)


class _Position(_TokenLogProb):
    top_logprobs: tuple[_TokenLogProb, ...] = ()


class _LogProbs(BaseModel):
    content: tuple[_Position, ...] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = "stop"
    logprobs: _LogProbs | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(default=0, ge=0, le=10**9)
    completion_tokens: int | None = Field(default=0, ge=0, le=10**9)


class _Completion(BaseModel):
    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: _Usage | None = None


class _Tokens(BaseModel):
    tokens: tuple[int, ...]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: tuple[_Model, ...]


class JudgeEndpoint(Endpoint):
    """A server of `model`, at most `concurrency` requests in flight to it."""

    def __init__(self, url: str, breaker: CircuitBreaker, model: str, concurrency: int, log_probs: LogProbs) -> None:
        super().__init__(url, breaker)
        self._model, self._concurrency, self._log_probs = model, concurrency, log_probs
        self._ids: dict[str, int | None] = {}
        self._learning = asyncio.Lock()

    def wait_s(self, now: float) -> float:
        """Seconds until it may be asked; a full server is looked at again in 5 ms."""
        return max(super().wait_s(now), 0.005 if self.in_flight >= self._concurrency else 0.0)

    async def chat(self, http: httpx.AsyncClient, question: Question, timeout_s: float) -> Reply:
        """The checked reply to one question. Raises AttemptFailed."""
        if not question.words or self._log_probs == "top":
            return await self._complete(http, question, (), timeout_s)
        try:
            async with self._learning:
                ids = await self._token_ids(http, question.words, timeout_s)
            reply = await self._complete(http, question, ids, timeout_s)
            if reply.exact or reply.refusal:
                return reply
            raise AttemptFailed("log_probs", f"{self.url} ignores logprob_token_ids", retry="no", blames=False)
        except AttemptFailed as error:
            unsupported = error.cause in ("log_probs", "400", "422", "404", "405")
            if self._log_probs == "ids" or not unsupported:
                raise
        reply = await self._complete(http, question, (), timeout_s)
        log.warning("%s lacks logprob_token_ids: its %d best tokens are read instead", self.url, _TOP)
        self._log_probs = "top"
        return reply

    async def check_model(self, http: httpx.AsyncClient, timeout_s: float) -> None:
        """GET /v1/models. Raises AttemptFailed, or ConfigError when the server has other models."""
        body = await self._exchange(http, "GET", "/v1/models", None, timeout_s, _ANSWER_BYTES)
        names = [model.id for model in _checked(_Models, body, self.url).data]
        if self._model not in names:
            raise ConfigError("model", f"{self.url} does not serve {self._model!r}", f"it has {', '.join(names)}")

    async def _complete(
        self, http: httpx.AsyncClient, question: Question, ids: Sequence[int], timeout_s: float
    ) -> Reply:
        content = await _encoded(question, self._model, ids)
        body = await self._exchange(http, "POST", "/v1/chat/completions", content, timeout_s, _ANSWER_BYTES)
        completion = _checked(_Completion, body, self.url)
        choice, usage = completion.choices[0], completion.usage or _Usage()
        tokens = _first_position(choice, self.url) if question.words else ()
        return Reply(
            text=choice.message.content or "", finish=choice.finish_reason or "stop",
            refusal=choice.message.refusal or ("content filter" if choice.finish_reason == "content_filter" else ""),
            log_probs=tokens, exact=bool(ids and tokens) and _just_these(tokens, question.words),
            tokens_read=usage.prompt_tokens, tokens_written=usage.completion_tokens or 0,
        )  # fmt: skip

    async def _token_ids(self, http: httpx.AsyncClient, words: Sequence[str], timeout_s: float) -> list[int]:
        """Ids of the words' spellings that are single tokens here. Raises AttemptFailed("log_probs") when a word has
        none."""
        spellings = {word: _spellings(word, _TOP // len(words)) for word in words}
        new = [text for texts in spellings.values() for text in texts if text not in self._ids]
        for text, tokens in zip(
            new, await asyncio.gather(*(self._tokenize(http, t, timeout_s) for t in new)), strict=True
        ):
            self._ids[text] = tokens[0] if len(tokens) == 1 else None
        chosen: dict[int, None] = {}
        for word, texts in spellings.items():
            found = [self._ids[text] for text in texts]
            if not any(token is not None for token in found):
                raise AttemptFailed(
                    "log_probs", f"{word!r} is no single token of {self._model}", retry="no", blames=False
                )
            chosen |= {token: None for token in found if token is not None}
        return list(chosen)

    async def _tokenize(self, http: httpx.AsyncClient, text: str, timeout_s: float) -> tuple[int, ...]:
        content = json.dumps({"model": self._model, "prompt": text, "add_special_tokens": False}).encode()
        body = await self._exchange(http, "POST", "/tokenize", content, timeout_s, _ANSWER_BYTES)
        return _checked(_Tokens, body, self.url).tokens


def _spellings(word: str, limit: int) -> list[str]:
    """How a word may begin an answer, the likeliest first."""
    return list(dict.fromkeys([word, word.capitalize(), f" {word}", f" {word.capitalize()}", word.upper()]))[:limit]


async def _encoded(question: Question, model: str, ids: Sequence[int]) -> bytes:
    """The request's body; large pictures are encoded in a thread, so that the event loop goes on."""
    pixels = sum(part.height * part.width for part in question.parts if not isinstance(part, str))
    encode = lambda: json.dumps(chat_body(question, model, ids)).encode()  # noqa: E731
    return await asyncio.to_thread(encode) if pixels > _LARGE_PIXELS else encode()


def chat_body(question: Question, model: str, ids: Sequence[int] = ()) -> dict[str, Any]:
    """The JSON of POST /v1/chat/completions."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": part.data_url}}
        for part in question.parts
    ]
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": content}]
    if question.system:
        messages.insert(0, {"role": "system", "content": question.system})
    body: dict[str, Any] = {
        "model": model, "messages": messages, "max_tokens": question.max_tokens, "temperature": question.temperature,
    }  # fmt: skip
    if question.seed is not None:
        body["seed"] = question.seed
    if question.schema is not None:
        schema = {"name": "verdict", "strict": True, "schema": question.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if question.words:
        body |= {"logprobs": True, "top_logprobs": _TOP}
    if ids:
        body["logprob_token_ids"] = list(ids)
    return body


def _first_position(choice: _Choice, url: str) -> tuple[tuple[str, float], ...]:
    """(token, log-prob) of the first answer token, then its alternatives. Raises AttemptFailed where there are none."""
    positions = choice.logprobs.content if choice.logprobs is not None else None
    if not positions:
        if choice.message.refusal or choice.finish_reason == "content_filter":
            return ()
        raise AttemptFailed(
            "log_probs", f"{url} returns no log-probs: it cannot be this judge", retry="no", blames=False
        )
    first = positions[0]
    chosen = (first.token, first.logprob)
    tokens = [chosen, *(pair for e in first.top_logprobs if (pair := (e.token, e.logprob)) != chosen)]
    total = sum(math.exp(log_prob) for _, log_prob in tokens)
    if total > 1.01:
        raise AttemptFailed("garbage", f"{url} returned log-probs that sum to {total:.3g}")
    return tuple(tokens)


def _just_these(tokens: Sequence[tuple[str, float]], words: Sequence[str]) -> bool:
    """Whether every word came back and, beside the token that was chosen, nothing else: the ids were honoured."""
    wanted = {canonical(word) for word in words}
    alternatives = {canonical(token) for token, _ in tokens[1:]}
    return wanted <= alternatives | {canonical(tokens[0][0])} and alternatives <= wanted


def _checked(kind: type[Any], body: bytes, url: str) -> Any:
    """The answer as `kind`. Raises AttemptFailed for anything else."""
    try:
        return kind.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        problem = "too deep"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))} {first['msg']}"
        raise AttemptFailed("garbage", f"{url} answered nonsense: {problem}"[:300]) from error
