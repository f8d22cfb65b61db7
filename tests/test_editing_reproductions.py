"""Reproductions of editors: what is edited and what must stay, and claims that can fail."""

import pytest

from expunge.errors import ParameterError
from expunge.reproductions import easyedit, editing
from expunge.reproductions.crossed import RELATIONS

TINY = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "steps": 15, "batch_size": 16, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def case():
    return editing.subject(0, 30, TINY)


def test_edits_are_everybodys_first_fact_before_anybodys_second_with_other_answers(case):
    people, world = case.edited, case.world
    edits = case.edits(len(people) + 2)
    assert [edit.subject for edit in edits] == [*people, *people[:2]]
    assert len({edit.id for edit in edits}) == len(edits)
    for edit in edits:
        name, about = edit.id.split("/")
        assert edit.ground_truth == (world.people[name][about],)
        assert edit.target_new in world.choices[about]
        assert edit.target_new not in edit.ground_truth
        assert edit.prompt != edit.rephrasings[0]
        others = [one for one in edits if one.subject == name and one is not edit]
        assert len(edit.locality["subject"]) == 3 - len(others)  # what is edited itself need not stay
        assert all(name in probe.prompt for probe in edit.locality["subject"])
        assert not any(other in probe.prompt for probe in edit.locality["neighbours"] for other in people)
        if about == "born_in":  # what follows is another answer than before, or nothing could be seen
            ((follows,),) = edit.portability.values()
            assert follows.answers == (world.country[edit.target_new],)
            assert follows.answers != (world.country[world.people[name]["born_in"]],)
        else:
            assert not edit.portability
    # What must stay depends on how many are edited; the edits themselves do not.
    assert [edit.id for edit in case.edits(3)] == [edit.id for edit in edits[:3]]
    assert {edit.subject for edit in case.others()} == set(case.spared)
    assert not set(case.spared) & set(people)
    assert len(case.others()) == len(RELATIONS) * len(case.spared)
    with pytest.raises(ParameterError, match="more people"):
        case.edits(4 * len(people) + 1)


def test_demonstrations_are_about_people_who_are_asked_about_nowhere(case):
    shown = case.demonstrations()
    assert len(shown) == len(RELATIONS) * len(case.shown) == 20
    assert not set(case.shown) & {*case.edited, *case.spared}
    edits = case.edits(4 * len(case.edited))
    asked = {one.prompt for one in editing.questions([*edits, *case.others()])}
    taught = [one.prompt for one in editing.questions(shown)]
    assert asked.isdisjoint(taught)
    assert not any(name in text for text in asked for name in case.shown)
    for one in shown:
        assert one.rephrasings
        assert len(one.locality["subject"]) == 3
        assert len(one.locality["neighbours"]) == editing.NEAR
        assert all(any(name in probe.prompt for name in case.shown) for probe in one.locality["neighbours"])


def test_editors_that_learn_from_other_facts_edit_this_world(case, own_cache):
    (found,) = editing.made(case, "mend", {"steps": 2, "batch": 2, "layers": [0, 1]}, case.edits(2), "sequence", 0)
    assert len(found.steps) == 2
    assert editing.undone(case, [found])


def test_what_follows_is_averaged_over_the_edits_that_have_it(case):
    several = editing.made(case, "ike", {}, case.edits(5), "one", 0)
    each = [editing.measured(edited.model(), case.model, edited.edits) for edited in several]
    born = [one["one_hop"] for one in each if "one_hop" in one]
    assert len(born) == 2  # the first and the fifth are about birthplaces
    assert editing.alone(case, several)["one_hop"] == sum(born) / 2


def test_an_unedited_model_keeps_everything_and_a_trial_reports_what_was_undone(case, monkeypatch):
    assert editing.measured(case.model, case.model, case.edits(3))["kept"] == 1
    monkeypatch.setattr(easyedit, "subject", lambda seed, *_: case)
    found = easyedit.trial("ft_m", {"layer": 0, "steps": 4, "learning_rate": 0.5}, "one", 2, 0)
    assert found["restored"] == 1
    assert found["kept"] < 1
    nothing = easyedit.trial("none", {}, "one", 2, 0)
    assert nothing["kept"] == 1


def table(changes):
    """Results of every run of `easyedit` under which all claims hold, with some changed."""
    good = {
        "success": 0.9,
        "tokens": 0.9,
        "rephrase": 0.6,
        "subject": 0.8,
        "neighbours": 0.9,
        "kept": 1.0,
        "restored": 1.0,
    }
    runs = {
        **{f"rome, layer {i}": {} for i in range(3)},
        "rome, layer 3": {"success": 0.0},
        "rome, layer 0, C = I": {"neighbours": 0.5},
        "grace, layer 2": {"rephrase": 0.0},
        "ike, k = 0": {"neighbours": 0.2},
        "rome, 10 in a row": {"success": 0.8, "neighbours": 0.7},
        "memit, 10 at once, weight 30": {"neighbours": 0.8},
        "memit, 10 at once, weight 100": {"success": 0.75, "neighbours": 0.85},
    }
    return [
        {**good, **values, **changes.get(run, {}), "run": run, "seed": seed}
        for run, values in runs.items()
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {f"rome, layer {i}": {"success": 0.5} for i in range(3)}),
        (0, {"rome, layer 3": {"success": 0.2}}),
        (1, {"rome, layer 0, C = I": {"neighbours": 0.8}}),
        (2, {"grace, layer 2": {"rephrase": 0.3}}),
        (2, {"grace, layer 2": {"kept": 0.9}}),
        (2, {"ike, k = 0": {"restored": 0.0}}),
        (3, {"ike, k = 0": {"success": 0.5}}),
        (3, {"ike, k = 0": {"neighbours": 0.6}}),
        (4, {"memit, 10 at once, weight 100": {"neighbours": 0.72}}),
        (4, {"memit, 10 at once, weight 100": {"success": 0.6}}),
    ],
)
def test_each_claim_of_easyedit_can_fail(place, changes):
    assert [claim.holds for claim in easyedit.judge(table({}), 4, 10, 100.0)] == [True] * 5
    found = [claim.holds for claim in easyedit.judge(table(changes), 4, 10, 100.0)]
    assert found[place] is False
    assert [holds for i, holds in enumerate(found) if i != place] == [True] * 4


def test_memits_weight_is_the_gentlest_that_is_as_good_as_rome_on_the_first_seed():
    assert easyedit._weight(table({}), (30.0, 100.0), 10, 0) == 100.0
    weak = {"memit, 10 at once, weight 100": {"success": 0.6}}
    assert easyedit._weight(table(weak), (30.0, 100.0), 10, 0) == 30.0
    both = {**weak, "memit, 10 at once, weight 30": {"success": 0.1}}
    assert easyedit._weight(table(both), (30.0, 100.0), 10, 0) == 100.0
