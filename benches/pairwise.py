"""Dempster's rule two opinions at a time, as Trusted Multi-View Classification writes it: a table of K x K products."""

import torch
from torch import Tensor


def pairwise_dempster(first: Tensor, second: Tensor) -> Tensor:
    """Dempster's rule on the Dirichlet parameters [B, K] of two opinions, by their table of products [B, K, K]."""
    K = first.shape[-1]
    s1, s2 = first.sum(-1, keepdim=True), second.sum(-1, keepdim=True)
    b1, b2, u1, u2 = (first - 1) / s1, (second - 1) / s2, K / s1, K / s2
    products = b1.unsqueeze(2) @ b2.unsqueeze(1)
    conflict = products.sum((1, 2)) - torch.diagonal(products, dim1=1, dim2=2).sum(-1)
    agreement = (1 - conflict).unsqueeze(-1)
    b, u = (b1 * b2 + b1 * u2 + b2 * u1) / agreement, u1 * u2 / agreement
    return b * (K / u) + 1
