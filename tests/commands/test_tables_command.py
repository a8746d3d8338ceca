"""The tables of the protocols, checked by hand: means, deviations, H, averages, gaps."""

import math

import pytest

from cdc_models.protocols import FIGURES, latex, lines, markdown, plan, summarise


def row(dataset, split, seed, accuracy, method="maple", shots=16, ece=0.1):
    recipe = {"method": method if method in ("maple", "cdc", "coop") else "maple"}
    at = {"dataset": dataset, "split": split, "seed": seed, "method": method, "shots": shots, "recipe": recipe}
    return {**at, "accuracy": accuracy, "ece": ece, "calibrated_ece": None}


# two datasets, two seeds
ROWS = [
    row("A", "base", 1, 0.80), row("A", "new", 1, 0.60), row("A", "base", 2, 0.90), row("A", "new", 2, 0.70),
    row("B", "base", 1, 0.50), row("B", "new", 1, 0.40), row("B", "base", 2, 0.60), row("B", "new", 2, 0.30),
]  # fmt: skip


def cells(summary):
    return {(c["dataset"], c["figure"]): c for c in summary}


def test_means_deviations_and_h():
    found = cells(summarise("base-to-new", ROWS))
    a = found["A", "base"]
    assert a["mean"] == pytest.approx(85) and a["std"] == pytest.approx(math.sqrt(50))
    # H of the means 85 and 65, not the mean of the seeds' H (68.571 and 78.75)
    assert found["A", "H"]["mean"] == pytest.approx(2 * 85 * 65 / 150)
    assert found["A", "H"]["std"] == pytest.approx((78.75 - 480 / 7) / math.sqrt(2))
    # averages: base 65 and 75 by seed, new 50 and 50
    average = found["average", "base"]
    assert average["mean"] == pytest.approx(70) and average["std"] == pytest.approx(math.sqrt(50))
    assert found["average", "new"]["std"] == pytest.approx(0, abs=1e-9)
    assert found["average", "H"]["mean"] == pytest.approx(2 * 70 * 50 / 120)
    assert found["A", "ECE"]["mean"] == pytest.approx(0.1) and ("A", "calibrated ECE") not in found


def test_the_published_average_is_set_beside_the_whole_protocol_only():
    part = cells(summarise("base-to-new", ROWS, whole=["A", "B", "C"]))
    assert part["average", "base"]["published"] is None and part["average", "base"]["gap"] is None
    whole = cells(summarise("base-to-new", ROWS, whole=["A", "B"]))
    assert whole["average", "base"]["published"] == 82.28
    assert whole["average", "base"]["gap"] == pytest.approx(70 - 82.28)
    assert (
        whole["average", "H"]["gap"] == pytest.approx(2 * 70 * 50 / 120 - 78.55)
        and "MaPLe" in whole["average", "H"]["paper"]
    )
    assert whole["A", "base"]["published"] is None


def test_gaps_of_single_datasets():
    rows = [
        row("SUN397", split, seed, value, "cdc") for seed in (1, 2, 3) for split, value in (("base", 0.8), ("new", 0.8))
    ]
    found = cells(summarise("base-to-new", rows))
    assert found["SUN397", "H"]["published"] == 81.18 and found["SUN397", "H"]["gap"] == pytest.approx(80 - 81.18)
    assert found["SUN397", "base"]["published"] is None
    heading, body = lines(list(found.values()))
    assert heading == ["dataset", "method", "base", "new", "H", "ECE"]
    assert body == [["SUN397", "cdc", "80.00 ± 0.00", "80.00 ± 0.00", "80.00 ± 0.00 (81.18: -1.18)", "0.100 ± 0.000"]]
    # another number of shots, or a recipe that has another label, is not what was published
    assert all(c.get("published") is None for c in summarise("base-to-new", [{**r, "shots": 4} for r in rows]))
    changed = [{**r, "method": "CDC, half the prompts", "recipe": {"method": "cdc"}} for r in rows]
    assert all(c.get("published") is None for c in summarise("base-to-new", changed))


def test_the_source_has_no_part_in_the_average():
    rows = [row(d, "test", 1, a, "cdc") for d, a in (("ImageNet", 0.7), ("A", 0.5), ("B", 0.6))]
    found = cells(summarise("cross-dataset", rows, source="ImageNet"))
    assert found["average", "test"]["mean"] == pytest.approx(55) and found["average", "test"]["std"] is None
    assert found["ImageNet", "test"]["gap"] == pytest.approx(70 - 71.76)


def test_markdown_and_latex():
    rows = [row("FGVCAircraft", "base", 1, 0.4, "cdc"), row("FGVCAircraft", "new", 1, 0.3, "cdc")]
    summary = summarise("base-to-new", rows)
    text = markdown(summary, "base-to-new", "ViT-B-16-quickgelu")
    assert "| FGVCAircraft | cdc | 40.00 (37.47: +2.53) | 30.00 | 34.29 | 0.100 |" in text
    assert "CDC (Zhang et al., NeurIPS 2024), at second hand" in text and "seeds 1, with ViT-B-16-quickgelu" in text
    odd = markdown(summarise("base-to-new", [{**r, "dataset": "my | photos\n"} for r in ROWS[:4]]), "x", "y")
    assert r"| my \| photos | maple |" in odd
    tex = latex(summarise("base-to-new", [{**r, "dataset": "a_b & 50%"} for r in ROWS[:4]]), "x", "y")
    assert r"a\_b \& 50\% & maple & 85.00 $\pm$ 7.07" in tex and tex.count(r"\\") == 2 and r"Accuracy in \%" in tex


def test_published_figures_have_a_source_and_stand_once():
    assert len({(f.protocol, f.method, f.dataset, f.split) for f in FIGURES}) == len(FIGURES) == 9
    assert all("CVPR 2023" in f.source or "second hand" in f.source for f in FIGURES)
    base, new, H = (
        next(f.percent for f in FIGURES if f.method == "maple" and f.split == s) for s in ("base", "new", "H")
    )
    assert round(2 * base * new / (base + new), 2) == H


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zero-to-new", ["A"], [1], [16]), "protocol"),
        (("base-to-new", [], [1], [16]), "datasets"),
        (("base-to-new", ["A"], [1], [16], "B"), "source"),
        (("cross-dataset", ["A"], [1], [16]), "source"),
        (("few-shot", ["A"], [1], [0]), "shots"),
    ],
)
def test_plans_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_examples_in_docstrings():
    import doctest
    import importlib

    for name in ("protocols.plan", "protocols.published_figures", "protocols.tables", "rows", "recipes"):
        result = doctest.testmod(importlib.import_module(f"cdc_models.{name}"))
        assert result.attempted > 0 and result.failed == 0, name
