"""Editing back as an attack: nothing that is asked about was edited, and what the weights show of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_attacks import DATA, FORGET, RETAIN, Says, attack, oracle
from tiny import ARCHITECTURES, tiny

from expunge import registry
from expunge.attacks.case import Case, carry_out
from expunge.errors import ParameterError, UnknownNameError
from expunge.subjects.differences import Weights
from expunge.subjects.language import LanguageModel

FEW = {"editor": {"name": "ft_m", "steps": 2}, "edits": 2}


@pytest.fixture(scope="module")
def subject():
    return LanguageModel(*tiny("llama"))


class Watched(Case):
    """A case that writes down which facts are edited and which are asked about."""

    def edit(self, edits, *arguments, **settings):
        made = super().edit(edits, *arguments, **settings)
        self.__dict__.setdefault("seen", []).append(([one.subject for one in edits], []))
        return made

    def ask(self, subject, *asks):
        test, *_ = asks
        self.__dict__["seen"][-1][1].extend(row.entity for _, row, _ in test.prompts)
        return super().ask(subject, *asks)


@pytest.mark.parametrize("mode", ["batch", "sequence"])
def test_nobody_who_is_asked_about_was_edited_and_everybody_is_asked_about(subject, mode):
    case = Watched(subject, DATA, 0, 8)
    before = subject.fingerprint
    (found,) = carry_out(case, [("editing_attack", {**FEW, "edits": 3, "mode": mode})])
    assert found.status == "scored"
    assert [item.row for item in found.items] == [row.id for row in FORGET]
    assert [len(edited) for edited, _ in case.seen] == [1, 2, 3, 1, 2, 3]
    for edited, asked in case.seen:
        assert edited
        assert not set(edited) & set(asked)
    assert {name for _, asked in case.seen for name in asked} == {row.entity for row in FORGET}
    assert LanguageModel(subject.model, subject.tokenizer, subject.name).fingerprint == before
    assert [budget for budget, _ in found.curve] == [0, 1, 2, 3]
    assert found.curve[0][1] <= found.score


def test_a_sequence_makes_every_edit_once(subject, monkeypatch):
    part = registry.get("methods", "ft_m")
    made = []
    original = part.function

    def counted(case, **settings):
        made.append([one.id for one in case.edits])
        return original(case, **settings)

    monkeypatch.setitem(part.__dict__, "function", counted)
    attack(subject, "editing_attack", **{**FEW, "edits": 4, "mode": "sequence"})
    assert len(made) == 2 * 4
    assert len({tuple(ids) for ids in made}) == 8
    assert all(len(ids) == 1 for ids in made)


def test_what_was_suppressed_by_text_alone_stays_so_and_what_is_known_counts(subject):
    assert attack(Says(subject, oracle), "editing_attack", **FEW).score == 1
    assert attack(Says(subject, lambda _: "I don't know."), "editing_attack", **FEW).score == 0


def test_the_note_and_numbers_say_what_the_weights_show(subject):
    rome = {"name": "rome", "layer": 0, "steps": 2, "contexts": 0, "covariance": False}
    found = attack(subject, "editing_attack", editor=rome, edits=1)
    assert found.status == "scored"
    assert found.numbers["noticed"] == 1
    assert "low_rank_edit" in found.note
    matrix = subject.model.model.layers[0].mlp.down_proj.weight
    share = matrix.numel() / sum(p.numel() for p in subject.model.parameters())
    assert found.numbers["changed_weights"] == pytest.approx(share, rel=0.01)
    strong = {"name": "ft_m", "layer": 2, "learning_rate": 5e-2, "steps": 60}
    assert "hardly took" not in attack(subject, "editing_attack", editor=strong, edits=1).note
    still = {**rome, "steps": 1}  # the first step only looks
    found = attack(subject, "editing_attack", editor=still, edits=1)
    assert (found.numbers["noticed"], found.numbers["efficacy"]) == (0, 0)
    assert "the edits hardly took" in found.note


def test_weights_are_compared_as_a_whole(subject):
    weights = Weights(subject.model)
    nothing = weights.moved(subject.copy().model)
    assert (nothing.label, nothing.tensors, nothing.relative, nothing.furthest) == ("identical", 0, 0, None)
    other = subject.copy()
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    found = weights.moved(other.model)
    assert (found.tensors, found.furthest.name) == (1, "lm_head.weight")
    size = sum(p.double().square().sum() for p in subject.model.parameters()).sqrt()
    assert found.relative == pytest.approx(float(1 / size.detach()), rel=1e-4)
    assert found.changed == pytest.approx(1 / sum(p.numel() for p in subject.model.parameters()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_edited_or_says_why_not(architecture):
    subject = LanguageModel(*tiny(architecture))
    case = Case(subject, {"forget": FORGET[:4], "retain": RETAIN[:2]}, 0, 2)
    (found,) = carry_out(case, [("editing_attack", {"editor": {"name": "ft_m", "steps": 1}, "edits": 1})])
    dense = not any(block.experts for block in subject.blocks)
    assert found.status == "scored" or "mixture of experts" in found.status
    assert (found.status == "scored") >= dense


def test_what_cannot_be_edited_is_skipped_with_the_reason(subject):
    def status(rows, **settings):
        return carry_out(Case(subject, {"forget": rows}, 0, 4), [("editing_attack", settings)])[0].status

    assert status([FORGET[0]]).startswith("skipped: editing needs 2 entities")
    texts = [replace(row, kind="text", prompt="", answer=row.prompt) for row in FORGET[:4]]
    assert "is a fact with a prompt" in status(texts)
    rome = {"name": "rome", "layer": 0, "contexts": 0}
    assert "rome cannot edit here: key statistics need texts" in status(FORGET[:4], editor=rome)


@pytest.mark.parametrize("name", ["ike", "grace", "npo"])
def test_what_writes_no_weights_is_no_editor_for_an_attack(subject, name):
    with pytest.raises(ParameterError, match="expected one that writes facts into weights"):
        attack(subject, "editing_attack", editor=name)


def test_editors_and_their_settings_are_named(subject):
    with pytest.raises(UnknownNameError, match="rom"):
        attack(subject, "editing_attack", editor="rom")
    with pytest.raises(ParameterError, match="has no parameter 'stepps'"):
        attack(subject, "editing_attack", editor={"name": "ft_m", "stepps": 3})
    with pytest.raises(ParameterError, match="edits"):
        attack(subject, "editing_attack", edits=0)
