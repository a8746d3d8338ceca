"""The operators as PyTorch sees them: opcheck, tracing, autocast, bad input, absence of Triton."""

import math
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")

from cdc_kernels import configs, launch, launch_small, ops  # noqa: E402
from cdc_kernels.fused_opinion import forward_kernel  # noqa: E402

from cdc_ops import (  # noqa: E402
    BackendUnavailableError,
    decoupling_loss,
    evidential_cross_entropy,
    fuse_evidence,
    fused_opinion,
    fused_topk,
    value_checks,
)
from cdc_ops.dirichlet import RowSums, loss_from_row_sums  # noqa: E402
from cdc_ops.special import kl_element  # noqa: E402

both_paths = pytest.mark.parametrize("path", configs.PATHS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU instead")


@pytest.fixture(autouse=True)
def device():
    """Every tensor where the kernels run."""
    with torch.device(DEVICE):
        yield


def inputs(B=2, M=2, K=5, D=6, grad=True, bias=True):
    g = torch.Generator(DEVICE).manual_seed(0)
    x, t = torch.randn(B, D, generator=g), torch.randn(M, K, D, generator=g)
    scale, shift = torch.linspace(1, 3, M), torch.linspace(-1, 1, M) if bias else None
    lengths = x.norm(dim=-1), t.norm(dim=-1)
    leaves = [v if v is None else v.requires_grad_(grad) for v in (x, t, scale, shift)]
    return *leaves, *lengths


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_row_sums(bias):
    target = torch.tensor([1, 4])
    options = ("exp", "dempster", 5.0, 5, True, True, True, True)
    torch.library.opcheck(ops.row_sums, (*inputs(bias=bias), None, target, *options))


@both_paths
def test_opcheck_row_sums_of_prompts_alone(path):
    with configs.force_path(path):
        torch.library.opcheck(
            ops.row_sums, (*inputs(), None, None, "softplus", "cumulative", 5.0, 5, False, False, False, False)
        )


@both_paths
def test_opcheck_backward(path):
    x = inputs(grad=False)
    planes, ratio = torch.rand(7, 3, 2), torch.rand(2, 5)
    options = ("exp", "weighted", 5.0, 5, False, False)
    arguments = (*x, torch.rand(2, 2), None, *options, planes, ratio, None, True, False, True, True)
    with configs.force_path(path):
        torch.library.opcheck(ops.row_sums_backward, arguments)


@pytest.mark.parametrize("form", ["digamma", "log", "mse"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_row_loss_of_far_opinions(form, kl_weight):
    """Every form over evidence from 1e-8 to e^100 on and off the target, against the reference in float64."""
    K, W = 5, 3.0
    g = torch.Generator(DEVICE).manual_seed(0)
    log_target, log_alpha = 60 * torch.randn(2, 400, generator=g), 60 * torch.randn(4, 400, generator=g)
    floor = torch.tensor(1 / K).log()  # alpha is never below W / K
    log_target, log_alpha = log_target[0].clamp_min(floor), log_alpha.clamp_min(floor)
    kl_sum = kl_element((log_alpha + math.log(W)).double()).sum(0).float()
    parts = [log_alpha.logsumexp(0), log_target, (2 * log_alpha).logsumexp(0), kl_sum]
    mine_in = torch.stack(parts)[:, None].requires_grad_()
    right_in = [v.double().requires_grad_() for v in parts]
    mine, _ = ops.row_loss(mine_in, K, W, form, kl_weight)
    rest, target, square, kl = right_in
    right = loss_from_row_sums(RowSums(target, rest, square, kl), K, W, form, kl_weight)
    torch.testing.assert_close(mine[0].double(), right, rtol=2e-5, atol=1e-6)
    mine.sum().backward()
    slopes = torch.autograd.grad(right.sum(), right_in, allow_unused=True)
    for ours, theirs in zip(mine_in.grad[:, 0], slopes, strict=True):
        theirs = torch.zeros(400, dtype=torch.float64) if theirs is None else theirs
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-6)


def test_opcheck_row_loss():
    torch.library.opcheck(ops.row_loss, (torch.rand(4, 3, 2, requires_grad=True), 5, 5.0, "digamma", 0.5))


def test_opcheck_topk():
    torch.library.opcheck(ops.topk, (*inputs(grad=False), None, None, "exp", "dempster", 5.0, 5, False, False, 2))


def fused_loss(x, t, scale, bias, backend):
    o = fused_opinion(x, t, scale=scale, bias=bias, backend=backend)
    target = torch.tensor([1, 4])
    loss = evidential_cross_entropy(x, t, target, scale=scale, bias=bias, form="log", backend=backend)
    return loss + o.log_ratio.sum() + o.prompt_log_partition.sum()


@pytest.mark.parametrize("backend", ["reference", "triton", None])
def test_compiled_by_inductor_twice(backend):
    """fullgraph: no break; the second use takes the compiled code, with the numbers of eager mode."""
    leaves = list(inputs()[:4])
    right = fused_loss(*leaves, backend)
    right_gradients = torch.autograd.grad(right, leaves)
    compiled = torch.compile(fused_loss, fullgraph=True)
    torch._dynamo.reset()
    for _ in range(2):
        mine = compiled(*leaves, backend)
        torch.testing.assert_close(mine, right)
        for a, b in zip(torch.autograd.grad(mine, leaves), right_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_operations_on_ready_made_tensors_compiled_by_inductor_twice(backend):
    e, t = torch.rand(3, 2, 5, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)

    def both(e, t):
        fused = fuse_evidence(e, 1, "weighted", backend=backend)
        return fused.sum() + decoupling_loss(t, "cosine_squared", backend=backend)

    compiled = torch.compile(both, fullgraph=True)
    right = both(e, t)
    right_gradients = torch.autograd.grad(right, [e, t])
    for _ in range(2):
        mine = compiled(e, t)
        torch.testing.assert_close(mine, right)
        for a, b in zip(torch.autograd.grad(mine, [e, t]), right_gradients, strict=True):
            torch.testing.assert_close(a, b)


def row_loss_of(sums, backend):
    return ops.row_loss(sums, 5, 5.0, "log", 0.0)[0].sum()


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, backend: fused_opinion(x, torch.eye(3, 6)[None], scale=1.0, backend=backend).prob.sum(), (2, 6)),
        (lambda e, backend: fuse_evidence(e, 1, "weighted", backend=backend).sum(), (2, 3, 5)),
        (lambda t, backend: decoupling_loss(t, backend=backend), (2, 3, 4)),
        (row_loss_of, (4, 3, 2)),
    ],
)
def test_second_derivatives_are_refused_in_one_sentence(function, shape):
    x = torch.rand(shape, requires_grad=True)
    torch.autograd.grad(function(x, "triton"), x)
    with pytest.raises(NotImplementedError, match="'triton' has no second derivatives.*backend='reference'"):
        torch.autograd.grad(function(x, "triton"), x, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    x, t, *_ = inputs()

    def loss(t):
        return evidential_cross_entropy(x, t, torch.tensor([1, 4]), scale=2.0, backend="triton")

    (right,) = torch.autograd.grad(loss(t), t)
    again = t.detach().clone().requires_grad_()
    checkpoint(loss, again, use_reentrant=use_reentrant).backward()
    assert torch.equal(again.grad, right)


def test_autocast_changes_nothing():
    x, t, scale, bias, *_ = inputs(grad=False)
    right = fused_opinion(x, t, scale=scale, bias=bias, backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        mine = fused_opinion(x, t, scale=scale, bias=bias, backend="triton")
    assert mine.log_ratio.dtype == torch.float32 and torch.equal(mine.log_ratio, right.log_ratio)


def test_inference_mode():
    x, t, scale, *_ = inputs(grad=False)
    with torch.inference_mode():
        assert fused_topk(x, t, 2, scale=scale, backend="triton").classes.shape == (2, 2)


def test_mixed_feature_dtypes_are_promoted():
    x, t, scale, *_ = inputs(grad=False)
    t = t.bfloat16()
    mine = fused_opinion(x, t, scale=scale, backend="triton").log_ratio
    torch.testing.assert_close(mine, fused_opinion(x, t, scale=scale, backend="reference").log_ratio)


def test_no_images():
    _, t, scale, *_ = inputs()
    none = torch.empty(0, 6, requires_grad=True)
    o = fused_opinion(none, t, scale=scale, backend="triton")
    assert o.log_ratio.shape == (0, 5) and o.prompt_uncertainty.shape == (0, 2)
    top = fused_topk(none, t, 3, scale=scale, backend="triton")
    assert top.classes.shape == (0, 3) and top.uncertainty.shape == (0,)
    nothing = torch.empty(0, dtype=torch.long)
    loss = evidential_cross_entropy(none, t, nothing, scale=scale, reduction="sum", backend="triton")
    loss.backward()
    assert loss == 0 and t.grad is not None and (t.grad == 0).all() and none.grad is not None
    each = evidential_cross_entropy(none, t, nothing, scale=scale, reduction="none", backend="triton")
    assert each.shape == (0,)
    with pytest.raises(ValueError, match="mean"):
        evidential_cross_entropy(none, t, nothing, scale=scale, backend="triton")


@pytest.mark.parametrize("operation", ["opinion", "topk", "loss"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, t: (x[:, :3], t), "image must have shape"),
        (lambda x, t: (x[None, None], t), "image must have shape"),
        (lambda x, t: (x, t[0]), "text must have shape"),
        (lambda x, t: (x, t[:, :0]), "text must have shape"),
        (lambda x, t: (x, t[:0]), "text must have shape"),
        (lambda x, t: (x * math.nan, t), "image must be finite"),
        (lambda x, t: (x, t / 0), "text must be finite"),
        (lambda x, t: (x.to("meta"), t), "device"),
        (lambda x, t: (x.long(), t), "image must be a floating-point tensor"),
    ],
)
def test_bad_features(change, words, operation):
    x, t = change(*inputs(grad=False)[:2])
    with pytest.raises(ValueError, match=words):
        if operation == "opinion":
            fused_opinion(x, t, scale=2.0, backend="triton")
        elif operation == "topk":
            fused_topk(x, t, 2, scale=2.0, backend="triton")
        else:
            evidential_cross_entropy(x, t, torch.tensor([0, 4]), scale=2.0, backend="triton")


@pytest.mark.parametrize("target", [[0, 5], [-1, 0]])
def test_targets_out_of_range(target):
    """Reported; with the checks off not read out of bounds either, because no kernel uses a target as an address."""
    x, t, *_ = inputs(grad=False)
    y = torch.tensor(target)
    with pytest.raises(ValueError, match="target must hold class indices in"):
        evidential_cross_entropy(x, t, y, scale=2.0, backend="triton")
    with value_checks(False):
        loss = evidential_cross_entropy(x, t, y, scale=2.0, reduction="none", backend="triton")
        right = evidential_cross_entropy(x, t, y.clamp(0, 4), scale=2.0, reduction="none", backend="triton")
    inside = (y >= 0) & (y < 5)
    torch.testing.assert_close(loss[inside], right[inside])


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, torch.ones(2, 7), "image must have shape"),
        (0, torch.ones(2, 6).half(), "image must have the dtype of text"),
        (2, torch.ones(3), "scale must have shape"),
        (3, torch.ones(1), "bias must have shape"),
        (4, torch.ones(3), "image_length must have shape"),
        (4, torch.ones(2, 2), "image_length must have shape"),
        (5, torch.ones(2, 4), "text_length must have shape"),
        (6, torch.ones(2, 3), "weight must have shape"),
        (7, torch.tensor([0]), "target must have shape"),
        (7, torch.zeros(2, dtype=torch.long, device="meta"), f"target must have shape .* on {DEVICE}"),
    ],
)
def test_operators_called_directly_refuse_what_does_not_fit(at, value, words):
    arguments = [*inputs(grad=False), None, None, "exp", "dempster", 5.0]
    arguments[at] = value
    with pytest.raises(ValueError, match=words):
        launch.row_sums(launch.Inputs(*arguments), True)


class Allocated(TorchDispatchMode):
    """Bytes of all tensors made without content, and of the largest of them; results not counted."""

    def __init__(self, *results):
        super().__init__()
        self.results, self.total, self.largest = [list(r) for r in results], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty") and list(out.shape) not in self.results:
            self.total += out.nbytes
            self.largest = max(self.largest, out.nbytes)
        return out


@pytest.mark.parametrize("M", [1, 4])
def test_the_second_paths_workspace_does_not_grow_with_classes(monkeypatch, M):
    """Forward and backward: as stated, whatever K is, and no larger for more prompts."""
    B, D = 8, 6
    monkeypatch.setattr(configs, "WORKSPACE", 4 * B * 4 * 16)  # one tile of 16 classes for four prompts
    used = []
    for K in (80, 160):
        i = launch.Inputs(*inputs(B, M, K, D, grad=False), None, None, "exp", "dempster", float(K))
        with configs.force_path("chunks"):
            with Allocated((4, M + 1, B)) as forward:
                _, sums = launch.row_sums(i, False)
            with Allocated((M, K, D), (B, D)) as backward:
                launch.gradients(i, torch.cat([sums[:3], sums]), None, None, True, True, False)
        used.append((forward.total, forward.largest, backward.total))
    assert used[0] == used[1]
    assert forward.largest <= configs.WORKSPACE and backward.total <= configs.WORKSPACE + 4 * M * B * D


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize(("K", "opinion"), [(50, ["forward"]), (70, ["forward", "finish"])])
@needs_interpreter
def test_few_launches_for_a_small_problem(monkeypatch, K, opinion):
    """Shape S4: one launch when all classes fit one tile of a GPU's size, one more to reduce when they do not."""
    launches = []
    for name in ("forward", "finish"):
        monkeypatch.setattr(launch, f"{name}_kernel", Counted(getattr(launch, f"{name}_kernel"), name, launches))
    row_loss = Counted(launch_small.row_loss_kernel, "row_loss", launches)
    monkeypatch.setattr(launch_small, "row_loss_kernel", row_loss)
    monkeypatch.setattr(launch, "INTERPRETER", configs.default("forward_4", "cuda90", 2))
    g = torch.Generator(DEVICE).manual_seed(0)
    x, t = torch.randn(4, 512, generator=g), torch.randn(4, K, 512, generator=g)
    mine = fused_opinion(x, t, scale=20.0, backend="triton")
    assert launches == opinion
    right = fused_opinion(x, t, scale=20.0, backend="reference")
    torch.testing.assert_close(mine.log_ratio, right.log_ratio, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.prompt_log_partition, right.prompt_log_partition, rtol=1e-5, atol=1e-5)
    launches.clear()
    y = torch.tensor([0, 1, 2, K - 1])
    loss = evidential_cross_entropy(x, t, y, scale=20.0, form="mse", kl_weight=0.1, backend="triton")
    assert launches == [*opinion, "row_loss"]
    right = evidential_cross_entropy(x, t, y, scale=20.0, form="mse", kl_weight=0.1, backend="reference")
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-5)


def test_float64_is_refused():
    x, t, *_ = inputs(grad=False)
    with pytest.raises(BackendUnavailableError, match="float64"):
        fused_opinion(x.double(), t.double(), scale=1.0, backend="triton")


@needs_interpreter
def test_on_a_cpu_without_the_interpreter_one_sentence(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, t, *_ = inputs(grad=False)
    with pytest.raises(BackendUnavailableError, match="backend='triton' cannot run here: the tensors are on the CPU"):
        fused_opinion(x, t, scale=1.0, backend="triton")


def test_cdc_ops_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, cdc_ops
assert "cdc_kernels" not in sys.modules
x, t = torch.randn(2, 3), torch.randn(2, 4, 3)
cdc_ops.fused_opinion(x, t, scale=1.0)
try:
    cdc_ops.fused_opinion(x, t, scale=1.0, backend="triton")
except cdc_ops.BackendUnavailableError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise SystemExit("no error")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@needs_interpreter
def test_the_kernels_here_are_interpreted():
    assert configs.interpreted(forward_kernel)
