"""What a report keeps of an earlier run, what it refuses, and that S6 races the same function as its peers."""

import json

import facts
import pytest
import report
import torch
import torch.nn.functional as F
from shapes import SCALE, make_inputs, shape_for
from ways import our_softmax, relative_error

TINY = ["--device", "cpu", "--shapes", "S4", "--tiny", "--no-compile", "--ways", "bare product", "blocked"]


def test_a_line_cut_short_is_measured_again(tmp_path):
    results, key = tmp_path / "results.jsonl", {"device": "this"}
    whole = [json.dumps({"key": {"device": name}, "operation": "opinion"}) for name in ("this", "another", "this")]
    assert report.kept_lines(results, key) == []
    results.write_text("\n".join(whole)[:-9])  # killed while it wrote its last line
    assert report.kept_lines(results, key) == [json.loads(whole[0])]


def test_other_changes_of_the_code_are_another_version(monkeypatch):
    def git(changed):
        class Run:
            def __init__(self, command, **_):
                self.stdout = {"log": "abc1234\n", "status": " M a.py\n" if changed else "", "diff": changed}[
                    command[1]
                ]

        monkeypatch.setattr(facts.subprocess, "run", Run)
        return facts.code_version()

    assert git(b"") == "abc1234"
    first, second = git(b"-1\n+2\n"), git(b"-1\n+3\n")
    assert first.startswith("abc1234+") and second.startswith("abc1234+") and first != second


def test_nothing_to_time_is_said(tmp_path):
    with pytest.raises(SystemExit, match="S4 opinion: nothing to time of .'no such way'"):
        report.main([*TINY[:-2], "no such way", "--out", str(tmp_path)])


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_one_prompt_and_next_to_no_prior_is_softmax_cross_entropy(backend):
    """``ln S - ln alpha_y`` with W -> 0, value and gradients."""
    image, text, target = make_inputs(shape_for("S6", "cpu", tiny=True), "softmax gradients", "cpu", torch.float32)
    assert (image @ text[0].T).abs().max() <= SCALE * (1 + 1e-6)  # what the choice of W rests on
    loss = our_softmax(backend)(image, text, target)
    ours = [loss.detach(), *torch.autograd.grad(loss, (image, text))]
    x, t = (v.detach().double().requires_grad_() for v in (image, text))
    exact = F.cross_entropy(x @ t[0].T, target)
    assert relative_error(ours, [exact.detach(), *torch.autograd.grad(exact, (x, t))]) < 2e-6
