"""Tensors in, tensors out: evidence, opinions, fusion, front-door adjustment and losses.

Letters, in code and docstrings: B images, M prompts, K classes, D features; image features x, text features t,
logit z, evidence e, prior weight W, Dirichlet strength S, uncertainty u, belief b, expected probability p, and
the log ratio ``l = ln(1 + e / W)`` in which everything is computed.

Needs only torch.
"""

from cdc_ops.backends import BackendUnavailableError
from cdc_ops.checks import NonFiniteError, value_checks
from cdc_ops.evidence import evidence_from_logits
from cdc_ops.frontdoor import frontdoor_adjust
from cdc_ops.fusion import conflict, discount, fuse_evidence, fuse_log_ratio
from cdc_ops.losses import (
    consistency_loss,
    decoupling_loss,
    dirichlet_cross_entropy,
    evidential_cross_entropy,
)
from cdc_ops.modules import (
    ConsistencyLoss,
    DecouplingLoss,
    EvidenceFusion,
    EvidenceHead,
    EvidentialLoss,
    FrontDoorAggregator,
)
from cdc_ops.opinion import Opinion
from cdc_ops.similarity import FusedOpinion, TopK, fused_opinion, fused_topk

__all__ = [
    "BackendUnavailableError",
    "ConsistencyLoss",
    "DecouplingLoss",
    "EvidenceFusion",
    "EvidenceHead",
    "EvidentialLoss",
    "FrontDoorAggregator",
    "FusedOpinion",
    "NonFiniteError",
    "Opinion",
    "TopK",
    "conflict",
    "consistency_loss",
    "decoupling_loss",
    "dirichlet_cross_entropy",
    "discount",
    "evidence_from_logits",
    "evidential_cross_entropy",
    "frontdoor_adjust",
    "fuse_evidence",
    "fuse_log_ratio",
    "fused_opinion",
    "fused_topk",
    "value_checks",
]
