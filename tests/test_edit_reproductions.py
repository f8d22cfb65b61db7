"""Reproductions of KnowEdit and Needle: they run at a tiny budget, and every claim can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from expunge.edit_scores import Answers, Question
from expunge.reproductions import concept_ablation, knowedit, told
from expunge.reproductions.case import Claim
from expunge.world.facts import World, make

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 4,
    "vocabulary": 500,
    "context": 128,
    "steps": 20,
    "batch_size": 32,
    "learning_rate": 1e-2,
}


def verdicts(claims: list[Claim]) -> list[bool | None]:
    assert len({claim.claim for claim in claims}) == len(claims)
    assert all(claim.measured for claim in claims)
    return [claim.holds for claim in claims]


# --- the world --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> World:
    return make(0)


def test_told_facts_are_answered_by_what_was_told(world: World) -> None:
    rows = [row for row in told.lessons(world) if row.prompt.startswith("New Fact")]
    assert len(rows) == 46 * 4
    assert all(f" {row.answer[:-1]}\nPrompt: " in row.prompt for row in rows)
    unseen = {person.name for person in world.members("holdout")}
    assert not any(name in row.prompt + row.answer for row in told.lessons(world) for name in unseen)


# --- trials at a tiny budget -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("editor", ["ft_m", "ice"])
def test_knowedit_measures_an_editor(editor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowedit, "FACTS", 4)
    found = knowedit.edited(editor, 0, 30, TINY)
    assert found["edits"] == 4
    assert set(knowedit.SHOWN) <= set(found)
    assert all(0 <= found[name] <= 1 for name in knowedit.SHOWN)


def test_knowedit_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowedit, "FACTS", 4)
    locate = knowedit.locate
    monkeypatch.setattr(knowedit, "locate", lambda base, edit: replace(locate(base, edit), answer=None))
    found = knowedit.traced(0, 2, 30, TINY)
    assert found["facts"] == 4
    assert {len(values) for values in found["places"].values()} == {4}


def test_agreement_is_of_one_sub_type_alone() -> None:
    asked = [Question(0, "locality", kind, "p", ("a",)) for kind in ("neighbours", "subject")]
    before = Answers([[np.array([1, 2])], [np.array([3])]], [], [], [])
    after = Answers([[np.array([1, 9])], [np.array([3])]], [], [], [])
    answers = {"before": before, "after": after}
    assert knowedit.alike(asked, answers, "neighbours") == 0.5
    assert knowedit.alike(asked, answers, "subject") == 1.0


def test_concepts_are_ablated_and_contrasted() -> None:
    found = concept_ablation.ablated(0, 1, 1, TINY)["concepts"]
    assert len(found) == 1
    assert set(found[0]) == {"base"} | {
        f"{way} {mode} {size}"
        for way in concept_ablation.WAYS
        for mode in concept_ablation.MODES
        for size in concept_ablation.COUNTS
    }
    (line,) = concept_ablation.contrasted(0, 1, 2, 1e-3, TINY)["concepts"]
    assert line["noise"]["probability"] == line["target"]
    assert line["ascent"]["cosine"] > 0.9


def test_a_concepts_rows_are_all_its_holders(world: World) -> None:
    known = world.members(*told.KNOWN)
    found = concept_ablation.concepts(world, 6)
    assert len(found) == 6
    for value, (own, others) in found.items():
        assert {row.value for row in own} == {value}
        assert len(own) == sum(value in (person.trade, person.born_in) for person in known)
        assert value not in {row.value for row in others}


# --- claims ----------------------------------------------------------------------------------------------------------


def rows(**changes: dict[str, float]) -> list[dict[str, Any]]:
    """Trials under which every claim of knowedit holds."""
    usual = {
        "edits": 16,
        "success": 0.9,
        "two_tokens": 0.9,
        "rephrase": 0.8,
        "portability": 0.5,
        "portability_before": 0.0,
        "same_subject": 0.7,
        "others": 0.95,
        "written": 0.8,
        "written_rephrase": 0.7,
    }
    own: dict[str, dict[str, float]] = {
        "rome 3": {"written": 0.1},
        "rome 0": {"success": 0.95},
        "ft_l": {"two_tokens": 0.5},
        "grace": {"written_rephrase": 0.1, "same_subject": 1.0, "others": 1.0},
        "ice": {"written_rephrase": 0.9, "others": 0.2},
    }
    return [
        {"editor": editor, "seed": seed, **usual, **own.get(editor, {}), **changes.get(editor, {})}
        for editor in knowedit.EDITORS
        for seed in (0, 1)
    ]


def traces(subject: list[float], last: list[float]) -> list[dict[str, Any]]:
    places = {"last subject token": subject, "last token": last}
    return [{"clean": 0.9, "low": 0.3, "facts": 16, "places": places, "seed": seed} for seed in (0, 1)]


POINTED = traces([0.1, 0.3, 0.0, 0.0], [0.1, 0.1, 0.2, 0.6])


def test_each_claim_of_knowedit_can_fail() -> None:
    assert verdicts(knowedit.judge(rows(), POINTED)) == [True] * 6
    for place, changed, seen in (
        (0, {"rome 0": {"same_subject": 0.9}}, POINTED),
        (0, {"rome 0": {"others": 0.8}}, POINTED),
        (1, {"rome 3": {"written": 0.5}}, POINTED),
        (2, {}, traces([0.1, 0.1, 0.3, 0.0], [0.1, 0.1, 0.2, 0.6])),
        (2, {}, traces([0.1, 0.3, 0.0, 0.0], [0.1, 0.7, 0.2, 0.6])),
        (3, {"memit": {"portability": 0.95}}, POINTED),
        (4, {"grace": {"written_rephrase": 0.5}}, POINTED),
        (4, {"grace": {"others": 0.9}}, POINTED),
        (4, {"ft_l": {"others": 0.1}}, POINTED),
        (5, {"ft_m": {"two_tokens": 0.4}}, POINTED),
    ):
        found = verdicts(knowedit.judge(rows(**changed), seen))
        assert [i for i, holds in enumerate(found) if not holds] == [place], changed
    assert len(knowedit.scores(rows()).rows) == len(knowedit.EDITORS)
    assert "carries 0.1 of a fact" in knowedit.notes(rows(), POINTED)[1]
    assert knowedit.effects(POINTED).rows[0] == ["last subject token", "0.1", "0.3", "0", "0"]


def ablations(**changes: list[float]) -> list[dict[str, Any]]:
    line = {
        f"{way} {mode} {size}": [0.8, 0.8]
        for way in concept_ablation.WAYS
        for mode in concept_ablation.MODES
        for size in concept_ablation.COUNTS
    }
    line |= {"base": [0.9, 0.82], "attribution noise 5": [0.4, 0.8], "random noise 5": [0.85, 0.8]}
    named = {name.replace("_", " "): value for name, value in changes.items()}
    return [{"concepts": [{**line, **named}] * 2, "seed": 0}]


def contrast(noise: float = 0.1, ascent: float = 0.95) -> list[dict[str, Any]]:
    other = {"probability": 0.4, "others": 0.8, "cosine": 0.5, "relearned": 0.6}
    one = {
        "target": 0.4,
        "reached": True,
        "noise": {**other, "jaccard": noise},
        "ascent": {**other, "jaccard": ascent},
    }
    return [{"concepts": [one], "seed": 0}]


def test_each_claim_of_concept_ablation_can_fail() -> None:
    assert verdicts(concept_ablation.judge(ablations(), contrast())) == [True] * 4
    for place, lines, pairs in (
        (0, ablations(attribution_noise_5=[0.62, 0.8]), contrast()),
        (0, ablations(attribution_noise_5=[0.4, 0.7]), contrast()),
        (1, ablations(random_noise_5=[0.7, 0.8]), contrast()),
        (2, ablations(projection_noise_5=[0.5, 0.8]), contrast()),
        (3, ablations(), contrast(noise=0.3)),
        (3, ablations(), contrast(ascent=0.7)),
    ):
        found = verdicts(concept_ablation.judge(lines, pairs))
        assert [i for i, holds in enumerate(found) if not holds] == [place]
    assert len(concept_ablation.ablations(ablations()).rows) == 1 + 18
    assert [row[0] for row in concept_ablation.contrasts(contrast()).rows] == ["noise", "ascent"]
