"""What is particular to the plain-torch operations; their conformance suite checks the rest."""

from __future__ import annotations

import torch
from torch.nn import functional

from cacheflow.interfaces import OpSpec
from cacheflow.layers.torch_ops import TorchOps


def test_rearranged_bfloat16_weights_give_the_same_products() -> None:
    ops = TorchOps(OpSpec(dtype=torch.bfloat16, device=torch.device("cpu")))
    for num_rows in (0, 1, 16, 33):
        # Columns of a wider tensor, as attention and fused matrices give them.
        x = torch.randn(num_rows, 96).bfloat16()[:, 16:80]
        for out_features in (7, 48):
            weight, bias = torch.randn(out_features, 64).bfloat16(), torch.randn(out_features).bfloat16()
            expected = functional.linear(x.float(), weight.float(), bias.float())
            y = ops.linear(weight, bias)(x)
            assert y.shape == expected.shape
            torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.02)
