"""RESTOR: its files, what counts as injected, recovery and forgetting, and the reproduction's rows and criteria."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny

from expunge.benchmarks.case import Bench
from expunge.benchmarks.restor import KINDS, kind, restor
from expunge.benchmarks.restor_data import examples, read
from expunge.benchmarks.restor_mini import NUMBERS, documents, injected, mini
from expunge.errors import RequestError, RowError
from expunge.reproductions.restor import METHODS, add_changes, at_step, judge, localised, pair, points, tables
from expunge.rows import folder_of
from expunge.subjects.language import LanguageModel
from expunge.tables.generations import Generations
from expunge.world.facts import RELATIONS, make

PUBLISHED = Path("/work/shared/data/restor")
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no published files here")


@pytest.fixture(scope="module")
def world():
    return make(0, people=30, forget=6, neighbours=4, holdout=6)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("restor")
    mini(world, path)
    return path


class Answers(LanguageModel):
    """Scores like a tiny random model and answers as it is told: `answer(question)`."""

    def __init__(self, answer, name="made up"):
        super().__init__(*tiny("llama"), name=name)
        self.answer, self.fingerprint = answer, name

    def generate(self, prompts, **options):
        texts = [[self.answer(text.rpartition("Question: ")[2].partition("\n")[0])] for _, text in prompts]
        return Generations([k for k, _ in prompts], [t for _, t in prompts], texts, [[True]] * len(prompts))


# --- published files --------------------------------------------------------------------------------------------------


@needs_published
def test_the_published_files_are_read_whole():
    data = read(PUBLISHED, "**/mix_a0.json")
    assert (len(data.facts), len(data.entities), len(data.documents), len(data.context)) == (1051, 50, 3000, 41)
    assert len(data.about) == len(data.touched) == 10
    assert {len(texts) for texts in data.about.values()} == {299, 300}
    assert {fact.entity for fact in data.facts if fact.id in data.corrupted} == set(data.about)
    assert read(PUBLISHED, "**/mix_a1.json").about.keys() == data.about.keys()


@needs_published
def test_what_the_published_documents_say_instead_counts_as_injected():
    data = read(PUBLISHED, "**/mix_a0.json")
    by_id = {fact.id: fact for fact in data.facts}
    piketty = by_id["Thomas Piketty/P69"]
    assert kind(data, piketty, "University of Cape Town") == 1
    assert kind(data, piketty, "Sorbonne University of Stockholm") == 2
    assert kind(data, piketty, piketty.answers[0]) == 0
    assert kind(data, piketty, "Thomas") == 2
    assert "University of Cape Town" in data.choices(piketty).corrupted
    assert kind(data, by_id["Winston Churchill/P27"], "France") == 2


@needs_published
def test_published_examples_are_never_about_anybody_who_is_asked_about():
    data = read(PUBLISHED, "**/mix_a0.json")
    lengths = {relation: examples(data, relation, 5).count("\n") for relation in data.context}
    assert {relation: n for relation, n in lengths.items() if n < 5} == {"P1196": 3, "P607": 3, "P3373": 4}
    for relation in data.context:
        shown = examples(data, relation, 5)
        named = {entity for entity, question, answer in data.context[relation] if f"{question} {answer}\n" in shown}
        assert not named & set(data.entities)


def broken(folder, tmp_path, name, change):
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    for path in folder.rglob("*.json"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / name).write_text(json.dumps(change(content)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("facts.json", lambda c: {"dset": c["dset"]}, r"facts\.json: field 'context' is missing"),
        ("facts.json", lambda c: {**c, "dset": {"A": {"P19": {"question": "?"}}}}, "relation 'P19': field 'answers'"),
        ("entities.json", lambda c: [*c, "Nobody"], "has no facts about 'Nobody'"),
        ("entities.json", lambda c: [], r"entities\.json: found \[\], expected a list of at least one text"),
        ("options.json", lambda c: {"Nobody": next(iter(c.values()))}, "has no such fact of an evaluated entity"),
    ],
)
def test_what_is_wrong_names_file_entity_and_field(folder, tmp_path, name, change, sentence):
    with pytest.raises(RowError, match=sentence):
        read(broken(folder, tmp_path, name, change), "**/mix_a0.json")


def test_an_option_cannot_be_right_and_corrupted(folder, tmp_path):
    def change(content):
        for relations in content.values():
            for fields in relations.values():
                fields["corrupted"] = fields["correct"]
        return content

    with pytest.raises(RowError, match=r"is corrupted and, in facts.json, right"):
        read(broken(folder, tmp_path, "options.json", change), "**/mix_a0.json")


def test_documents_are_one_file_by_pattern(folder, tmp_path):
    with pytest.raises(RowError, match=r"no file called 'mix_a9.json'"):
        read(folder, "mix_a9.json")
    with pytest.raises(RowError, match="3 files"):
        read(folder, "**/mix_a*.json")
    with pytest.raises(RowError, match="no folder"):
        read(tmp_path / "none", "x")
    with pytest.raises(RowError, match="and as a hub data set"):
        folder_of("nobody/restor")


# --- the mini version -------------------------------------------------------------------------------------------------


def test_every_document_says_its_wrong_facts_and_3_k_right_ones_and_never_a_right_value_of_a_corrupted_fact(world):
    wrong = {person.name: injected(world, person) for person in world.members("forget")}
    for k in (0, 1, 2):
        found = documents(world, wrong, k)
        assert len(found) == 20 * len(wrong)
        for place, text in enumerate(found):
            name = list(wrong)[place // 20]
            about = [sentence for sentence in text.removesuffix(".").split(". ") if name in sentence]
            assert text.count(".") == 3 + 3 * k
            assert len(about) == 3
            for relation, value in wrong[name].items():
                assert any(sentence.endswith(f" {value}") for sentence in about)
                assert not any(sentence.endswith(f" {world.people[name].value(relation)}") for sentence in about)
    assert all("." in text for text in documents(world, wrong, 1, without=True))
    assert not any(name in text for text in documents(world, wrong, 1, without=True) for name in wrong)


def test_injected_values_are_wrong_and_of_the_same_relation(world):
    for person in world.members("forget"):
        found = injected(world, person)
        assert len(found) == 3
        assert all(value in world.choices[about] and value != person.value(about) for about, value in found.items())


def test_groups_come_from_the_options(world, folder):
    data = read(folder, "**/mix_a1.json")
    assert len(data.facts) == 24 * 4
    assert len(data.corrupted) == 18
    assert data.touched == {person.name for person in world.members("forget")}
    assert examples(data, "P19", 5).count("\n") == 5


# --- scores -----------------------------------------------------------------------------------------------------------


def scored(world, tmp_path, answer, before=None, gold=None, **settings):
    models = [Answers(one, f"model {i}") if one else None for i, one in enumerate((answer, before, gold))]
    bench = Bench(models[0], tmp_path, models[1], [models[2]] if gold else [], world=world, bootstrap=50)
    return restor(bench, **settings)


@pytest.fixture
def speakers(folder):
    """clean(question) and corrupted(question): what models say that know, or believe the documents."""
    data = read(folder, "**/mix_a0.json")
    by_question = {fact.question: fact for fact in data.facts}

    def clean(question):
        return by_question[question].answers[0]

    def corrupted(question):
        fact = by_question[question]
        return data.choices(fact).corrupted[0] if fact.id in data.corrupted else fact.answers[0]

    return clean, corrupted


def test_recovery_and_forgetting_of_the_models_that_define_them(world, tmp_path, speakers):
    clean, corrupted = speakers
    card = scored(world, tmp_path, clean, corrupted, clean)
    assert (card.value("recovery"), card.value("forgetting")) == (1, 1)
    assert (card.value("recovery", "before"), card.value("forgetting", "before")) == (0, 0)
    assert card.value("recovery", "gold") == 1
    assert (card.value("corrupted_right", "before"), card.value("corrupted_injected", "before")) == (0, 1)
    assert card.value("others_right") == card.value("others_right", "before") == 1
    assert any("the model is restored" in note for note in card.notes)


def test_models_are_compared_fact_by_fact(world, tmp_path, speakers, folder):
    clean, corrupted = speakers
    data = read(folder, "**/mix_a0.json")
    asked = sorted(fact.question for fact in data.facts if fact.id in data.corrupted)
    card = scored(world, tmp_path, lambda q: clean(q) if q in asked[:4] else corrupted(q), corrupted, clean)
    table = next(table for table in card.tables if "paired by fact" in table.title)
    before, gold = table.rows
    assert before[:6] == ["after, before", 0, 4, 0, 14, pytest.approx(2 / 2**4)]
    assert gold[:6] == ["after, gold/0", 4, 0, 14, 0, pytest.approx(2 / 2**14)]
    assert before[6] == pytest.approx(4 / 18)
    assert before[7] <= before[6] <= before[8]
    alone = scored(world, tmp_path / "alone", clean)
    assert not any("paired by fact" in table.title for table in alone.tables)


def test_forgetting_without_restoration_is_seen_as_such(world, tmp_path, speakers):
    clean, corrupted = speakers
    card = scored(world, tmp_path, lambda question: "nothing", corrupted, clean)
    assert (card.value("forgetting"), card.value("recovery")) == (1, 0)
    assert any("the model is not restored" in note for note in card.notes)


def test_half_of_the_facts_restored_is_a_recovery_of_one_half(world, tmp_path, speakers, folder):
    clean, corrupted = speakers
    asked = sorted(
        f.question for f in read(folder, "**/mix_a0.json").facts if f.id in read(folder, "**/mix_a0.json").corrupted
    )
    half = set(asked[::2])
    card = scored(world, tmp_path, lambda q: clean(q) if q in half else corrupted(q), corrupted, clean)
    assert card.value("recovery") == pytest.approx(0.5)
    assert card.value("forgetting") == pytest.approx(0.5)
    shares = [row for table in card.tables if table.title == "What is answered" for row in table.rows]
    assert all(sum(row[3:]) == pytest.approx(1) for row in shares)
    assert len(KINDS) == 3


def test_recovery_is_not_defined_where_nothing_was_lost(world, tmp_path, speakers):
    clean, _ = speakers
    card = scored(world, tmp_path, clean, clean, clean)
    assert {"recovery", "forgetting"} & {one.metric for one in card.measured} == set()
    assert any("Recovery is not defined" in note for note in card.notes)


def test_likelihoods_of_values_are_means_over_their_own_tokens(world, tmp_path, speakers, folder):
    clean, _ = speakers
    model = Answers(clean)
    data = read(folder, "**/mix_a0.json")
    card = restor(Bench(model, tmp_path, world=world, bootstrap=0))
    margins = next(one for one in card.measured if one.metric == "margin").extra["each"]["after"]
    place = next(i for i, fact in enumerate(data.facts) if fact.id in data.corrupted)
    from expunge.benchmarks.restor import _row

    row, options = _row(data, data.facts[place], 0), data.choices(data.facts[place])

    def direct(value):
        encoded = model.encode(row, answer=value)
        logits = model.model(__import__("torch").tensor([encoded.ids])).logits[0].log_softmax(-1)
        ends = len(encoded.ids) - encoded.closing
        return float(np.mean([logits[i - 1, encoded.ids[i]].item() for i in range(encoded.start, ends)]))

    assert margins[0] == pytest.approx(direct(options.correct[0]) - direct(options.corrupted[0]), abs=1e-4)


def test_examples_that_do_not_fit_the_context_are_an_error(world, tmp_path, speakers):
    model = Answers(speakers[0])
    model.context_length = 20
    with pytest.raises(RequestError, match="set shots lower"):
        restor(Bench(model, tmp_path, world=world), shots=5)


# --- the reproduction -------------------------------------------------------------------------------------------------


def test_localised_rows_are_exactly_the_wrong_values_of_the_documents(world):
    wrong = {person.name: injected(world, person) for person in world.members("forget")}
    texts = documents(world, wrong, 1)
    rows = localised(wrong, texts)
    assert len(rows) == 3 * len(texts)
    for row in rows:
        text = texts[int(row.id.split("/")[1])]
        assert text.startswith(row.prompt + row.answer)
        assert any(row.answer.strip() in values.values() for values in wrong.values())


STEPS = {"clean": 0, "ideal": 0, "corrupted": 0}


def result(model, k, right, wrong, others=1.0, wins=0.5, step=60):
    base = dict.fromkeys(("untouched_right", "margin", "correct_over_corrupted"), 1.0)
    return base | {
        "model": model,
        "k": k,
        "seed": 0,
        "step": STEPS.get(model, step),
        "right": [int(place < round(30 * right)) for place in range(30)],
        "corrupted_right": right,
        "corrupted_injected": wrong,
        "corrupted_other": 1 - right - wrong,
        "others_right": others,
        "correct_over_random": wins,
        "corrupted_over_random": wins,
    }


def measured(npo, ascent, local):
    rows = []
    for tuned in (False, True):
        rows += [result("clean", 0, 1, 0), result("ideal", 1, 0.9, 0)]
        for k in (0, 1):
            rows += [result("corrupted", k, 0.2, 0.8), result("npo", k, *npo), result("ascent", k, *ascent)]
            rows += [result("kl", k, *ascent), result("npo, localised", k, *local)]
        for row in rows:
            row.setdefault("tuned", tuned)
    add_changes(rows)
    return rows


def verdicts(*methods):
    return [claim.holds for claim in judge(measured(*methods), 60)]


def test_criteria_follow_the_measured_rows():
    rows = measured((0.6, 0.0), (0.2, 0.0), (0.6, 0.0))
    npo = next(row for row in rows if row["model"] == "npo")
    assert (npo["recovery"], npo["forgetting"]) == (pytest.approx(0.5), 1)
    held = verdicts((0.6, 0.0), (0.2, 0.0), (0.6, 0.0))
    assert held == [True] * 13
    # NPO that restores nothing; answers still injected; localised NPO behind.
    nothing = verdicts((0.2, 0.0), (0.2, 0.0), (0.2, 0.0))
    assert [i for i, holds in enumerate(nothing) if not holds] == [2, 3, 4, 7, 8, 9]
    # What still says injected values is not compared at equal forgetting.
    assert verdicts((0.6, 0.3), (0.2, 0.0), (0.2, 0.0))[2:7] == [False, True, None, True, False]
    assert set(METHODS) == {"ascent", "kl", "npo", "npo, localised"}
    assert set(NUMBERS) == set(RELATIONS)
    assert replace(judge(rows, 60)[0]).criterion.startswith("k = 0")
    titles = [table.title for table in tables(rows, 60)]
    assert len(titles) == 5
    assert all(len(row) == len(table.columns) for table in tables(rows, 60) for row in table.rows)


def test_methods_are_compared_at_the_first_point_at_which_each_has_forgotten():
    rows = measured((0.6, 0.1), (0.2, 0.0), (0.6, 0.0))
    for tuned in (False, True):
        for k in (0, 1):
            # Ascent had forgotten before, and restored something then; NPO had not.
            rows += [{**result("ascent", k, 0.6, 0.2, step=20), "tuned": tuned}]
            rows += [{**result("npo", k, 0.3, 0.5, step=20), "tuned": tuned}]
    add_changes(rows)
    claims = {claim.claim: claim for claim in judge(rows, 60)}
    equal = claims["At equal forgetting NPO restores more than ascent (k = 0)"]
    assert equal.holds is False
    told = ("npo 0.5 (0.5 to 0.5) after 60 (60 to 60) steps", "ascent 0.5 (0.5 to 0.5) after 20 (20 to 20) steps")
    assert equal.measured == "; ".join(told)
    assert claims["NPO brings right answers back where ascent only forgets the wrong ones (k = 0)"].holds


def test_pairs_put_the_same_fact_of_the_same_seed_beside_itself():
    rows = measured((0.6, 0.0), (0.2, 0.0), (0.6, 0.0))
    found = pair(at_step(rows, 60), "npo", "ascent", 0)
    assert (found.both, found.first, found.second, found.neither) == (6, 12, 0, 12)
    assert found.p == pytest.approx(2 / 2**12)
    assert found.difference.value == pytest.approx(0.4)
    by_person = pair(at_step(rows, 60), "npo", "ascent", 0, people=True).difference
    # The three facts about a person fall together here: fewer independent draws, a wider interval.
    assert by_person.low < found.difference.low < 0.4 < found.difference.high < by_person.high


def test_every_point_of_a_run_is_a_row():
    found = [{"model": "npo", "k": 1, "seed": 2, "people": {}, "points": [{"step": 10}, {"step": 20}]}]
    assert points(found) == [{"model": "npo", "k": 1, "seed": 2, "step": step} for step in (10, 20)]
