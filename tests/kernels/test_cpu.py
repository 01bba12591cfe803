"""The C++ kernels against the reference in float64, at every level of instruction sets that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from cacheflow_kernels import reference
from cacheflow_kernels.accuracy import LIMITS, PAGED_CASES, ROW_SHAPES, PagedCase, PagedInputs, paged_inputs, relative_rms
from cacheflow_kernels.accuracy import rows as rows_of
from cacheflow_kernels.cpu import attention, library, rows
from cacheflow_kernels.ops import REGISTRY

CPU = torch.device("cpu")
DTYPES = tuple(attention.DTYPES)
MACHINE_LEVEL = library.LEVELS.index(library.level()) if not library.reasons() else 0
WIDE_CASES = (
    PagedCase(name="splits of a long decode", query_lens=(1, 1, 1, 1), context_lens=(383, 384, 767, 1300)),
    PagedCase(name="several tiles of a prompt", query_lens=(1, 200), context_lens=(9, 150), num_heads=6, num_kv_heads=2),
    PagedCase(name="a window over splits and tiles", query_lens=(1, 100), context_lens=(1200, 700), window=600),
    PagedCase(name="more heads than a tile has rows", query_lens=(1, 3), context_lens=(70, 5), num_heads=100, num_kv_heads=1),
    PagedCase(name="head size 24, block size 5", query_lens=(1, 9), context_lens=(33, 70), head_size=24, block_size=5),
    PagedCase(name="an odd head size", query_lens=(1, 9), context_lens=(33, 70), head_size=37),
    PagedCase(
        name="long decodes of 3 heads a kv head", query_lens=(1,) * 6, context_lens=(383, 30, 1029, 384, 3, 700), num_heads=6
    ),
    PagedCase(
        name="long decodes of 4 heads, size 96",
        query_lens=(1, 1),
        context_lens=(40, 1100),
        num_heads=8,
        head_size=96,
        block_size=32,
    ),
    PagedCase(name="decodes of 7 heads a kv head", query_lens=(1, 1), context_lens=(600, 77), num_heads=14, head_size=128),
    PagedCase(name="decodes of 9 heads a kv head", query_lens=(1, 1), context_lens=(600, 77), num_heads=18, head_size=256),
    PagedCase(name="a kv head a head, size 128", query_lens=(1, 1), context_lens=(600, 77), num_heads=2, head_size=128),
    PagedCase(
        name="windows that begin inside a block", query_lens=(1, 1, 1), context_lens=(90, 700, 1040), window=76, num_heads=8
    ),
    PagedCase(
        name="alibi and soft cap over splits",
        query_lens=(1, 300),
        context_lens=(1100, 300),
        num_heads=8,
        has_alibi=True,
        soft_cap=3.0,
    ),
)

cases = pytest.mark.parametrize("case", PAGED_CASES + WIDE_CASES, ids=lambda case: case.name.replace(" ", "-"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
pytestmark = pytest.mark.skipif(MACHINE_LEVEL == 0, reason="; ".join(library.reasons()))


@pytest.fixture(params=library.LEVELS[1 : MACHINE_LEVEL + 1] or library.LEVELS[:1])
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    loaded = library.load()
    assert loaded is not None
    loaded.cf_set_level(library.LEVELS.index(request.param))
    yield
    loaded.cf_set_level(MACHINE_LEVEL)


at_every_level = pytest.mark.usefixtures("_level")


def attend(case: PagedCase, inputs: PagedInputs) -> torch.Tensor:
    return attention.paged_attention(*arguments_of(case, inputs))


def arguments_of(case: PagedCase, inputs: PagedInputs) -> tuple[object, ...]:
    return (
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        inputs.block_tables,
        inputs.seq_lens,
        inputs.query_start_loc,
        case.head_size**-0.5,
        case.window,
        inputs.alibi_slopes,
        case.soft_cap,
    )


def torchs_attention(case: PagedCase, inputs: PagedInputs) -> torch.Tensor:
    """torch's own attention, sequence by sequence over gathered blocks; with a soft cap, which it lacks, in plain torch."""
    if case.soft_cap is not None:
        return reference.paged_attention(*arguments_of(case, inputs))
    outs = []
    for i, num_queries in enumerate(case.query_lens):
        length, start = case.context_lens[i] + num_queries, int(inputs.query_start_loc[i])
        blocks = inputs.block_tables[i, : -(-length // case.block_size)].long()
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length] for cache in (inputs.k_cache, inputs.v_cache))
        distance = torch.arange(length)[length - num_queries :, None] - torch.arange(length)
        bias = torch.zeros(case.num_heads, num_queries, length)
        if inputs.alibi_slopes is not None:
            bias -= inputs.alibi_slopes[:, None, None] * distance
        bias.masked_fill_((distance < 0) | (distance >= (case.window or length)), float("-inf"))
        q = inputs.q[start : start + num_queries].transpose(0, 1)[None]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype), enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@at_every_level
@cases
@dtypes
def test_attention_over_a_cache_with_nan_in_unread_slots_is_at_most_twice_as_far_off_as_torchs(
    case: PagedCase, dtype: torch.dtype
) -> None:
    inputs = paged_inputs(case).to(dtype)
    expected = reference.paged_attention(*arguments_of(case, inputs.to(torch.float64)))
    torchs = relative_rms(torchs_attention(case, inputs), expected)
    assert relative_rms(attend(case, inputs), expected) <= max(2 * torchs, LIMITS[dtype] / 2)


@at_every_level
@dtypes
def test_attention_is_as_near_where_later_keys_have_far_greater_scores(dtype: torch.dtype) -> None:
    case = PagedCase(name="", query_lens=(1, 200), context_lens=(900, 400), num_heads=6)
    inputs = paged_inputs(case)
    inputs = PagedInputs(**{**vars(inputs), "k_cache": 20 * inputs.k_cache}).to(dtype)
    expected = reference.paged_attention(*arguments_of(case, inputs.to(torch.float64)))
    torchs = relative_rms(torchs_attention(case, inputs), expected)
    assert relative_rms(attend(case, inputs), expected) <= max(2 * torchs, LIMITS[dtype] / 2)


@at_every_level
@cases
@dtypes
def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch(case: PagedCase, dtype: torch.dtype) -> None:
    inputs = paged_inputs(case).to(dtype)
    together = attend(case, inputs)
    for i, num_queries in enumerate(case.query_lens):
        start = int(inputs.query_start_loc[i])
        alone = PagedInputs(
            q=inputs.q[start : start + num_queries],
            k_cache=inputs.k_cache,
            v_cache=inputs.v_cache,
            block_tables=inputs.block_tables[i : i + 1],
            seq_lens=inputs.seq_lens[i : i + 1],
            query_start_loc=torch.tensor([0, num_queries], dtype=torch.int32),
            alibi_slopes=inputs.alibi_slopes,
        )
        assert torch.equal(attend(case, alone), together[start : start + num_queries])


@at_every_level
@dtypes
def test_attention_gives_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    lens = tuple(37 * i % 600 for i in range(24))
    case = PagedCase(name="", query_lens=(1,) * 23 + (70,), context_lens=lens, num_heads=8)
    inputs, before = paged_inputs(case).to(dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attend(case, inputs)
        torch.set_num_threads(2)
        assert torch.equal(attend(case, inputs), alone)
    finally:
        torch.set_num_threads(before)


@at_every_level
@dtypes
def test_the_cache_may_be_a_slice_of_a_tensor_that_holds_keys_and_values(dtype: torch.dtype) -> None:
    case = PagedCase(name="", query_lens=(1, 20), context_lens=(40, 7))
    inputs = paged_inputs(case).to(dtype)
    both = torch.stack((inputs.k_cache, inputs.v_cache), dim=1)
    sliced = PagedInputs(**{**vars(inputs), "k_cache": both[:, 0], "v_cache": both[:, 1]})
    assert torch.equal(attend(case, sliced), attend(case, inputs))


@dtypes
def test_storing_writes_each_row_to_its_slot_and_skips_padding(dtype: torch.dtype) -> None:
    wide = torch.randn(300, 4, 40).to(dtype)
    k, v = wide[:, :2], wide[:, 2:]
    slots = torch.randperm(320)[:300]
    slots[7] = -1
    caches = [torch.full((40, 2, 8, 40), float("nan"), dtype=dtype) for _ in range(4)]
    attention.store_kv(k, v, caches[0], caches[1], slots)
    reference.store_kv(k, v, caches[2], caches[3], slots)
    for ours, expected in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(ours.nan_to_num(9.0), expected.nan_to_num(9.0))


@dtypes
def test_copied_blocks_are_read_before_any_is_written(dtype: torch.dtype) -> None:
    cache = torch.randn(9, 3, 50).to(dtype)
    before = cache.clone()
    attention.copy_blocks([cache], torch.tensor([[0, 1], [1, 2], [2, 0], [5, 8]]))
    assert torch.equal(cache, before[[2, 0, 1, 3, 4, 5, 6, 7, 5]])


@at_every_level
@shapes
@dtypes
def test_row_operations_are_at_most_twice_as_far_off_as_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wide_weight = 1 + 0.1 * torch.randn(shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight, bias = wide_weight.to(dtype), (wide_weight - 1).to(dtype)
    exact_weight, exact_bias = weight.double(), bias.double()
    for wide in rows_of(shape):
        x = wide.to(dtype)
        exact = x.double()
        gate, up = x.chunk(2, dim=-1)
        for ours, torchs, expected in (
            (
                rows.rms_norm(x, weight, 1e-6),
                functional.rms_norm(x, weight.shape, None, 1e-6) * weight,
                reference.rms_norm(exact, exact_weight, 1e-6),
            ),
            (
                rows.layer_norm(x, weight, bias, 1e-5),
                functional.layer_norm(x, weight.shape, weight, bias, 1e-5),
                reference.layer_norm(exact, exact_weight, exact_bias, 1e-5),
            ),
            (
                rows.layer_norm(x, weight, None, 1e-5),
                functional.layer_norm(x, weight.shape, weight, None, 1e-5),
                reference.layer_norm(exact, exact_weight, None, 1e-5),
            ),
            (rows.silu_and_mul(x), functional.silu(gate) * up, reference.silu_and_mul(exact)),
            (rows.gelu_and_mul(x, "none"), functional.gelu(gate) * up, reference.gelu_and_mul(exact, "none")),
            (
                rows.gelu_and_mul(x, "tanh"),
                functional.gelu(gate, approximate="tanh") * up,
                reference.gelu_and_mul(exact, "tanh"),
            ),
        ):
            assert ours.dtype == dtype
            assert relative_rms(ours, expected) <= max(2 * relative_rms(torchs, expected), LIMITS[dtype] / 2)


@at_every_level
@shapes
@dtypes
def test_fused_add_rms_norm_gives_torchs_sum_and_its_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape[-1]).to(dtype)
    for wide in rows_of(shape):
        x, residual = wide.to(dtype), torch.randn(shape).to(dtype)
        expected = x + residual
        normed, total = rows.fused_add_rms_norm(x.clone(), residual, weight, 1e-6)
        assert torch.equal(total, expected)
        assert torch.equal(normed, rows.rms_norm(expected, weight, 1e-6))


@at_every_level
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("head_size", "rotary_size"), [(64, 64), (80, 32), (6, 2), (128, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotary_rounds_where_torch_does_in_a_narrow_dtype(
    is_neox: bool, head_size: int, rotary_size: int, dtype: torch.dtype
) -> None:
    qkv = torch.randn(7, 5 * head_size).to(dtype)
    q, k = qkv[:, : 3 * head_size], qkv[:, 3 * head_size : 4 * head_size]
    positions, table = torch.arange(7) * 9, torch.rand(64, rotary_size) * 2 - 1
    cos, sin = table[positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)
    expected = []
    for x in (q, k):
        heads = x.unflatten(-1, (-1, head_size)).clone()
        turning = heads[..., :rotary_size]
        halves = turning.chunk(2, dim=-1) if is_neox else (turning[..., ::2], turning[..., 1::2])
        first, second = (half.clone() for half in halves)
        halves[0].copy_(first * cos - second * sin)
        halves[1].copy_(second * cos + first * sin)
        expected.append(heads.flatten(1))
    for out, wanted in zip(rows.rotary(q, k, positions, table, head_size, is_neox), expected, strict=True):
        assert torch.equal(out, wanted)


@at_every_level
@pytest.mark.parametrize("is_neox", [True, False])
def test_rotary_in_float32_stays_within_its_limit(is_neox: bool) -> None:
    q, k, positions, table = torch.randn(40, 192), torch.randn(40, 64), torch.arange(40), torch.rand(64, 64) * 2 - 1
    expected = reference.rotary(q.double(), k.double(), positions, table.double(), 64, is_neox)
    for out, wanted in zip(rows.rotary(q, k, positions, table, 64, is_neox), expected, strict=True):
        assert relative_rms(out, wanted) <= LIMITS[torch.float32]


@at_every_level
def test_activations_of_extreme_gates_are_finite_and_right() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.5, -30.0, -0.0, 0.0, 30.0, 88.5, 200.0, 1e30])
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    for out, expected in (
        (rows.silu_and_mul(x), functional.silu(gate)),
        (rows.gelu_and_mul(x, "none"), functional.gelu(gate)),
        (rows.gelu_and_mul(x, "tanh"), functional.gelu(gate, approximate="tanh")),
    ):
        torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=1e-6)


def test_the_public_operations_prefer_the_compiled_kernels_on_a_cpu() -> None:
    for op in ("paged_attention", "store_kv", "copy_blocks", "rms_norm", "rotary", "silu_and_mul"):
        assert REGISTRY.reasons(op, CPU, torch.bfloat16)["cpu"] == ()
        assert REGISTRY.reasons(op, CPU, torch.float64)["cpu"] != ()
        assert REGISTRY.reasons(op, torch.device("cuda"), torch.bfloat16)["cpu"] == ("cuda is not a CPU",)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k_cache", {"q": torch.zeros(1, 4, 64, dtype=torch.bfloat16)}),
        ("k_cache", {"k_cache": torch.zeros(6, 16, 2, 64).transpose(1, 2)}),
        ("v_cache", {"v_cache": torch.zeros(6, 16, 2, 64).transpose(1, 2)}),
        (
            "k_cache",
            {"q": torch.zeros(1, 4, 257), "k_cache": torch.zeros(6, 2, 16, 257), "v_cache": torch.zeros(6, 2, 16, 257)},
        ),
    ],
)
def test_a_cache_that_the_kernels_cannot_read_is_named(name: str, change: dict[str, torch.Tensor]) -> None:
    case = PagedCase(name="", query_lens=(1,), context_lens=(2,))
    inputs = PagedInputs(**{**vars(paged_inputs(case).to(torch.float32)), **change})
    with pytest.raises(ValueError, match=f"^{name} must"):
        attend(case, inputs)
