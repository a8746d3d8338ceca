"""Classes sharded over ranks: everything equals one process, gradients too, and nothing sent grows with the classes.

Three processes are started once and work through all cases in the same order, in the group of all three and in the
group of the last two; the tests compare what they wrote down with the single-process functions.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import cdc_ops
from cdc_ops import parallel
from cdc_ops.dirichlet import merged, row_sums
from cdc_ops.special import log_row_sum

f64 = torch.float64
RULES = ["dempster", "cumulative", "averaging", "weighted"]
ACTIVATIONS = ["exp", "softplus", "relu"]
FORMS = ["digamma", "log", "mse"]
SHARDS = {2: [4, 3], 3: [5, 1, 1]}  # classes of each rank
PAGE = (Path(__file__).parents[2] / "docs/many_classes.md").read_text()


# ---- the cases, made the same way by every process ----------------------------------------------------------------


def features(case, dtype):
    """image, text, scale, bias (learned) and target of a case."""
    B, M, D, K = 4, case.get("M", 3), 5, sum(case["sizes"])
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(B, *((M,) if case.get("per_prompt") else ()), D, generator=generator, dtype=f64)
    text = torch.randn(M, K, D, generator=generator, dtype=f64)
    scale = case.get("scale", 3.0) * torch.linspace(0.9, 1.0, M, dtype=f64)
    bias = torch.linspace(-0.93, 1.07, M, dtype=f64)
    target = torch.randint(K, (B,), generator=generator)
    return *(x.to(dtype).requires_grad_() for x in (image, text, scale, bias)), target


def mixed(results, columns=None):
    """A number that depends on every entry of the results; ``columns`` of all classes for a shard's."""
    total = 0
    for x in results:
        weight = torch.linspace(0.5, 1.5, math.prod(x.shape[:-1]), dtype=x.dtype).reshape(*x.shape[:-1], 1)
        at = torch.arange(x.shape[-1]) if columns is None else columns
        total = total + (x * weight * (1 + torch.cos(at).to(x.dtype))).sum()
    return total


def of_shard(opinion):
    return [opinion.log_ratio, opinion.belief, opinion.prob, opinion.evidence.clamp(max=1e6)]


def of_all(opinion):
    whole = [opinion.uncertainty, opinion.log_partition, opinion.prompt_uncertainty, opinion.prompt_log_partition]
    return [*whole, opinion.conflict] if opinion.rule == "dempster" else whole


def compute(case, group=None, rank=None):
    """Named results and gradients: of one process, or of this rank's shard where a rank is given."""
    image, text, scale, bias, target = features(case, getattr(torch, case.get("dtype", "float64")))
    ops, options = (cdc_ops, {}) if rank is None else (parallel, {"group": group})
    options |= {"scale": scale, "bias": bias if case.get("bias", True) else None, **case.get("options", {})}
    if rank is None:
        options["backend"] = case.get("single", "reference")
        columns = torch.arange(text.shape[1])
    else:
        columns = torch.arange(text.shape[1]).split(case["sizes"])[rank]
        text = text.detach().split(case["sizes"], 1)[rank].clone().requires_grad_()
    if case["of"] == "topk":
        top = ops.fused_topk(image, text, case["k"], **options)
        return {f"all {name}": getattr(top, name) for name in top.__dataclass_fields__}
    if case["of"] == "loss":
        loss = ops.evidential_cross_entropy(image, text, target, **options)
        results, objective = {"all loss": loss}, mixed([loss.reshape(-1)])
    else:
        opinion = ops.fused_opinion(image, text, **options)
        results = {f"all {i}": x for i, x in enumerate(of_all(opinion))}
        results |= {f"shard {i}": x for i, x in enumerate(of_shard(opinion))}
        # of a shard: a share of the whole; of all: the same on every rank, and counted once
        objective = mixed(of_shard(opinion), columns) + mixed(of_all(opinion))
    learned = [image, text, scale, *([bias] if case.get("bias", True) else [])]
    g_image, g_text, *others = torch.autograd.grad(objective, learned)
    results |= {"shard gradient of text": g_text.transpose(1, 2), "all gradient of image": g_image}
    results |= {f"all gradient {i}": x for i, x in enumerate(others)}
    return {name: x.detach() for name, x in results.items()}


def all_cases(ranks):
    """For three ranks all; for two a fifth of the common ones, a step that meets every rule, activation and form."""
    return [*itertools.islice(common_cases(SHARDS[ranks]), 0, None, 1 if ranks == 3 else 5), *rare_cases(ranks)]


def common_cases(sizes):
    """Every rule, activation and form in both backends; the other arguments take turns."""
    turn = {
        "scale": itertools.cycle([3.0, 100.0, 1e-3]),
        "bias": itertools.cycle([True, True, False, True, True]),
        "per_prompt": itertools.cycle([False, True]),
        "M": itertools.cycle([3, 3, 2, 1, 3]),
    }
    options = {
        "kl_weight": itertools.cycle([0.0, 0.3, 0.0]),
        "reduction": itertools.cycle(["mean", "none", "sum", "mean"]),
        "fused_weight": itertools.cycle([1.0, 1.7, 1.0, 0.0, 1.0]),
        "prompt_weight": itertools.cycle([1.0, 0.4, 1.0, 1.0, 1.0, 1.0, 0.0]),
        "prior_weight": itertools.cycle([None, 2.5]),
        "normalize": itertools.cycle([True, True, True, False]),
    }
    for rule, activation, form, backend in itertools.product(RULES, ACTIVATIONS, FORMS, ["reference", "blocked"]):
        here = {name: next(values) for name, values in options.items()}
        here |= {"rule": rule, "activation": activation, "form": form, "backend": backend}
        yield {"of": "loss", "sizes": sizes, "options": here, **{name: next(values) for name, values in turn.items()}}
    for rule, activation, backend in itertools.product(RULES, ACTIVATIONS, ["reference", "blocked"]):
        here = {name: next(options[name]) for name in ("prior_weight", "normalize")}
        here |= {"rule": rule, "activation": activation, "backend": backend}
        others = {name: next(values) for name, values in turn.items()}
        yield {"of": "opinion", "sizes": sizes, "options": here, **others}
        k = {"dempster": 1, "cumulative": 3, "averaging": 7, "weighted": 2}[rule]
        yield {"of": "topk", "sizes": sizes, "options": here, **others, "k": k}


def rare_cases(ranks):
    """Shards without classes, one class in all, other dtypes, Triton's kernels."""
    for sizes in ([0, 3, 0][:ranks], [0, 0, 1][-ranks:], [3, 0, 2][-ranks:]):
        for rule, of, form in itertools.product(["dempster", "weighted"], ["loss", "opinion", "topk"], FORMS):
            if of == "loss" or form == "log":
                options = {"rule": rule, **({"form": form, "kl_weight": 0.3} if of == "loss" else {})}
                yield {"of": of, "sizes": sizes, "options": options, "k": 1}
    shards = {"sizes": SHARDS[ranks]}
    for rule, backend in itertools.product(["dempster", "weighted"], ["reference", "blocked", "triton"]):
        options = {"rule": rule, "backend": backend}
        single = {"dtype": "float32", **shards}
        yield {"of": "opinion", "options": options, **single}
        yield {"of": "loss", "options": options | {"form": "mse", "kl_weight": 0.3}, "scale": 20.0, **single}
        yield {"of": "topk", "options": options, "k": 3, **single}
    yield {"of": "loss", "options": {"backend": "blocked"}, "dtype": "bfloat16", "single": "blocked", **shards}


# ---- the processes ------------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes that this process hands to collectives, of whatever kind, one entry for each."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            sent = {"allgather_": 1, "allreduce_": 0}[name]  # which argument; any other collective is an error
            self.bytes.append((name, sum(x.nbytes for x in args[sent])))
        return func(*args, **(kwargs or {}))


def sent_by(K_r, rule, of, ranks, rank, group):
    """What a call, and its backward pass, sends, for K_r classes on every rank."""
    case = {"sizes": [K_r] * ranks, "of": of, "k": 2, "options": {"rule": rule}}
    with Sent() as sent:
        compute(case, group, rank)
    return sent.bytes


REFUSED = {
    # what it is: (rank that does it or all, arguments to change, what the others are told, what it says itself)
    "image of another size": (1, lambda a: a | {"image": a["image"][:2], "target": a["target"][:2]}, "as many images"),
    "other prompts": (0, lambda a: a | {"text": a["text"][:1]}, "as many prompts M on every rank; got 1, 2"),
    "other features": (
        1,
        lambda a: a | {"text": a["text"][..., :3], "image": a["image"][:, :3]},
        "same feature size D on every rank; got 4, 3",
    ),
    "per-prompt images": (
        0,
        lambda a: a | {"image": a["image"].unsqueeze(1).expand(-1, 2, -1)},
        "image must have as many dimensions on every rank; got 3, 2",
    ),
    "text of another dtype": (1, lambda a: a | {"text": a["text"].half()}, "text must have the same dtype .*float16"),
    "image of another dtype": (1, lambda a: a | {"image": a["image"].double()}, "image must have the same dtype"),
    "a gradient": (1, lambda a: a | {"text": a["text"].clone().requires_grad_()}, "must require gradients on every"),
    "another rule": (0, lambda a: a | {"rule": "averaging"}, "rule must be the same on every rank; got"),
    "another form": (0, lambda a: a | {"form": "log"}, "form must be the same on every rank; got"),
    "another prior": (1, lambda a: a | {"prior_weight": 3.0}, "prior_weight must be the same on every rank; got"),
    "another weight": (
        1,
        lambda a: a | {"kl_weight": 0.5},
        "kl_weight must be the same on every rank; got 0.[05] on rank",
    ),
    "another scale": (
        0,
        lambda a: a | {"scale": 4},
        r"scale must be the same on every rank; got (4 on rank 0|3.0 on rank 1)",
    ),
    "a scale for each prompt": (0, lambda a: a | {"scale": torch.ones(2)}, "scale must be the same on every rank; got"),
    "no bias": (1, lambda a: a | {"bias": 0.0}, "bias must be the same on every rank; got (None|0.0) on rank"),
    "other targets": (1, lambda a: a | {"target": a["target"].flip(0)}, "target must hold the same classes"),
    "targets out of range": (None, lambda a: a | {"target": a["target"] + 9}, r"class indices in \[0, 4\); got values"),
    "no target": (None, lambda a: a | {"target": None}, "target must be an integer tensor of shape .3.; got None"),
    "not finite": (1, lambda a: a | {"text": a["text"] / 0}, "refused on rank 1; the error there says why"),
    "not a tensor": (0, lambda a: a | {"text": [1.0]}, "refused on rank 0; the error there says why"),
    "a weight out of range": (1, lambda a: a | {"kl_weight": -1.0}, "refused on rank 1"),
    "no such form": (0, lambda a: a | {"form": "x"}, "refused on rank 0"),
    "no such reduction": (1, lambda a: a | {"reduction": "x"}, "refused on rank 1"),
    "no such backend": (1, lambda a: a | {"backend": "x"}, "refused on rank 1"),
    "no class": (None, lambda a: a | {"text": a["text"][:, :0]}, "text must hold at least one class on some rank"),
    "no group": (None, lambda a: a | {"group": "all"}, "group must be a torch.distributed.ProcessGroup .* got 'all'"),
}
ITS_OWN_WORDS = {
    "not finite": "text must have lengths within|text must be finite",
    "not a tensor": "text must be a fl",
    "a weight out of range": "kl_weight must be",
    "no such form": "form must be one of",
    "no such reduction": "reduction must be one of",
    "no such backend": "backend must be one of",
}


def refusals(rank, group):
    """What this rank is told in each case of REFUSED; a good call after each shows that ranks are still in step."""
    generator = torch.Generator().manual_seed(0)
    good = {
        "image": torch.randn(3, 4, generator=generator),
        "text": torch.randn(2, 2, 4, generator=generator),
        "target": torch.tensor([0, 1, 3]),
        "scale": 3.0,
        "group": group,
    }
    told = {}
    for name, (who, change, _) in REFUSED.items():
        try:
            parallel.evidential_cross_entropy(**(change(good) if who in (None, rank) else good))
            told[name] = "nothing"
        except ValueError as error:
            told[name] = str(error)
        parallel.evidential_cross_entropy(**good | {"kl_weight": (0, 0.0)[rank], "scale": (3, 3.0)[rank]})
    opinion = {name: value for name, value in good.items() if name != "target"}
    for k in (0, 5, 1.5):
        try:
            parallel.fused_topk(k=k, **opinion)
        except ValueError as error:
            told[f"k = {k}"] = str(error)
    for name, call in {
        "entropies": lambda: parallel.fused_opinion(**opinion).opinion(),
        "second derivatives": lambda: second_derivatives(good, "log_partition"),
        "second derivatives of a shard": lambda: second_derivatives(good, "log_ratio"),
    }.items():
        try:
            call()
        except NotImplementedError as error:
            told[name] = str(error)
    return told


def second_derivatives(good, result):
    image = good["image"].clone().requires_grad_()
    arguments = {"text": good["text"], "scale": 3.0, "group": good["group"], "backend": "reference"}
    value = getattr(parallel.fused_opinion(image, **arguments), result).sum()
    torch.autograd.grad(value, image, create_graph=True)


def other_ways(rank, group):
    """No gradients, none for the image, no images at all, autocast; half of the features' gradients."""
    case = {"sizes": SHARDS[2], "of": "opinion", "options": {"rule": "weighted"}}
    image, text, _, _, target = features(case, torch.float32)
    text = text.detach().split(case["sizes"], 1)[rank].clone().requires_grad_()
    arguments = {"scale": 3.0, "group": group, "rule": "weighted"}
    with torch.no_grad():
        assert not parallel.evidential_cross_entropy(image, text, target, **arguments).requires_grad
    alone = parallel.evidential_cross_entropy(image.detach(), text, target, **arguments)
    (g_text,) = torch.autograd.grad(alone, text)
    both = parallel.evidential_cross_entropy(image, text, target, **arguments)
    torch.testing.assert_close(torch.autograd.grad(both, [image, text], retain_graph=True)[1], g_text)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parallel.evidential_cross_entropy(image, text, target, **arguments), both)
    # two losses in one graph: their messages must not be mixed up
    twice = both + parallel.evidential_cross_entropy(image, text, target, form="log", kl_weight=1.0, **arguments)
    torch.autograd.grad(twice, [image, text])
    none = parallel.evidential_cross_entropy(image[:0], text, target[:0], reduction="none", **arguments)
    assert none.shape == (0,)
    assert torch.equal(torch.autograd.grad(none.sum(), text)[0], torch.zeros_like(text))
    with cdc_ops.value_checks(False):
        assert torch.equal(parallel.evidential_cross_entropy(image, text, target, **arguments), both)


def work(rank, folder):
    """What each of the three processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    pair = dist.new_group([1, 2])
    written = {}
    names: dict = {}
    exec(PAGE.split("```python\n")[1].split("```")[0], names)
    written["page"] = {name: names[name].detach() for name in ("loss", "classes")}
    written[3] = [compute(case, None, rank) for case in all_cases(3)]
    if rank:
        written[2] = [compute(case, pair, rank - 1) for case in all_cases(2)]
        written["refusals"] = refusals(rank - 1, pair)
        written["sent"] = {
            f"{of} {rule} {K_r}": str(sent_by(K_r, rule, of, 2, rank - 1, pair))
            for of, rule, K_r in itertools.product(["loss", "opinion", "topk"], ["dempster", "weighted"], [4, 40])
        }
        other_ways(rank - 1, pair)
    else:
        try:
            parallel.fused_opinion(torch.eye(2), torch.ones(1, 2, 2), scale=1.0, group=pair)
        except ValueError as error:
            written["outside"] = str(error)
    dist.barrier()
    torch.save(written, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What each process wrote down."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=3)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(3)]


# ---- the tests ----------------------------------------------------------------------------------------------------


def difference(a, b):
    """Largest, relative to the largest number; or to 1e-4, for what is left of larger numbers that cancel."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-4)) if b.numel() else 0.0


def together(parts, name):
    """One result of all ranks: shards side by side; what is the same on every rank must be, to the last bit."""
    if name.startswith("shard"):
        return torch.cat([part[name] for part in parts], -1)
    assert all(torch.equal(part[name], parts[0][name]) for part in parts), name
    return parts[0][name]


@pytest.mark.parametrize("ranks", [2, 3])
def test_results_and_gradients_are_those_of_one_process(written, ranks):
    parts = [w[ranks] for w in written if ranks in w]
    assert len(parts) == ranks
    everything = all_cases(ranks)
    assert all(len(part) == len(everything) for part in parts) and len(everything) > 60
    for case, *mine in zip(everything, *parts, strict=True):
        right = compute(case)
        assert mine[0].keys() == right.keys()
        dtype = case.get("dtype", "float64")
        for name, exact in right.items():
            got = together(mine, name)
            assert got.dtype == exact.dtype and got.shape == exact.shape, (case, name)
            if name == "all classes":  # other ones where classes tie
                assert all(len(set(row)) == case["k"] for row in got.tolist()), case
                prob = compute(case | {"of": "opinion"})["shard 2"]
                got, exact = prob.gather(1, got), prob.gather(1, exact)
            bound = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 1e-2}[dtype]
            assert difference(got, exact) <= bound, (case, name, difference(got, exact))
        if dtype == "float32":
            # no further from the truth than one process is, but for the last bits
            truth, single = compute(case | {"dtype": "float64"}), compute(case | {"single": case["options"]["backend"]})
            for name, exact in truth.items():
                ours, one = difference(together(mine, name), exact), difference(single[name], exact)
                assert ours <= 3 * one + 1e-6, (case, name, ours, one)


def test_what_is_sent(written):
    """Two ranks, float64, B = 4, M = 3, D = 5: log partitions or row sums, image-sized gradients, nothing else."""
    B, M, D, claim, number = 4, 3, 5, ("allgather_", 22 * 8), 8
    sums, partitions = ("allgather_", 2 * B * (M + 1) * number), ("allgather_", B * (M + 1) * number)
    prompts, weight = ("allgather_", B * M * number), ("allreduce_", B * M * number)
    gradients = ("allreduce_", (B * D + 2 * M) * number)
    best = [("allgather_", B * 2 * number), ("allgather_", B * 2 * 8)]
    expected = {
        "loss dempster": [claim, sums, gradients],
        "loss weighted": [claim, prompts, sums, weight, gradients],
        # belief and prob each ask for the log partition's gradient, from all ranks
        "opinion dempster": [claim, partitions, *[("allreduce_", B * number)] * 2, gradients],
        "opinion weighted": [claim, prompts, partitions, *[("allreduce_", B * number)] * 2, weight, gradients],
        "topk dempster": [claim, partitions, *best],
        "topk weighted": [claim, prompts, partitions, *best],
    }
    for w in written[1:]:
        for name, messages in expected.items():
            assert w["sent"][f"{name} 4"] == str(messages), name
            assert w["sent"][f"{name} 40"] == str(messages), name


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_on_every_rank(written, name):
    who, _, words = REFUSED[name]
    for rank, w in enumerate(written[1:]):
        own = ITS_OWN_WORDS.get(name, words) if rank == who else words
        with pytest.raises(ValueError, match=own):
            raise ValueError(w["refusals"][name])


def test_other_refusals(written):
    for w in written[1:]:
        told = w["refusals"]
        for k in (0, 5, 1.5):
            assert told[f"k = {k}"] == f"k must be an integer from 1 to the number of classes, 4; got {k}"
        assert "no rank holds the belief in all classes" in told["entropies"]
        assert "no second derivatives" in told["second derivatives"] == told["second derivatives of a shard"]
    assert "a torch.distributed.ProcessGroup that this process is in" in written[0]["outside"]


def test_without_process_groups():
    with pytest.raises(ValueError, match="group must be a process group, and torch.distributed has none: call"):
        parallel.fused_opinion(torch.eye(2), torch.ones(1, 2, 2), scale=1.0)


def test_the_page(written):
    """docs/many_classes.md: its lines run on three ranks and mean the same on each."""
    for w in written:
        assert torch.equal(w["page"]["loss"], written[0]["page"]["loss"])
        assert torch.equal(w["page"]["classes"], written[0]["page"]["classes"])
    assert written[0]["page"]["classes"].shape == (8, 5)


@pytest.mark.parametrize("sizes", [[4, 3], [5, 1, 1], [7]])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 300.0])
def test_shards_of_an_opinion_combine(sizes, scale):
    """The arithmetic alone: log partitions and row sums of shards are those of the whole."""
    K, W = sum(sizes), 3.0
    log_ratio = scale * torch.rand(6, K, generator=torch.Generator().manual_seed(0), dtype=f64)
    target, shards = torch.arange(6), log_ratio.split(sizes, -1)
    whole = log_row_sum(log_ratio)
    torch.testing.assert_close(log_row_sum(torch.stack([log_row_sum(s) for s in shards]), 0), whole, rtol=1e-13, atol=0)
    parts, first = [], 0
    for shard in shards:
        here = target - first
        here = torch.where((here >= 0) & (here < shard.shape[-1]), here, -1)
        parts.append(row_sums(shard, here, K, W, square=True, kl=True))
        first += shard.shape[-1]
    got = merged(type(parts[0])(*(torch.stack(column) for column in zip(*parts, strict=True))), K)
    for mine, right in zip(got, row_sums(log_ratio, target, K, W, square=True, kl=True), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-14)
