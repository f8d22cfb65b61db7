"""Every attack in one audit: beside the original and gold, judged or named as not scored, in both reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expunge import registry
from expunge.evidence import Evidence, ProbeRun
from expunge.request import load
from expunge.run import audit_model

CHEAP: dict[str, dict[str, Any]] = {
    "decoding": {"samples": 2, "k": 1},
    "editing_attack": {"editor": {"name": "ft_m", "steps": 2}, "edits": 1},
    "editing_attack_rome": {"editor": {"name": "rome", "steps": 2, "contexts": 0}, "edits": 1},
    "relearn": {"steps": 2},
    "relearn_few": {"steps": 2},
    "relearn_benign": {"steps": 2},
    "relearn_all": {"steps": 2},
    "soft_prompt": {"steps": 2},
}


@pytest.fixture(scope="module")
def evidence(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evidence, Path]:
    folder = tmp_path_factory.mktemp("all-attacks")
    attacks = [{part.name: CHEAP.get(part.name, {})} for part in registry.serving("attacks", "language")]
    changes = {"audit.attacks": attacks, "audit.metrics": [], "audit.self_test": False, "audit.bootstrap": 100}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_LEDGER", str(folder / "ledger.sqlite"))
        request = load(tiny_world.request, changes)
        made = audit_model(tiny_world.original, request=request, out=folder / "out")
    return made, folder / "out"


def test_every_attack_is_scored_on_every_model_or_says_why_not(evidence: tuple[Evidence, Path]) -> None:
    made, _ = evidence
    names = [part.name for part in registry.serving("attacks", "language")]
    for role in ("before", "after", "gold/0", "gold/1"):
        assert [run.attack for run in made.runs[role]] == names
    told = "\n".join(made.limits)
    for run in made.runs["after"]:
        assert run.status == "scored" or f"Not scored: {run.attack}" in told, run.attack
        if run.status == "scored":
            assert run.budget["queries"] > 0, run.attack
    assert sum(run.status == "scored" for run in made.runs["after"]) >= 0.8 * len(names)


def test_the_original_is_found_out_and_what_reintroduces_is_no_part_of_it(evidence: tuple[Evidence, Path]) -> None:
    made, _ = evidence
    assert made.verdict.verdict == "not_forgotten"
    told_again = {part.name for part in registry.serving("attacks", "language") if part.card.group == "reintroduce"}
    assert told_again
    assert not told_again & set(made.verdict.by)


def test_both_reports_name_every_attack_that_spoke(evidence: tuple[Evidence, Path]) -> None:
    made, out = evidence
    from expunge.report.words import label

    page, text = (out / "report.html").read_text("utf-8"), (out / "report.md").read_text("utf-8")
    for run in made.runs["after"]:
        if run.status == "scored" and run.group != "reintroduce":
            assert label(run.attack) in page, run.attack
            assert label(run.attack) in text or run.attack in text, run.attack


def test_what_a_prompt_gives_back_asks_for_a_filter(
    evidence: tuple[Evidence, Path], tiny_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = evidence
    scored: list[ProbeRun] = [
        run for run in made.runs["after"] if run.group == "reintroduce" and run.status == "scored" and run.items
    ]
    rates = [run.score for run in scored if run.settings.get("level") != "fact"]
    assert ("needs_filter" in made.verdict.flags) == any(rate >= 0.5 for rate in rates)
    # The same answers, held against a bar that they pass.
    assert max(rates) > 0.1
    monkeypatch.setattr("expunge.limits.REINTRODUCED", 0.1)
    monkeypatch.setenv("EXPUNGE_LEDGER", str(out.parent / "ledger.sqlite"))
    changes = {"audit.attacks": ["direct", "ununlearning"], "audit.metrics": [], "audit.self_test": False}
    lower = audit_model(tiny_world.original, request=load(tiny_world.request, changes), out=out.parent / "lower")
    assert "needs_filter" in lower.verdict.flags
