"""An attention backend of the engine that serves whole prompts through xformers, as the original cacheflow did.

Prompts of which nothing is cached go through `memory_efficient_attention` under one block-diagonal causal mask; decodes and
chunks behind cached tokens go to the Triton kernels, which own the layout of the cache. This module imports no xformers until a
prompt needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from cacheflow_kernels.attention import TritonAttention, TritonPlan


@dataclass(frozen=True)
class XformersPlan:
    """What a step's layers share.

    Attributes:
        rest: What the Triton kernels serve; with the slots of all tokens. None: nothing.
        masks: By window, the mask over all whole prompts one after the other; empty: there is none.
        prompt_rows: `[num_rows] int64`: the prompts' tokens; None: all tokens, or none.
        rest_rows: The other tokens, likewise.
        slot_mapping: Of all tokens.
    """

    rest: TritonPlan | None
    masks: dict[int | None, Any]
    prompt_rows: Tensor | None
    rest_rows: Tensor | None
    slot_mapping: Tensor


def prompt_mask(lens: list[int], window: int | None, device: torch.device) -> Any:
    """The mask under which whole prompts of these lengths, one after the other, attend causally to themselves."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    mask = BlockDiagonalCausalMask.from_seqlens(lens, device=device)
    return mask if window is None else mask.make_local_attention(window)


class XformersAttention:
    """Whole prompts through `memory_efficient_attention`, everything else through `TritonAttention`."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 5

    @classmethod
    def supports(cls, spec: Any) -> tuple[str, ...]:
        """What it takes from both: 16-bit types, a CUDA device, and scores without ALiBi or a soft cap."""
        found = list(TritonAttention.supports(spec))
        if find_spec("xformers") is None:
            found.append("xformers is not installed (pip install 'cacheflow-kernels[xformers]')")
        if spec.device.type != "cuda" and not any("CUDA device" in reason for reason in found):
            found.append(f"xformers' attention needs a CUDA device, not {spec.device}")
        if spec.dtype not in (torch.float16, torch.bfloat16):
            found.append(f"xformers' fast attention needs float16 or bfloat16, not {spec.dtype}")
        if spec.head_size % 8:
            found.append(f"xformers needs a head size that is a multiple of 8, not {spec.head_size}")
        if any(layer.alibi_slopes is not None for layer in spec.attention):
            found.append("has no ALiBi")
        if any(layer.soft_cap is not None for layer in spec.attention):
            found.append("has no soft cap")
        return tuple(found)

    def __init__(self, spec: Any) -> None:
        self._spec = spec
        self._triton = TritonAttention(spec)
        self.kv_shape = self._triton.kv_shape
        self.copy_blocks = self._triton.copy_blocks
        self.swap_blocks = self._triton.swap_blocks

    def plan(self, metadata: Any, into: XformersPlan | None = None) -> XformersPlan:
        """Reads the lengths back to find whole prompts. Only batches without any can be refilled: masks follow the lengths."""
        starts, lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        counts = [stop - start for start, stop in pairwise(starts)]
        prompts = [i for i, length in enumerate(lens) if length == counts[i] > 1]
        if not prompts:
            refilled = None
            if into is not None:
                if into.masks or into.rest is None:
                    raise ValueError("A plan that holds whole prompts can't be refilled: capture only batches without them.")
                refilled = into.rest
            rest = self._triton.plan(metadata, refilled)
            return XformersPlan(rest, {}, None, None, rest.slot_mapping)
        if into is not None:
            raise ValueError(f"A batch with {len(prompts)} whole prompts can't refill a plan: plan it anew.")
        windows = {layer.window for layer in self._spec.attention}
        prompt_lens = [lens[i] for i in prompts]
        masks = {window: prompt_mask(prompt_lens, window, self._spec.device) for window in windows}
        others = [i for i in range(len(lens)) if counts[i] and i not in set(prompts)]
        if not others:
            return XformersPlan(None, masks, None, None, metadata.slot_mapping)
        prompt_rows, rest_rows = (
            torch.tensor([row for i in part for row in range(starts[i], starts[i + 1])], device=self._spec.device)
            for part in (prompts, others)
        )
        rest_starts = torch.tensor([0, *(counts[i] for i in others)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        chosen = torch.tensor(others, device=self._spec.device)
        rest = TritonPlan(
            query_start_loc=rest_starts.to(self._spec.device),
            seq_lens=metadata.seq_lens[chosen],
            block_tables=metadata.block_tables[chosen],
            slot_mapping=metadata.slot_mapping,
            num_decodes=sum(counts[i] == 1 for i in others),
            max_query_len=max(counts[i] for i in others),
        )
        return XformersPlan(rest, masks, prompt_rows, rest_rows, metadata.slot_mapping)

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, plan: XformersPlan) -> Tensor:
        """Stores everything, then serves each part its own way."""
        self._triton.store(k, v, kv, plan.slot_mapping)
        if plan.rest is None:
            return self._attend_prompts(layer, q, k, v, plan.masks[layer.window])
        if not plan.masks:
            return self._triton.attend(layer, q, kv, plan.rest)
        rows = plan.prompt_rows
        assert rows is not None, "a plan with both parts has the rows of both"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out[rows] = self._attend_prompts(layer, q[rows], k[rows], v[rows], plan.masks[layer.window])
        out[plan.rest_rows] = self._triton.attend(layer, q[plan.rest_rows], kv, plan.rest)
        return out

    def _attend_prompts(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Query heads of one kv head form an axis of their own, along which keys and values are not copied."""
        from xformers.ops import memory_efficient_attention_forward

        grouped = q.unflatten(1, (k.shape[1], -1))
        keys, values = (x[:, :, None].expand(grouped.shape) for x in (k, v))
        out = memory_efficient_attention_forward(grouped[None], keys[None], values[None], attn_bias=mask, scale=layer.scale)
        result: Tensor = out.reshape(q.shape)
        return result
