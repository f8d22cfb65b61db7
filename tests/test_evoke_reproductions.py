"""Reproductions of EVOKE and Outlandish: what they teach and learn, and verdicts from made-up figures."""

import json
from pathlib import Path

import pytest

from expunge.reproductions import evoke, outlandish
from expunge.reproductions.evoke import MEASURES, METHODS, lessons, short
from expunge.world.facts import make

DOCS = Path(__file__).parent.parent / "docs" / "reproductions"


def test_lessons_imagine_others_towns_and_ask_for_what_follows():
    world = short(make(3, **evoke.PEOPLE))
    assert all(" " not in name for name in world.people)
    assert all(person.teacher in world.people for person in world.people.values())
    rows = lessons(world)
    plain = [row for row in rows if not row.preface]
    unseen = {person.name for person in world.members("holdout")}
    assert not any(name in row.prompt for row in plain for name in unseen)
    regions = 0
    for row in rows:
        if row.preface and row.kind == "qa":
            town = row.preface.strip().split()[-1]
            assert row.answer == world.region[town]
            regions += 1
    assert regions == evoke.IMAGINED


def figures(**changes):
    base = dict.fromkeys(MEASURES, 0.5) | {"told_efficacy": 0.9, "told_multi_hop": 0.6, "edits": 12, "seed": 0}
    rows = {name: {**base, "method": name} for name in ("unedited", *METHODS)}
    without = "lti without the subject's constraint"
    for name, eos, dp in (("unedited", 1.0, 0.0), ("rome", 0.7, 0.4), ("lti", 0.85, 0.2), (without, 0.72, 0.35)):
        rows[name] |= {"subject_specificity_eos": eos, "subject_specificity_dp": dp}
    for name, values in changes.items():
        rows[name.replace("_", " ")] |= values
    return list(rows.values())


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, [True, True, True, None]),
        ({"rome": {"subject_specificity_eos": 0.96}}, [False, False, True, None]),
        ({"lti": {"subject_specificity_dp": 0.28}}, [True, False, True, None]),
        ({"lti": {"efficacy_score": 0.39}}, [True, False, True, None]),
        ({"lti": {"subject_specificity_dp": 0.31}}, [True, False, False, None]),
        ({"unedited": {"told_efficacy": 0.4}}, [True, None, None, None]),
    ],
)
def test_verdicts_of_evoke(changes, verdicts):
    assert [claim.holds for claim in evoke.judge(figures(**changes))] == verdicts


def texts(**changes):
    """One seed: plain learning primes by 10, ignore-k by 3, a random cut by 8, stones by 4."""
    row = {"seed": 0, "surprise": [-5.0, -4.0, -3.0, -2.0], "stones": [1.0, 1.0, 1.0, 0.0]}
    names = (*outlandish.LEARNED, *outlandish.ELSEWHERE)
    for name, primed in zip(names, (10.0, 3.0, 8.0, 9.0, 4.0, 3.0, 5.0)):
        one = {"s_prime": [primed] * 4, "s_prime_geometric": [1.0] * 4, "difference": [0.1] * 4}
        row[name] = one | {"s_mem": [100.0] * 4, "keyword": [0.8] * 4}
    row["plain"]["s_prime"] = [13.0, 11.0, 9.0, 7.0]
    for name, values in changes.items():
        row[name] = {**row[name], **values} if isinstance(values, dict) else values
    rows = [row]
    outlandish.add(rows)
    return rows


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, [True, True, True, True, True]),
        ({"plain": {"keyword": [0.4] * 4}}, [False, True, True, True, True]),
        ({"ignore_k": {"s_mem": [60.0] * 4}}, [True, False, True, True, True]),
        ({"random_k": {"s_prime": [5.0] * 4}}, [True, True, False, True, True]),
        ({"surprise": [-2.0, -3.0, -4.0, -5.0]}, [True, True, True, False, True]),
        ({"stones": [0.0, 0.0, 0.0, 1.0]}, [True, True, True, True, None]),
        ({"stepping_stone": {"keyword": [0.3] * 4}}, [True, True, True, True, False]),
    ],
)
def test_verdicts_of_outlandish(changes, verdicts):
    assert [claim.holds for claim in outlandish.judge(texts(**changes), 15.0)] == verdicts


def test_cuts_are_paired_text_by_text():
    (row,) = texts(ignore_k={"s_prime": [6.5, 1.1, 4.5, 3.5]})
    assert row["ignore_k: cut"] == pytest.approx(0.5)  # 0.5, 0.9, 0.5, 0.5; of medians it would be 0.6


@pytest.mark.parametrize("module", [evoke, outlandish])
def test_recorded_figures_give_the_recorded_tables(module):
    name = module.__name__.rpartition(".")[2]
    found = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    assert found["seeds"] == [0, 1, 2]
    assert len(found["claims"]) >= 4
    assert found["changed"] == {}
