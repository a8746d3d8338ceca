"""Our training steps against the papers' way of computing them: full context, template by template, pairwise fusion."""

import pytest
import step


@pytest.mark.parametrize("case", [c for c in step.CASES if c.way == "ours" and c.templates <= 4], ids=lambda c: c.label)
def test_loss_and_every_gradient_agree(bundled, case):
    assert step.assert_parity(case, bundled, classes=30, batch=3) < 1e-5


def test_the_published_way_overflows_with_eight_templates_and_ours_does_not(bundled):
    assert step.assert_parity(step.Case("CDC", 8, "ours"), bundled, classes=30, batch=3) is None


def test_parity_is_refused_where_a_formula_differs(bundled, monkeypatch):
    objective = step.published.objective
    monkeypatch.setattr(step.published, "objective", lambda *given: objective(*given) * 1.0001)
    with pytest.raises(AssertionError, match="losses"):
        step.assert_parity(step.Case("MaPLe", 1, "ours"), bundled, classes=5, batch=2)
