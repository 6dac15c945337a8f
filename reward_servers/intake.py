"""From the bytes of POST /v1/score to batches for the scorer, and from their tables to the bytes of the answer.

Every limit is enforced here: bytes while they stream in, then images, pixels, shapes and types. Nothing is executed on
reading. Raises Refusal with the HTTP status that names the mistake.
Does not own: routes (app), the wire format (contracts.codec, contracts.scores).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from contracts.codec import decode, encode
from contracts.errors import PayloadError
from contracts.scores import ScoreRequest, ScoreResponse, ScoreTable, to_message
from reward_servers.client.tables import join, take
from reward_servers.scorers.base import ScoreBatch, Scorer
from reward_servers.settings import ServerSettings


class Refusal(Exception):
    """A request that is answered with `status` and {"error": message}."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        self.status, self.message, self.retry_after_s = status, message, retry_after_s
        super().__init__(message)


@dataclass(frozen=True)
class Job:
    """One request, cut into batches of one size. order[i]: image of the request that is row i of the joined tables."""

    header: ScoreRequest
    batches: tuple[ScoreBatch, ...]
    order: tuple[int, ...]

    def answer(self, tables: list[ScoreTable]) -> tuple[ScoreTable, bytes]:
        """The request's table, images in their order, and its bytes. Raises PayloadError when parts do not fit."""
        table = tables[0] if len(tables) == 1 else join(tables)
        if self.order != tuple(range(len(self.order))):
            table = take(table, list(np.argsort(self.order)))
        header, arrays = to_message(table)
        return table, encode(ScoreResponse(request_id=self.header.request_id, table=header), arrays)


async def read_body(chunks: AsyncIterator[bytes], declared: str | None, settings: ServerSettings) -> bytes:
    """The whole body. Refuses more than max_body_bytes as soon as that is known, and bodies that take too long."""
    limit = settings.max_body_bytes
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise Refusal(413, f"body of {declared} bytes exceeds the limit of {limit}")
    body = bytearray()
    try:
        async with asyncio.timeout(settings.upload_seconds):
            async for chunk in chunks:
                body += chunk
                if len(body) > limit:
                    raise Refusal(413, f"body exceeds the limit of {limit} bytes")
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {settings.upload_seconds:g} s") from None
    return bytes(body)


def parse(body: bytes, scorer: Scorer, settings: ServerSettings) -> Job:
    """The job in a body. Raises Refusal: 400 unreadable, 409 version gone, 413 too large, 422 does not fit."""
    try:
        header, arrays = decode(body, ScoreRequest)
    except PayloadError as error:
        raise Refusal(400, str(error)) from error
    num_images = len(header.prompts)
    if header.version not in ("latest", scorer.version):
        raise Refusal(409, f"version {header.version!r} is gone; this server has {scorer.version!r}")
    if num_images > settings.images_per_request:
        raise Refusal(413, f"{num_images} images exceed the limit of {settings.images_per_request} a request")
    if num_images == 0:
        raise Refusal(422, "a request needs at least one prompt")
    if header.metadata and len(header.metadata) != num_images:
        raise Refusal(422, f"{len(header.metadata)} metadata entries for {num_images} prompts")
    if header.want_gradients and not scorer.declares.gradients:
        raise Refusal(422, f"scorer {scorer.name!r} offers no gradients")
    latents = scorer.declares.accepts == "latents"
    inputs = _latents(arrays, num_images) if latents else _images(arrays, num_images, settings)
    groups = _by_shape(inputs)
    if len(groups) > 1 and (header.want_gradients or scorer.declares.needs_group):
        raise Refusal(422, "gradients and scores of a whole group need images of one size")
    return _cut(header, inputs, groups, num_images if scorer.declares.needs_group else settings.max_batch)


def _images(arrays: dict[str, np.ndarray], num_images: int, settings: ServerSettings) -> list[np.ndarray]:
    """Each image uint8 [H,W,3], from `images` or from `image_0`, `image_1`, ..."""
    if set(arrays) == {"images"}:
        if arrays["images"].ndim != 4 or len(arrays["images"]) != num_images:
            raise Refusal(422, f"images have shape {arrays['images'].shape} for {num_images} prompts, not [N,H,W,3]")
        images = list(arrays["images"])
    elif set(arrays) == {f"image_{i}" for i in range(num_images)}:
        images = [arrays[f"image_{i}"] for i in range(num_images)]
    else:
        raise Refusal(422, f"expected the array 'images', or 'image_0' to 'image_{num_images - 1}'")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise Refusal(422, f"an image is {image.dtype} {image.shape}, not uint8 [H,W,3]")
        if image.shape[0] * image.shape[1] > settings.max_pixels:
            raise Refusal(413, f"an image of {image.shape[0]}x{image.shape[1]} exceeds {settings.max_pixels} pixels")
    return images


def _latents(arrays: dict[str, np.ndarray], num_images: int) -> list[np.ndarray]:
    if set(arrays) != {"latents"}:
        raise Refusal(422, "this scorer accepts the array 'latents' and nothing else")
    latents = arrays["latents"]
    if latents.ndim != 4 or len(latents) != num_images or latents.dtype.kind != "f" or latents.size == 0:
        raise Refusal(422, f"latents are {latents.dtype} {latents.shape}, not floating [{num_images},C,h,w]")
    return list(latents)


def _by_shape(inputs: list[np.ndarray]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, array in enumerate(inputs):
        groups.setdefault(array.shape, []).append(index)
    return groups


def _cut(header: ScoreRequest, inputs: list[np.ndarray], groups: dict[tuple[int, ...], list[int]], size: int) -> Job:
    batches, order = [], []
    for indices in groups.values():
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            stacked = np.stack([inputs[i] for i in part])
            is_image = stacked.dtype == np.uint8
            batches.append(
                ScoreBatch(
                    stacked if is_image else np.zeros((0, 0, 0, 3), np.uint8),
                    tuple(header.prompts[i] for i in part),
                    tuple(header.metadata[i] if header.metadata else {} for i in part),
                    None if is_image else stacked,
                    header.want_gradients,
                )
            )
            order += part
    return Job(header, tuple(batches), tuple(order))
