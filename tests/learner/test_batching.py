"""Assembling micro-batches: what is fetched, how rows are laid out, what is refused. About 3 s."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.declarations import ObjectiveNeeds
from contracts.errors import LearnerError
from contracts.wire import GroupHeader, MicroBatchPlan, PromptSpec, Row, Source, UpdatePlan
from learner.batching import EmbeddingCache, StepBatches, array_names, decode_tensor, halves, take
from learner.types import Credit, StepJob
from policy.types import PromptEmbedding

NEEDS = ObjectiveNeeds(states=True, log_probs=True, clean=True)


def header(group: int, **changes: Any) -> GroupHeader:
    return GroupHeader(
        group_id=group, attempt=0, prompt=PromptSpec(text=f"prompt {group}"), group_size=4, weight_version=group,
        prompt_digest=f"d{group}", sigmas=[1.0, 0.5, 0.0], step_indices=[0], **changes,
    )  # fmt: skip


def rows(*of: tuple[int, int, float]) -> tuple[Row, ...]:
    return tuple(Row(group=g, sample=s, weight=w, noise_key=100 * g + s) for g, s, w in of)


def job(headers: list[GroupHeader], *updates: list[list[tuple[Row, ...]]]) -> StepJob:
    """updates: for each, per rank, micro-batches of rows."""
    plans = tuple(
        UpdatePlan(
            ranks=tuple(tuple(MicroBatchPlan(rows=batch) for batch in rank) for rank in update), global_weight=1.0
        )
        for update in updates
    )
    advantages = {h.group_id: np.arange(4.0) + 10 * h.group_id for h in headers}
    return StepJob(1, 2, {h.group_id: h for h in headers}, Credit(advantages), plans)


class Vault:
    """Arrays whose values say where they come from; it counts what is read."""

    def __init__(self) -> None:
        self.reads: list[tuple[Any, ...]] = []

    def fetch(self, group: int, names: tuple[str, ...], samples: slice) -> dict[str, np.ndarray]:
        self.reads.append((group, names, samples.start, samples.stop))
        value = 10.0 * group + np.arange(4, dtype=np.float32)[samples]
        arrays = {
            "clean": value[:, None, None, None],
            "states": np.stack([value, value + 0.5], 1)[..., None, None, None],
            "log_prob_sum": value[:, None],
        }
        for array in arrays.values():
            array.flags.writeable = False  # as arrays from shared memory are
        return {name: arrays[name] for name in names}

    def fetch_embedding(self, digest: str) -> dict[str, np.ndarray]:
        self.reads.append((digest,))
        return {"text": np.full((2, 3), float(digest[1:]), np.float32), "pooled": np.zeros(4, np.float32)}


def no_encoder(text: str) -> PromptEmbedding:
    raise AssertionError(f"asked to encode {text!r}")


def batches(
    of: StepJob, vault: Vault, rank: int = 0, needs: ObjectiveNeeds = NEEDS, encode: Any = no_encoder
) -> StepBatches:
    return StepBatches(
        of, needs, rank, torch.device("cpu"), torch.float32, EmbeddingCache(encode), vault.fetch, vault.fetch_embedding
    )


def test_rows_stand_in_the_order_of_the_plan() -> None:
    vault = Vault()
    plan = rows((1, 2, 1.0), (0, 1, 0.0), (0, 2, 1.0))
    (batch,) = batches(job([header(0), header(1)], [[plan]]), vault).of_update(0)
    assert batch.clean is not None
    assert batch.states is not None
    assert batch.log_prob_sum is not None
    assert batch.clean.flatten().tolist() == [12.0, 1.0, 2.0]
    assert batch.states[:, 1].flatten().tolist() == [12.5, 1.5, 2.5]
    assert batch.log_prob_sum.flatten().tolist() == [12.0, 1.0, 2.0]
    assert batch.advantage.tolist() == [12.0, 1.0, 2.0]
    assert batch.weight.tolist() == [1.0, 0.0, 1.0]
    assert batch.noise_keys == (102, 1, 2)
    assert batch.staleness.tolist() == [1.0, 2.0, 2.0]
    assert batch.cond.text[:, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert [prompt.text for prompt in batch.prompts] == ["prompt 1", "prompt 0", "prompt 0"]
    assert batch.uncond is None
    assert batch.guidance_scale == 1.0
    assert batch.means is None


def test_a_rank_reads_each_group_once_and_its_own_slice_alone() -> None:
    vault = Vault()
    first, second = rows((0, 1, 1.0), (0, 2, 1.0)), rows((0, 3, 1.0))
    other = rows((1, 0, 1.0))
    of = job([header(0), header(1)], [[first], [other]], [[second], [other]], [[first], [other]])
    mine = batches(of, vault)
    for index in range(3):
        mine.of_update(index)
    assert vault.reads == [("d0",), (0, ("clean", "states", "log_prob_sum"), 1, 4)]


def test_prepass_outputs_are_shared_by_updates_of_the_same_rows_and_weights_are_not() -> None:
    valid, padding = rows((0, 0, 1.0)), rows((0, 0, 0.0))
    mine = batches(job([header(0)], [[valid]], [[padding]]), Vault())
    (batch,) = mine.distinct()
    batch.prepass["seen"] = torch.ones(1)
    (first,), (second,) = mine.of_update(0), mine.of_update(1)
    assert "seen" in first.prepass
    assert "seen" in second.prepass
    assert (first.weight.item(), second.weight.item()) == (1.0, 0.0)
    assert (first.update, second.update) == (0, 1)


def test_every_rank_makes_as_many_prepasses() -> None:
    a, b, c = rows((0, 0, 1.0)), rows((0, 1, 1.0)), rows((0, 2, 1.0))
    of = job([header(0)], [[a, b], [c, c]])
    assert [len(batches(of, Vault(), rank).distinct()) for rank in (0, 1)] == [2, 2]


def test_guidance_follows_the_header_unless_the_objective_wants_none() -> None:
    guided = header(0, guidance_scale=4.0, negative_digest="d7")
    of = job([guided], [[rows((0, 0, 1.0))]])
    (batch,) = batches(of, Vault()).of_update(0)
    assert batch.uncond is not None
    assert batch.uncond.text[0, 0, 0] == 7.0
    assert batch.guidance_scale == 4.0
    (batch,) = batches(of, Vault(), needs=NEEDS.model_copy(update={"guidance": "none"})).of_update(0)
    assert batch.uncond is None
    assert batch.guidance_scale == 1.0


@pytest.mark.parametrize("changes", [{"step_indices": [1]}, {"sigmas": [1.0, 0.0]}, {"guidance_scale": 2.0}])
def test_rows_that_differ_in_their_schedule_cannot_share_a_forward(changes: dict[str, Any]) -> None:
    odd = header(1).model_copy(update=changes)
    with pytest.raises(LearnerError, match=f"differ in {next(iter(changes))}"):
        batches(job([header(0), odd], [[rows((0, 0, 1.0), (1, 0, 1.0))]]), Vault()).of_update(0)


def test_the_learners_own_groups_are_encoded_here_once() -> None:
    encoded: list[str] = []

    def encode(text: str) -> PromptEmbedding:
        encoded.append(text)
        return PromptEmbedding(torch.zeros(2, 3), torch.zeros(4))

    own = header(0, source=Source.LEARNER)
    needs = ObjectiveNeeds(reward_gradient=True)
    vault = Vault()
    mine = batches(job([own], [[rows((0, 0, 1.0)), rows((0, 1, 1.0))]]), vault, needs=needs, encode=encode)
    assert len(mine.of_update(0)) == 2
    assert encoded == ["prompt 0"]
    assert array_names(needs) == ()
    assert all(len(read) != 1 for read in vault.reads)


def test_the_embedding_cache_is_bounded() -> None:
    cache, vault = EmbeddingCache(no_encoder, size=2), Vault()
    for digest in ("d1", "d2", "d1", "d3", "d1", "d2"):
        cache.get(digest, "", Source.ACTORS, vault.fetch_embedding)
    assert vault.reads == [("d1",), ("d2",), ("d3",), ("d2",)]


def test_bfloat16_comes_as_bits() -> None:
    values = torch.tensor([1.5, -2.0, 3e38, 1e-30], dtype=torch.bfloat16)
    stored = values.view(torch.uint16).numpy()
    assert torch.equal(decode_tensor(stored, "bfloat16"), values)
    assert decode_tensor(np.arange(3, dtype=np.float32), None).tolist() == [0, 1, 2]
    with pytest.raises(LearnerError, match="bfloat16"):
        decode_tensor(np.zeros(3, np.float32), "bfloat16")
    with pytest.raises(LearnerError, match="no_such"):
        decode_tensor(np.zeros(3, np.float32), "no_such")


@given(size=st.integers(1, 33), pairs=st.booleans())
def test_halves_cover_every_row_once_and_keep_pairs(size: int, pairs: bool) -> None:
    size = 2 * size if pairs else size
    parts = halves(size, pairs)
    assert sorted(row for part in parts for row in part) == list(range(size))
    assert len(parts) == (1 if (size // 2 if pairs else size) < 2 else 2)
    if pairs:
        for part in parts:
            assert [row + size // 2 for row in part[: len(part) // 2]] == part[len(part) // 2 :]


def test_taking_rows_takes_them_of_everything() -> None:
    plan = rows((0, 0, 1.0), (0, 1, 1.0), (0, 2, 0.0))
    (batch,) = batches(job([header(0)], [[plan]]), Vault()).of_update(0)
    batch.prepass["x"] = torch.tensor([5.0, 6.0, 7.0])
    part = take(batch, [2, 0])
    assert part.weight.tolist() == [0.0, 1.0]
    assert part.noise_keys == (2, 0)
    assert part.rows == (plan[2], plan[0])
    assert part.clean is not None
    assert part.clean.flatten().tolist() == [2.0, 0.0]
    assert part.prepass["x"].tolist() == [7.0, 5.0]
    assert len(part.cond) == 2
    assert part.sigmas is batch.sigmas
