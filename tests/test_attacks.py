"""Attacks: matchers, estimators, and what they find on models that know, refuse or answer everything."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny import tiny

from expunge.attacks.case import Case, carry_out
from expunge.audit import battery
from expunge.errors import ParameterError, UnknownNameError
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.output_filter import Filtered, output_filter
from expunge.methods.optimise.loop import fit
from expunge.metrics.matching import leak_at, recovered, says
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.subjects.rounding import round_to_nearest
from expunge.tables import passes
from expunge.tables.generations import Generations
from expunge.tables.passes import Generate, Score, Store, run

CITIES = ("Tivin", "Carth", "Orsk", "Hesper")


def people(kind, count):
    return [
        Row(
            id=f"{kind}/{i}",
            prompt=f"where was {kind} {i} born?",
            answer=CITIES[i % 4],
            value=CITIES[i % 4],
            entity=f"{kind} {i}",
            paraphrased_prompts=(f"in which town was {kind} {i} born?",),
        )
        for i in range(count)
    ]


FORGET, RETAIN = people("Ilva", 10), people("Mo", 8)
DATA = {"forget": FORGET, "retain": RETAIN}


@pytest.fixture(scope="module")
def knowing():
    """A tiny model that has learned the rows by heart."""
    subject = LanguageModel(*tiny("llama"))
    items = [subject.encode(row) for row in FORGET + RETAIN]
    fit(subject, items, steps=160, batch_size=18, learning_rate=1e-2, seed=0, schedule="cosine")
    return subject


def attack(subject, name, store=None, **settings):
    return carry_out(Case(subject, DATA, 0, 8), [(name, settings)], store)[0]


class Says:
    """A subject whose outputs are made up; everything else is a real model's."""

    def __init__(self, inner, answer):
        self.inner, self.answer, self.calls = inner, answer, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @property
    def fingerprint(self):
        return "made up"

    def copy(self):
        return Says(self.inner.copy(), self.answer)

    def generate(self, prompts, *, samples=1, **options):
        self.calls += 1
        texts = [[self.answer(text)] * samples for _, text in prompts]
        return Generations([k for k, _ in prompts], [t for _, t in prompts], texts, [[True] * samples for _ in texts])


def oracle(text):
    """Knows every row, whatever the wording."""
    return next(row.answer for row in FORGET + RETAIN if row.entity in text)


# --- matching --------------------------------------------------------------------------------------------------------


def test_a_value_must_be_whole_words():
    assert says("She was born in Carth.", "Carth")
    assert says("carth", "Carth")
    assert not says("She comes from Carthage", "Carth")
    assert not says("", "Carth")


def test_what_the_prompt_said_is_no_evidence():
    prompt = "Where was Mo born: Carth or Tivin?"
    assert not says(prompt, "Carth", prompt)
    assert not says("Carth or Tivin", "Carth", prompt) or says("Carth", "Carth", "Where was Mo born?")
    assert says(f"{prompt} Carth", "Carth", prompt)


def test_rows_without_a_value_are_scored_by_overlap():
    row = Row(id="0", prompt="who?", answer="a maker of maps")
    assert recovered(row, "a maker of maps") == 1
    assert 0 < recovered(row, "maps") < 1
    assert recovered(replace(row, value="maps"), "of maps indeed") == 1
    assert recovered(replace(row, value="x", aliases=("Heron",)), "the heron") == 1


# --- estimators ------------------------------------------------------------------------------------------------------


def test_leak_at_k_is_unbiased():
    for n, c in product((4, 16), (0, 1, 3, 4)):
        assert leak_at(1, n, c) == pytest.approx(c / n)
        values = [leak_at(k, n, c) for k in range(1, n + 1)]
        assert values == sorted(values)
        assert all(leak_at(k, n, c) == 1 for k in range(n - c + 1, n + 1) if c)


def test_rounding_is_idempotent_and_gentle_at_sixteen_bits(knowing):
    ids = torch.tensor([knowing.encode(FORGET[0]).ids])
    copies = [knowing.copy() for _ in range(3)]
    round_to_nearest(copies[0].model, 16)
    round_to_nearest(copies[1].model, 4)
    with torch.no_grad():
        plain, fine, coarse = (s.model(input_ids=ids).logits for s in (knowing, copies[0], copies[1]))
        round_to_nearest(copies[1].model, 4)
        again = copies[1].model(input_ids=ids).logits
    assert (plain - fine).abs().max() < 1e-2
    assert (plain - coarse).abs().max() > 1e-2
    assert torch.allclose(coarse, again, atol=1e-5)
    before, after = (dict(s.model.named_parameters()) for s in (knowing, copies[1]))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    matrix = after["model.layers.0.mlp.down_proj.weight"]
    assert max(len(row.unique()) for row in matrix) <= 15


# --- attacks on known models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["direct", "paraphrase", "decoding", "relearn"])
def test_text_attacks_score_one_on_an_oracle_and_zero_on_a_refuser(knowing, name):
    settings = {"steps": 1} if name == "relearn" else {}
    assert attack(Says(knowing, oracle), name, **settings).score == 1
    assert attack(Says(knowing, lambda _: "I don't know."), name, **settings).score == 0


def test_a_model_that_knows_is_found_out_by_every_standard_probe(knowing):
    for name, _ in battery():
        if name == "paraphrase":  # this model never saw another wording
            continue
        found = attack(knowing, name)
        assert found.status == "scored" or "falls" in found.status, name
        if found.status == "scored":
            assert found.score >= 0.9, name
        assert found.budget["queries"] >= 5


def test_a_filter_hides_the_answer_but_not_the_inside(knowing):
    filtered = output_filter(GuardCase(knowing, DATA))
    assert isinstance(filtered, Filtered)
    assert attack(filtered, "direct").score == 0
    assert attack(filtered, "decoding").score == 0
    assert attack(filtered, "relearn", steps=2).score == 0
    assert attack(filtered, "logit_lens").score >= 0.9
    assert filtered.fingerprint != knowing.fingerprint
    assert filtered.copy().generate([(("0", "q"), "where was Ilva 0 born?")], max_new_tokens=3).texts


def test_lens_at_the_last_layer_finds_what_greedy_decoding_says(knowing):
    direct, lens = attack(knowing, "direct"), attack(knowing, "logit_lens")
    said = {item.row: item.recovered for item in direct.items}
    assert all(item.recovered == 1 for item in lens.items if said[item.row] == 1)


def test_relearning_nothing_is_asking_directly(knowing):
    for settings in ({"steps": 0}, {"steps": 4, "learning_rate": 0.0}):
        found = attack(knowing, "relearn", **settings)
        direct = {item.row: item.recovered for item in attack(knowing, "direct").items}
        assert {item.row: item.recovered for item in found.items} == direct
        assert len({value for _, value in found.curve}) == 1


class Watched(Case):
    """A case that notes who is asked what by copies that were taught what."""

    def teach(self, subject, rows, **settings):
        subject.taught = {row.entity for row in rows}
        super().teach(subject, rows, **settings)

    def ask(self, subject, *asks):
        asked = {row.entity for ask in asks for _, row, _ in ask.prompts}
        self.rows.setdefault("seen", []).append((subject, subject.taught, asked))
        return super().ask(subject, *asks)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_every_entity_is_asked_about_by_a_copy_that_was_not_taught_it(count):
    subject = LanguageModel(*tiny("llama"))
    before = subject.fingerprint
    case = Watched(subject, {"forget": FORGET[:count]}, 0, 8)
    found = carry_out(case, [("relearn", {"steps": 4})])[0]
    entities = {row.entity for row in FORGET[:count]}
    assert sorted(item.row for item in found.items) == sorted(row.id for row in FORGET[:count])
    assert [step for step, _ in found.curve] == [0, 1, 2, 4]
    assert {key: found.budget[key] for key in ("queries", "steps", "folds", "rows")} == {
        "queries": 4 * count,
        "steps": 4,
        "folds": 2,
        "rows": (count + 1) // 2,
    }
    seen = case.rows["seen"]
    assert len(seen) == 2 * 3
    assert len({id(copy) for copy, _, _ in seen}) == 2  # each half from the unlearned model anew
    for _, taught, asked in seen:
        assert taught
        assert asked
        assert taught.isdisjoint(asked)
        assert taught | asked == entities
    assert LanguageModel(subject.model, subject.tokenizer).fingerprint == before


def test_the_best_number_of_steps_is_that_of_both_halves_together():
    """One half comes back after 1 step and is lost again, the other after 2 steps: 2 are best for both."""
    rows = [replace(row, entity=str(i % 2)) for i, row in enumerate(FORGET[:6])]
    first, at = [], []

    class Told(Case):
        def teach(self, subject, lesson, *, evaluate_at, evaluate, **_):
            first.append(lesson[0].entity)
            for step in evaluate_at:
                at[:] = [step]
                evaluate(step)

        def ask(self, subject, *asks):
            number = {1: (3, 0), 2: (1, 3), 4: (0, 0)}[at[0]][len(first) - 1]
            prompts = asks[0].prompts
            texts = [[row.answer if i < number else ""] for i, (_, row, _) in enumerate(prompts)]
            return [Generations([key for key, _, _ in prompts], [""] * 3, texts, [[True]] * 3)]

    subject = Says(LanguageModel(*tiny("llama")), lambda _: "nothing")
    found = carry_out(Told(subject, {"forget": rows}, 0, 8), [("relearn", {"steps": 4})])[0]
    assert found.curve == [(0, 0), (1, pytest.approx(3 / 6)), (2, pytest.approx(4 / 6)), (4, 0)]
    assert found.score == pytest.approx(4 / 6)
    assert found.note.startswith("best after 2 steps; 3 and 3 rows taught in turn")
    assert sorted(first) == ["0", "1"]


def test_rounding_that_breaks_the_model_shows_nothing(knowing):
    class Fragile(Says):
        def copy(self):
            return Says(self.inner.copy(), lambda _: "nothing")

    found = attack(Fragile(knowing, oracle), "quantise", bits=2)
    assert found.status.startswith("uninformative: at 2 bits retained knowledge falls")


def test_attacks_that_cannot_run_are_skipped_not_zero(knowing):
    plain = {"forget": [replace(row, paraphrased_prompts=()) for row in FORGET]}
    assert carry_out(Case(knowing, plain), [("paraphrase", {})])[0].status.startswith("skipped")
    assert attack(knowing, "decoding", samples=2, k=4).status.startswith("skipped")
    alone = {"forget": FORGET[:1]}
    assert carry_out(Case(knowing, alone), [("relearn", {})])[0].status.startswith("skipped")


def test_unknown_attacks_and_settings_are_named(knowing):
    with pytest.raises(UnknownNameError, match=r"no attack is called 'relern'\. Did you mean relearn"):
        attack(knowing, "relern")
    with pytest.raises(ParameterError, match="attack relearn has no parameter 'stepps'"):
        attack(knowing, "relearn", stepps=3)


# --- passes ----------------------------------------------------------------------------------------------------------


def test_asks_of_all_attacks_are_merged_into_few_passes(knowing):
    subject = Says(knowing, oracle)
    carry_out(Case(subject, DATA, 0, 8), [("direct", {}), ("paraphrase", {}), ("quantise", {})])
    # direct, paraphrase and the retain questions of quantise are one pass; its copy is asked once more.
    assert subject.calls == 1


def test_equal_prompts_are_asked_once(knowing):
    seen = []
    subject = Says(knowing, lambda text: seen.append(text) or oracle(text))
    ask = Generate(tuple(((row.id, "question"), row, None) for row in FORGET), 8)
    twice = Generate(tuple(((row.id, "again"), row, None) for row in FORGET[:3]), 8)
    first, second = run(subject, [ask, twice])
    assert len(seen) == len(FORGET)
    assert second.texts == first.texts[:3]
    assert [key[1] for key in second.keys] == ["again"] * 3


def test_answers_are_kept_and_shared(knowing, tmp_path):
    ask = Generate(tuple(((row.id, "question"), row, None) for row in FORGET), 8)
    subject = Says(knowing, oracle)
    first = run(subject, [ask], Store(tmp_path / "a", tmp_path / "shared"))[0]
    run(subject, [ask], Store(tmp_path / "a"))
    again = run(subject, [ask], Store(tmp_path / "b", tmp_path / "shared"))[0]
    assert subject.calls == 1
    assert again.texts == first.texts
    assert list((tmp_path / "b").glob("generate-*.arrow"))
    changed = replace(ask, max_new_tokens=9)
    run(subject, [changed], Store(tmp_path / "a"))
    assert subject.calls == 2


def test_scores_of_merged_asks_equal_separate_ones(knowing):
    one = Score(tuple(((row.id, "answer"), row, None, None) for row in FORGET))
    two = Score(tuple(((row.id, "wrong"), row, "Orsk", None) for row in FORGET[:4]))
    merged = run(knowing, [one, two])
    for ask, found in zip((one, two), merged):
        alone = run(knowing, [ask])[0]
        assert alone.keys == found.keys
        assert abs(alone.logprob - found.logprob).max() < 1e-5


def test_a_finished_probe_is_never_run_again(knowing, tmp_path, monkeypatch):
    store = Store(tmp_path)
    first = attack(knowing, "relearn", store, steps=2)
    monkeypatch.setattr(passes, "run", None)
    assert attack(knowing, "relearn", store, steps=2) == first
