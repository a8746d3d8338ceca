"""One pre-norm transformer block as a function over open_clip's weights, with the attention pattern left open.

Both towers share this file. A tower decides who attends to whom by the `attend` function that it hands over; the
linear layers see tokens in any layout, so a tower may pack its tokens as it likes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from cdc_models.clip.anatomy import OpenClip

QUICK = 1.702
"""The constant of QuickGELU."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [..., tokens, heads, head_dim] -> the attended values, shaped like q."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention over tensors laid out [N, tokens, heads, head_dim]; `mask` True = may attend."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(-3, -2)


def run_block(block: OpenClip, x: Tensor, attend: Attend, queries: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """One residual attention block of open_clip (default or custom) in evaluation mode.

    x: [..., tokens, W]. `queries` picks the tokens whose output is wanted (a tower's last block is only read where
    it is pooled); every token still gives its key and value. Returns [..., wanted tokens, W].
    """
    attn = block.attn
    weight, bias, width = attn.in_proj_weight, attn.in_proj_bias, x.size(-1)
    h = block.ln_1(x)
    if queries is None:
        q, k, v = F.linear(h, weight, bias).chunk(3, dim=-1)
    else:
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(queries(h), weight[:width], q_bias)
        k, v = F.linear(h, weight[width:], kv_bias).chunk(2, dim=-1)
        x = queries(x)
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)) for t in (q, k, v))

    own = not isinstance(attn, nn.MultiheadAttention)  # open_clip's own Attention has a few more, mostly idle, parts
    if own:
        q, k = attn.ln_q(q), attn.ln_k(k)
    y = attend(q, k, v)
    if own and attn.head_scale is not None:
        y = y * attn.head_scale.squeeze(-1)  # [heads, 1]
    y = y.flatten(-2)
    y = block.ln_attn(attn.out_proj(attn.ln_inner(y))) if own else attn.out_proj(y)

    x = x + block.ls_1(y)
    return x + block.ls_2(mlp(block.mlp, block.ln_2(x)))


def mlp(layers: OpenClip, x: Tensor) -> Tensor:
    """The two linear layers of a block and what lies between them.

    QuickGELU, three passes over memory forward and five backward as open_clip writes it, is
    ``x sigmoid(c x) = silu(c x) / c``: one pass each way, for the products scale on their way.
    """
    if [type(layer) for layer in layers] != [nn.Linear, QuickGELU, nn.Linear]:
        return layers(x)
    wide, _, narrow = layers
    rows = x.flatten(0, -2)
    h = F.silu(torch.addmm(QUICK * wide.bias, rows, wide.weight.T, alpha=QUICK))
    # not addmm's alpha: in the backward pass it would scale a gradient of the wide layer's size
    return F.linear(h, narrow.weight, QUICK * narrow.bias).mul(1 / QUICK).unflatten(0, x.shape[:-1])
