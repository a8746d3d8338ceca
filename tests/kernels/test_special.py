"""The special functions against scipy in float64, over the range each promises."""

import numpy as np
import pytest
import scipy.special
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from cdc_kernels import special  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def elementwise(x_ptr, y_ptr, out_ptr, n, FUNCTION: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1.0)
    if TWO:  # noqa: SIM108 (a branch at compile time)
        value = FUNCTION(x, tl.load(y_ptr + i, mask=i < n, other=1.0))
    else:
        value = FUNCTION(x)
    tl.store(out_ptr + i, value, mask=i < n)


def apply(function, x, y=None):
    x = torch.as_tensor(x, dtype=torch.float32, device=DEVICE)
    y = x if y is None else torch.as_tensor(y, dtype=torch.float32, device=DEVICE)
    out = torch.empty_like(x)
    elementwise[(triton.cdiv(len(x), 4096),)](x, y, out, len(x), function, y is not x, 4096)
    return out.double().cpu().numpy()


def span(low, high, n=4000):
    """Logarithmically spaced, rounded to float32 first: the truth is taken at the number the kernel sees."""
    x = np.geomspace(low, high, n).astype(np.float32).astype(np.float64)
    return x[(x >= low) & (x <= high)]


def both_signs(low, high):
    return np.concatenate([-span(1e-30, -low), [0.0], span(1e-30, high)])


def large_digamma(t):
    return np.where(t < 300, scipy.special.digamma(np.exp(np.minimum(t, 300))), t)


logs = np.concatenate([np.linspace(np.log(1.1e-30), 60, 4000), span(60, 1e30)]).astype(np.float32).astype(np.float64)
positive = span(1e-30, 1e30)
around = np.concatenate([positive, np.linspace(0.5, 20, 4000).astype(np.float32).astype(np.float64)])
# function, truth, arguments, error allowed relative to |f| (or to max(|f|, 1)), and whether a GPU's exp adds to it
CASES = {
    "log1p_unit": (np.log1p, np.append(span(1e-30, 1), 0.0), 2e-7, "relative"),
    "log1p": (np.log1p, np.append(around, 0.0), 3e-7, "relative"),
    "expm1": (np.expm1, both_signs(-100, 88), 6e-7, "exp"),
    "softplus": (lambda x: np.logaddexp(0, x), both_signs(-87, 1e30), 6e-7, "exp of x < 0"),
    "sigmoid": (scipy.special.expit, both_signs(-87, 1e30), 6e-7, "exp of x < 0"),
    "log_expm1": (lambda x: x + np.log(-np.expm1(-x)), around, 3e-7, "mixed"),
    "lgamma": (scipy.special.gammaln, around, 4e-6, "mixed"),
    "digamma": (scipy.special.digamma, around, 1e-6, "mixed"),
    "trigamma": (lambda x: scipy.special.polygamma(1, x), around[around > 1e-19], 1e-6, "relative"),
    "digamma_of_log": (large_digamma, logs, 1e-6, "mixed"),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_within_what_is_stated(name):
    truth, x, allowed, kind = CASES[name]
    exact = truth(x)
    error = np.abs(apply(getattr(special, name), x) - exact)
    size = np.maximum(np.abs(exact), 1.0 if kind == "mixed" else 0.0)
    if kind.startswith("exp") and DEVICE == "cuda":
        allowed = allowed + 6e-8 * (np.abs(x) if kind == "exp" else np.maximum(-x, 0))
    bad = ~(error <= allowed * size)
    assert not bad.any(), (name, x[bad][:5], exact[bad][:5], (error / size)[bad].max())


def test_logaddexp():
    generator = np.random.default_rng(0)
    size = 10.0 ** generator.uniform(-3, 30, 4000)
    x = (generator.normal(size=4000) * size).astype(np.float32).astype(np.float64)
    y = np.where(np.arange(4000) % 2, x + generator.normal(size=4000), generator.normal(size=4000) * size)
    y = y.astype(np.float32).astype(np.float64)
    exact = np.logaddexp(x, y)
    assert (np.abs(apply(special.logaddexp, x, y) - exact) <= 6e-7 * np.maximum(np.abs(exact), 1)).all()


def test_nothing_stays_nothing():
    nothing = [special.NOTHING.value]
    assert apply(special.logaddexp, nothing, nothing)[0] <= -9e29
    assert apply(special.log_expm1, [0.0])[0] <= -9e29
    assert apply(special.softplus, nothing)[0] == 0
    assert np.isinf(apply(special.trigamma, [1e-25])[0])
