"""Stand-in until the blocked backend is written: the reference."""

from cdc_ops.backends.reference import evidential_loss, fused_opinion, fused_topk

__all__ = ["evidential_loss", "fused_opinion", "fused_topk"]
