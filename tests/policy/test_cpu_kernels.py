"""What a CPU computes in another way is the same computation."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import gelu, scaled_dot_product_attention

from policy.cpu_kernels import CpuKernels, last_key_stands_for, plain_attention, repeated_tail
from policy.policy import Policy
from policy.types import EmbeddingBatch


def _heads(dtype: torch.dtype = torch.float32, keys: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(2, 3, tokens, 8, generator=generator).to(dtype).requires_grad_() for tokens in (5, keys, keys)
    )


def test_plain_attention_is_attention_and_has_its_gradients() -> None:
    inputs = _heads()
    plain, fused = plain_attention(*inputs), scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(plain.square().sum(), inputs),
        torch.autograd.grad(fused.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_attention_keeps_its_dtype_and_stays_near_fp32() -> None:
    out = plain_attention(*_heads(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), scaled_dot_product_attention(*_heads()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.eye(5).bool()}])
def test_masked_and_causal_calls_go_to_the_fused_kernel(options: dict[str, object]) -> None:
    query, key, value = _heads(keys=5)
    with CpuKernels():
        within = scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(within, scaled_dot_product_attention(query, key, value, **options))
    assert not torch.allclose(within, plain_attention(query, key, value))


def test_calls_without_gradients_go_to_the_fused_kernel() -> None:
    query, key, value = (part.detach().bfloat16() for part in _heads())
    with CpuKernels(), torch.no_grad():
        within = scaled_dot_product_attention(query, key, value)
    assert torch.equal(within, scaled_dot_product_attention(query, key, value))


def test_gelu_by_erf_stands_in_for_tanh_within_bf16_resolution() -> None:
    x = torch.linspace(-6, 6, 10_001)
    with CpuKernels():
        within = gelu(x, approximate="tanh")
    assert torch.equal(within, gelu(x))
    assert (within - gelu(x, approximate="tanh")).abs().max() < 5e-4


@pytest.mark.parametrize("plain", [False, True])
def test_a_key_that_stands_for_others_is_attention_to_all_of_them(plain: bool) -> None:
    query, key, value = _heads()
    full_key, full_value = (torch.cat([part, part[..., -1:, :].expand(-1, -1, 3, -1)], -2) for part in (key, value))
    with last_key_stands_for(4):
        merged = (plain_attention if plain else scaled_dot_product_attention)(query, key, value)
    full = scaled_dot_product_attention(query, full_key, full_value)
    torch.testing.assert_close(merged, full, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (merged, full)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_key_stands_for_itself_alone_afterwards_and_masks_are_refused() -> None:
    query, key, value = _heads()
    before = scaled_dot_product_attention(query, key, value)
    with last_key_stands_for(4), pytest.raises(TypeError, match="more than once"):
        scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(scaled_dot_product_attention(query, key, value), before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_repeated_tail_is_what_every_row_repeats(count: int) -> None:
    text = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
    text[:, 8 - count :] = text[:, -1:]
    text[0, 0] = text[0, -1]  # an equal token elsewhere does not count
    assert repeated_tail(text) == count
    if count > 1:
        text[1, 8 - count] += 1
        assert repeated_tail(text) == count - 1


@pytest.mark.parametrize(("autocast", "close"), [(False, 1e-5), (True, 0.05)])
def test_the_network_gives_the_same_velocity_and_gradients_with_repeats_computed_once(
    load_policy: Callable[..., Policy], disturb: Callable[..., Policy], autocast: bool, close: float
) -> None:
    policy = disturb(load_policy(autocast=autocast))
    assert policy.family.merge_repeats
    cond = EmbeddingBatch.stack([policy.encode_prompt(text) for text in ("a red circle", "two blue squares")],
                                "cpu", torch.float32)  # fmt: skip
    assert repeated_tail(cond.text) > 1
    x, s = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2)), torch.tensor([0.9, 0.4])
    results = []
    for merge in (True, False):
        policy.family.merge_repeats = merge
        policy.module.zero_grad()
        velocity = policy.velocity(x, s, cond)
        velocity.square().sum().backward()
        with torch.no_grad():
            painted = policy.velocity(x, s, cond)
        gradient = torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None])
        results.append((velocity.detach(), painted, gradient))
    for merged, whole in zip(*results, strict=True):
        assert (merged - whole).norm() <= close * whole.norm()
    policy.family.merge_repeats = True


def test_repeats_are_left_alone_with_gradient_checkpointing(load_policy: Callable[..., Policy]) -> None:
    assert not load_policy(gradient_checkpointing=True).family.merge_repeats
