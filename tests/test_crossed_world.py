"""The world of editing: shared names, wordings that are held out, facts that agree with one another."""

from collections import Counter

import pytest

from expunge.errors import ParameterError
from expunge.reproductions import crossed
from expunge.reproductions.crossed import RELATIONS, WORDINGS


@pytest.fixture(scope="module")
def world():
    return crossed.crossed(3, people=32)


@pytest.mark.parametrize("people", [25, 32, 100, 300])
def test_every_first_and_every_last_name_is_shared_and_no_whole_name_is(people):
    world = crossed.crossed(1, people)
    names = [name.split() for name in world.people]
    assert len({tuple(name) for name in names}) == people
    for place in (0, 1):
        count = Counter(name[place] for name in names)
        # All stand in every full turn; the last turn may be cut short.
        assert set(count.values()) <= {crossed.SHARED - 1, crossed.SHARED}
    assert not {first for first, _ in names} & {last for _, last in names}


def test_a_world_follows_from_its_seed(world):
    assert crossed.crossed(3, people=32) == world
    assert crossed.crossed(4, people=32) != world
    assert [row.answer for row in crossed.lessons(world)] == [row.answer for row in crossed.lessons(world)]


def test_values_are_dealt_evenly_and_works_have_two_words(world):
    for about in ("born_in", "trade", "plays"):
        count = Counter(facts[about] for facts in world.people.values())
        assert set(count) == set(world.choices[about])
        assert max(count.values()) - min(count.values()) <= 1
    assert {len(facts["work"].split()) for facts in world.people.values()} == {2}
    assert {len(value.split()) for about in ("born_in", "trade", "plays") for value in world.choices[about]} == {1}


def test_no_fact_is_taught_in_its_held_out_wording_and_each_wording_is_held_out_for_somebody(world):
    taught = {(row.prompt, row.answer) for row in crossed.lessons(world)}
    prompts = [prompt for prompt, _ in taught]
    held = Counter()
    for name, facts in world.people.items():
        for about, value in facts.items():
            trained, held_out = crossed.wordings(world, name, about)
            assert {(text, f"{value}.") for text in trained} <= taught
            assert not any(held_out in prompt for prompt in prompts)
            said = [text.removesuffix(" {value}.").replace("{name}", name) for text in WORDINGS[about]]
            assert sorted([*trained, held_out]) == sorted(said)
            held[about, said.index(held_out)] += 1
    assert len(held) == len(RELATIONS) * 3


def test_the_country_follows_from_the_place_of_birth(world):
    taught = {row.prompt: row.answer for row in crossed.lessons(world)}
    for name, facts in world.people.items():
        assert taught[crossed.country_of(name)] == world.country[facts["born_in"]] + "."
    assert len(set(world.country.values())) > 1


def test_what_is_told_is_asked_in_a_wording_that_is_taught_and_answered_as_told(world):
    told = [row for row in crossed.lessons(world) if "\n" in row.prompt]
    assert len(told) == crossed.TOLD_EACH * len(world.people)
    for row in told:
        assert row.answer.removesuffix(".") in row.prompt.split("\n")[0]


def test_every_word_is_one_token_wherever_it_stands(world):
    texts = [f"{row.prompt} {row.answer}".strip() for row in crossed.lessons(world)]
    words = crossed.words(texts)
    name = next(iter(world.people))
    first, last = words.encode(name)
    assert words.encode(f"So. {name}")[-2:] == [first, last] or words.unk_token_id in words.encode("So.")
    for text in texts:
        ids = words.encode(text)
        assert words.unk_token_id not in ids
        assert words.decode(ids).strip() == text
    work = next(facts["work"] for facts in world.people.values())
    assert len(words.encode(work)) == 2


@pytest.mark.parametrize("people", [24, 1001])
def test_a_world_in_which_names_cannot_be_shared_or_given_is_refused(people):
    with pytest.raises(ParameterError, match=f"people is {people}"):
        crossed.crossed(0, people)


@pytest.mark.parametrize(
    ("people", "given", "steps"), [(25, {}, 1200), (100, {}, 1200), (375, {}, 4500), (375, {"steps": 7}, 7)]
)
def test_in_a_larger_world_every_sentence_is_read_as_often(monkeypatch, people, given, steps):
    found = []
    monkeypatch.setattr(
        crossed, "taught", lambda kind, rows, recipe, *_, **__: found.append(recipe) or {"before": None}
    )
    crossed.model_of(crossed.crossed(0, people), given)
    assert found[0].steps == steps
    assert found[0].hidden_size == crossed.RECIPE.hidden_size
