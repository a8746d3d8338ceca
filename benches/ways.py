"""Every way of computing an operation: the baselines, written plainly, and our backends.

A way takes image, text and target and returns what the operation gives:

- "opinion": log_ratio [B, K], log_partition [B] and prompt_log_partition [B, M] (docs/mathematics.md, 1);
- "loss gradients": the evidential cross-entropy of every prompt's and the fused opinion (docs/mathematics.md, 5, form
  "digamma") and its gradients by image and text;
- "softmax": cross-entropy of one prompt's logits; "softmax gradients": with its gradients.

exp evidence, Dempster's rule, W = K throughout.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from pairwise import pairwise_dempster
from shapes import SCALE, Inputs, Shape
from torch import Tensor

import cdc_ops

Outputs = Sequence[Tensor]
Way = Callable[[Tensor, Tensor, Tensor], Outputs]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Pieces that a batch is cut into by the ways that are called chunked.
CHUNKS = 8
#: Most bytes of [B, K, K] that pairwise fusion is allowed.
PAIRWISE_BYTES = 4e9


def with_gradients(loss: Loss) -> Way:
    """The loss of a batch and its gradients by image and text."""

    def way(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
        value = loss(image, text, target)
        return value.detach(), *torch.autograd.grad(value, (image, text))

    return way


# ---- the floor --------------------------------------------------------------------------------------------------


def bare_product(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
    """Only the matrix product that every way needs: [B, M K], or [M, B, K] of images for each prompt."""
    if image.dim() == 3:
        return (torch.bmm(image.transpose(0, 1), text.transpose(1, 2)),)
    return (image @ text.flatten(0, 1).T,)


def bare_products(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
    """That product and the two of its backward pass; the product itself stands for its gradient."""
    (z,) = bare_product(image, text, target)
    if image.dim() == 3:
        return z, torch.bmm(z, text), torch.bmm(z.transpose(1, 2), image.transpose(0, 1))
    return z, z @ text.flatten(0, 1), z.T @ image


# ---- plain PyTorch ----------------------------------------------------------------------------------------------


def logits(image: Tensor, text: Tensor, scale: float = SCALE) -> Tensor:
    """z [B, M, K]: the product in the features' dtype, then float32, as one writes it."""
    x, t = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    product = torch.einsum("bd,mkd->bmk" if x.dim() == 2 else "bmd,mkd->bmk", x, t)
    return scale * product.float()


def closed_form(image: Tensor, text: Tensor, scale: float = SCALE) -> tuple[Tensor, Tensor, Tensor]:
    """Dempster's rule in closed form and in log space: log_ratio, log_partition, prompt_log_partition."""
    y = logits(image, text, scale) - math.log(text.shape[1])  # ln(e / W)
    fused = F.softplus(y).sum(1)
    log_fused = fused + torch.log(-torch.expm1(-fused))  # ln expm1(l)
    return fused, F.softplus(log_fused.logsumexp(-1)), F.softplus(y.logsumexp(-1))


def eager_opinion(image: Tensor, text: Tensor, target: Tensor, scale: float = SCALE) -> Outputs:
    return closed_form(image, text, scale)


def digamma_loss(alpha: Tensor, target: Tensor) -> Tensor:
    """``psi(S) - psi(alpha_y)`` [B] of Dirichlet parameters [B, K]."""
    at_target = alpha.gather(1, target[:, None]).squeeze(1)
    return torch.digamma(alpha.sum(-1)) - torch.digamma(at_target)


def eager_loss(image: Tensor, text: Tensor, target: Tensor, scale: float = SCALE) -> Tensor:
    """Evidence in linear space, the fused evidence from the product over prompts."""
    K = text.shape[1]
    e = logits(image, text, scale).exp()
    fused = K * torch.expm1(torch.log1p(e / K).sum(1))
    each = [digamma_loss(alpha, target) for alpha in ((e + 1).unbind(1))]
    return (torch.stack(each).sum(0) + digamma_loss(fused + 1, target)).mean()


def pairwise_alphas(image: Tensor, text: Tensor, scale: float) -> list[Tensor]:
    """Dirichlet parameters [B, K] of each prompt, made one after the other, and of their pairwise fusion."""
    alphas = []
    for m in range(len(text)):
        x = image if image.dim() == 2 else image[:, m]
        alphas.append(logits(x, text[m : m + 1], scale)[:, 0].exp() + 1)
    fused = alphas[0]
    for alpha in alphas[1:]:
        fused = pairwise_dempster(fused, alpha)
    return [*alphas, fused]


def pairwise_opinion(image: Tensor, text: Tensor, target: Tensor, scale: float = SCALE) -> Outputs:
    *alphas, fused = pairwise_alphas(image, text, scale)
    K = text.shape[1]
    totals = [torch.log(alpha.sum(-1) / K) for alpha in alphas]  # -ln u = ln(S / W)
    return torch.log1p((fused - 1) / K), torch.log(fused.sum(-1) / K), torch.stack(totals, 1)


def pairwise_loss(image: Tensor, text: Tensor, target: Tensor, scale: float = SCALE) -> Tensor:
    each = [digamma_loss(alpha, target) for alpha in pairwise_alphas(image, text, scale)]
    return torch.stack(each).sum(0).mean()


def softmax_loss(image: Tensor, text: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((image @ text[0].T).float(), target)


# ---- a batch in pieces ------------------------------------------------------------------------------------------


def pieces(image: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = math.ceil(len(image) / CHUNKS)
    return list(zip(image.split(size), target.split(size), strict=True))


def chunked(way: Way) -> Way:
    """The way on one piece of the batch after the other, results put together."""

    def whole(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
        parts = [way(x, text, y) for x, y in pieces(image, target)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return whole


def chunked_with_gradients(loss: Loss) -> Way:
    """Loss and gradients of one piece of the batch after the other, summed; no piece outlives its gradients."""

    def whole(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
        total = torch.zeros((), device=image.device)
        g_image, g_text = [], torch.zeros_like(text)
        for x, y in pieces(image.detach(), target):
            x.requires_grad_()
            value = loss(x, text, y) * (len(x) / len(image))
            for_x, for_text = torch.autograd.grad(value, (x, text))
            g_image.append(for_x)
            g_text += for_text
            total += value.detach()
        return total, torch.cat(g_image), g_text

    return whole


def chunked_mean(loss: Loss) -> Way:
    def whole(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
        parts = [loss(x, text, y) * (len(x) / len(image)) for x, y in pieces(image, target)]
        return (torch.stack(parts).sum(),)

    return whole


# ---- ours -------------------------------------------------------------------------------------------------------


def softmax_prior(K: int) -> float:
    """A prior weight so small that ``ln S - ln alpha_y`` is softmax cross-entropy to rounding.

    ``alpha_k = exp(z_k) + W / K`` and logits lie within the scale, so ``W = K eps exp(-scale)`` changes no alpha by
    more than a rounding error of float32.
    """
    return K * torch.finfo(torch.float32).eps * math.exp(-SCALE)


def our_opinion(backend: str, scale: float = SCALE) -> Way:
    def way(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
        opinion = cdc_ops.fused_opinion(image, text, scale=scale, backend=backend)
        return opinion.log_ratio, opinion.log_partition, opinion.prompt_log_partition

    return way


def our_loss(backend: str, scale: float = SCALE) -> Loss:
    def loss(image: Tensor, text: Tensor, target: Tensor) -> Tensor:
        return cdc_ops.evidential_cross_entropy(image, text, target, scale=scale, backend=backend)

    return loss


def our_softmax(backend: str) -> Loss:
    """Softmax cross-entropy as the evidential loss of one prompt: form "log", exp evidence, next to no prior."""

    def loss(image: Tensor, text: Tensor, target: Tensor) -> Tensor:
        return cdc_ops.evidential_cross_entropy(
            image, text, target, scale=1.0, normalize=False, form="log", prior_weight=softmax_prior(text.shape[1]),
            fused_weight=0.0, backend=backend,
        )  # fmt: skip

    return loss


def along_path(path: str | None, way: Way) -> Way:
    """The way with the kernels' path forced, and values not checked, which on a GPU waits for the answer."""

    def forced(image: Tensor, text: Tensor, target: Tensor) -> Outputs:
        from cdc_kernels import configs

        with cdc_ops.value_checks(False), configs.force_path(path) if path else nullcontext():
            return way(image, text, target)

    return forced


# ---- peers on S6 ------------------------------------------------------------------------------------------------


def torch_linear_cross_entropy(chunks: bool) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions() if chunks else None

    def loss(image: Tensor, text: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(image, text[0], target, options=options)

    return loss


def cut_cross_entropy(image: Tensor, text: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(image, text[0], target)


def liger_cross_entropy(image: Tensor, text: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(text[0], image, target)


# ---- which ways there are ---------------------------------------------------------------------------------------


def ways(shape: Shape, operation: str, device: str, compiled: bool = True) -> tuple[dict[str, Way], dict[str, str]]:
    """Ways by name, and those left out with the reason. device: "cuda", "cpu" or "interpreter"."""
    gradients = "gradients" in operation
    finish: Callable[[Loss], Way] = with_gradients if gradients else lambda loss: lambda *given: (loss(*given),)
    found: dict[str, Way] = {"bare product": bare_products if gradients else bare_product}
    left_out: dict[str, str] = {}
    triton_runs = device != "cpu"

    eager_opinion_here = partial(eager_opinion, scale=shape.scale)
    eager_loss_here = softmax_loss if shape.softmax else partial(eager_loss, scale=shape.scale)
    opinion = operation == "opinion"
    if not shape.softmax:
        if shape.B * shape.K**2 * 4 <= PAIRWISE_BYTES:
            in_tables = partial(pairwise_opinion, scale=shape.scale)
            found["pairwise"] = in_tables if opinion else finish(partial(pairwise_loss, scale=shape.scale))
        else:
            left_out["pairwise"] = f"one table [B, K, K] takes {shape.B * shape.K**2 * 4 / 1e9:.0f} GB"
    found["eager"] = eager_opinion_here if opinion else finish(eager_loss_here)
    if compiled:
        if opinion:
            fast = torch.compile(eager_opinion_here, dynamic=False)
            found["compiled"], in_pieces = fast, chunked(fast)
        else:
            fast_loss = torch.compile(eager_loss_here, dynamic=False)
            found["compiled"] = finish(fast_loss)
            in_pieces = chunked_with_gradients(fast_loss) if gradients else chunked_mean(fast_loss)
        if shape.B >= 8 * CHUNKS:
            found["compiled, chunked"] = in_pieces
        else:
            left_out["compiled, chunked"] = f"{shape.B} images are not worth {CHUNKS} pieces"
    if shape.softmax:
        add_peers(found, left_out, finish, device)

    def ours(backend: str) -> Way:
        if opinion:
            return our_opinion(backend, shape.scale)
        return finish(our_softmax(backend) if shape.softmax else our_loss(backend, shape.scale))

    found |= {"reference": ours("reference"), "blocked": ours("blocked")}
    if triton_runs:
        from cdc_kernels import configs

        found["triton"] = ours("triton")
        for path in configs.PATHS:
            found[f"triton, {path}"] = along_path(path, ours("triton"))
    else:
        left_out["triton"] = "its kernels run on a GPU, or in the interpreter (--device interpreter)"
    return found, left_out


def add_peers(found: dict[str, Way], left_out: dict[str, str], finish: Callable[[Loss], Way], device: str) -> None:
    """Other libraries' fused linear cross-entropies, where they are installed and run."""
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = finish(torch_linear_cross_entropy(False))
        found["F.linear_cross_entropy, chunked"] = finish(torch_linear_cross_entropy(True))
    else:
        left_out["F.linear_cross_entropy"] = f"PyTorch {torch.__version__} has none with chunks"
    for name, module, loss in (
        ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
        ("Liger", "liger_kernel", liger_cross_entropy),
    ):
        if importlib.util.find_spec(module) is None:
            left_out[name] = "not installed: pip install 'cdc-ops[bench]'"
        elif device != "cuda":
            left_out[name] = "its kernels run on a GPU only"
        else:
            found[name] = finish(loss)


# ---- the truth --------------------------------------------------------------------------------------------------


def truth(shape: Shape, operation: str, inputs: Inputs) -> list[Tensor]:
    """What the operation gives, in float64, by the reference backend on a few images at a time."""
    image, text = inputs.image.detach().double(), inputs.text.detach().double()
    if "gradients" in operation:
        text.requires_grad_()
    step = max(1, 2**23 // (shape.M * shape.K))
    parts, total, g_text = [], torch.zeros((), dtype=torch.float64, device=image.device), torch.zeros_like(text)
    for rows in (slice(first, first + step) for first in range(0, shape.B, step)):
        x, y = image[rows], inputs.target[rows]
        if operation == "opinion":
            parts.append(our_opinion("reference", shape.scale)(x, text, y))
            continue
        x.requires_grad_("gradients" in operation)
        if shape.softmax:
            value = F.cross_entropy(x @ text[0].T, y, reduction="sum") / shape.B
        else:
            value = our_loss("reference", shape.scale)(x, text, y) * (len(x) / shape.B)
        total += value.detach()
        if "gradients" in operation:
            for_x, for_text = torch.autograd.grad(value, (x, text))
            g_text += for_text
            parts.append((for_x,))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if operation == "opinion":
        return columns
    return [total, *columns, g_text] if "gradients" in operation else [total]


def relative_error(results: Outputs, exact: Sequence[Tensor]) -> float:
    """Largest over the results of ``|result - exact| / |exact|``, Euclidean norms."""
    errors = [
        float(torch.linalg.vector_norm(a.detach().double() - b) / torch.linalg.vector_norm(b))
        for a, b in zip(results, exact, strict=True)
    ]
    return max(errors) if all(math.isfinite(e) for e in errors) else math.inf
