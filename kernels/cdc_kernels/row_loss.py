"""The evidential loss of every opinion from its row sums, with its gradients, in one small launch."""

import triton
import triton.language as tl

from cdc_kernels.epilogue import dirichlet_loss


@triton.jit
def row_loss_kernel(
    sums_ptr, loss_ptr, grad_ptr, total, K, log_w, kl_weight, FORM: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Owns BLOCK of the opinions. Planes of sums and of their gradients: log_rest, log_target, log_square, kl_sum."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    log_rest = tl.load(sums_ptr + i, mask=mask, other=0.0)
    log_target = tl.load(sums_ptr + total + i, mask=mask, other=0.0)
    log_square = tl.load(sums_ptr + 2 * total + i, mask=mask, other=0.0)
    kl_sum = tl.load(sums_ptr + 3 * total + i, mask=mask, other=0.0)
    loss, g_rest, g_target, g_square, g_kl = dirichlet_loss(
        log_target, log_rest, log_square, kl_sum, log_w, K, kl_weight, FORM, KL
    )
    tl.store(loss_ptr + i, loss, mask=mask)
    tl.store(grad_ptr + i, g_rest, mask=mask)
    tl.store(grad_ptr + total + i, g_target, mask=mask)
    tl.store(grad_ptr + 2 * total + i, g_square, mask=mask)
    tl.store(grad_ptr + 3 * total + i, g_kl, mask=mask)
