"""Every metric on cases computed by hand, its bounds and its invariances (specs: metrics 9)."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_tables import answers, generations, scores, view
from scipy.stats import ks_2samp, wasserstein_distance

from expunge import registry
from expunge.errors import TableError
from expunge.metrics.answer_probability import answer_probability
from expunge.metrics.exact_memorization import exact_memorization
from expunge.metrics.extraction_strength import extraction_strength
from expunge.metrics.forget_quality import flipped_signs, forget_quality
from expunge.metrics.gold_distance import gold_distance
from expunge.metrics.loss import loss
from expunge.metrics.memorization_score import PARTS, memorization_score
from expunge.metrics.model_utility import model_utility
from expunge.metrics.ngram_entropy import ngram_entropy
from expunge.metrics.perplexity import perplexity
from expunge.metrics.quantities import hit_suffix, log_truth_ratio, smallest_means
from expunge.metrics.rouge import rouge
from expunge.metrics.texts import entropy, overlap
from expunge.metrics.truth_ratio import truth_ratio
from expunge.metrics.two_samples import ks_distance, ks_log10_p, wasserstein
from expunge.metrics.values import median_of
from expunge.rows import Row
from expunge.tables.view import NotApplicable, View

T, F = True, False
HITS = st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=6)
PROBABILITY = st.floats(1e-4, 1.0)
FAMILY = st.lists(st.tuples(PROBABILITY, PROBABILITY, PROBABILITY), min_size=2, max_size=8)


def ones(n: int) -> np.ndarray:
    return np.ones((1, n))


# --- from scores ---------------------------------------------------------------------------------------------


def test_probability_and_loss_are_means_over_all_tokens_end_included():
    tables = answers({"a": [-1.0, -3.0], "b": [-4.0]}, closing=1)
    assert np.allclose(answer_probability(tables).each, np.exp([-2.0, -4.0]))
    assert answer_probability(tables).value == pytest.approx((np.exp(-2) + np.exp(-4)) / 2)
    assert loss(tables).value == pytest.approx(3.0)


def test_a_uniform_model_has_probability_one_over_the_vocabulary():
    assert answer_probability(answers({"a": [-np.log(50)] * 7})).value == pytest.approx(1 / 50)


def test_perplexity_is_the_median_text_and_the_corpus_weighs_tokens():
    found = perplexity(answers({"a": [-1.0], "b": [-2.0, -2.0], "c": [-3.0]}, name="retain"))
    assert found.value == pytest.approx(np.exp(2.0))
    assert found.extra["corpus"] == pytest.approx(np.exp(2.0))
    assert perplexity(answers({"a": [-1.0], "b": [-2.0] * 3}, name="retain")).extra["corpus"] == pytest.approx(
        np.exp(1.75)
    )


@given(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=9))
def test_the_median_with_equal_weights_is_the_plain_median(numbers: list[float]):
    assert median_of(np.array(numbers))(ones(len(numbers)))[0] == pytest.approx(np.median(numbers))


def test_exact_memorisation_leaves_end_tokens_out():
    tables = answers({"a": [-1.0] * 4}, hits=[[T, F, F, T]], closing=1)
    assert exact_memorization(tables).value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("hits", "strength"),
    [([T, T, T, T], 1.0), ([F, F, F, T], 0.25), ([T, T, T, F], 0.0), ([T, F, T, T], 0.5), ([F], 0.0), ([T], 1.0)],
)
def test_extraction_strength_is_the_share_of_the_right_ending(hits: list[bool], strength: float):
    assert extraction_strength(answers({"a": [-1.0] * len(hits)}, hits=[hits])).value == strength


@pytest.mark.parametrize(("hits", "theirs"), [([F, F, T], 0.5), ([F, T], 1.0), ([T, F], 1.0), ([T, F, F, F], 1 / 3)])
def test_extraction_strength_as_openunlearning_computes_it_has_a_floor(hits: list[bool], theirs: float):
    tables = answers({"a": [-1.0] * len(hits)}, hits=[hits])
    assert extraction_strength(tables, compat="openunlearning").value == pytest.approx(theirs)


@given(HITS)
def test_strength_is_at_most_memorisation_and_equals_the_plain_definition(hits: list[list[bool]]):
    tables = answers({str(i): [-1.0] * len(row) for i, row in enumerate(hits)}, hits=hits)
    strength, exact = extraction_strength(tables).each, exact_memorization(tables).each
    assert (strength <= exact + 1e-12).all()
    plain = [1 - next(k for k in range(len(row) + 1) if all(row[k:])) / len(row) for row in hits]
    assert np.allclose(strength, plain)
    assert np.allclose(exact, [np.mean(row) for row in hits])


@given(
    st.lists(
        st.lists(st.floats(-9, 0, width=32, allow_subnormal=False), min_size=1, max_size=9), min_size=1, max_size=5
    ),
    st.floats(0.01, 1),
)
def test_smallest_means_equal_sorting_row_by_row(rows: list[list[float]], share: float):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    plain = [np.mean(sorted(row)[: max(1, int(np.floor(share * len(row))))]) for row in rows]
    assert np.allclose(smallest_means(np.concatenate(rows), offsets, share), plain)


def test_the_suffix_of_one_row_does_not_run_into_the_next():
    assert hit_suffix(np.array([T, F, T, T, T]), np.array([0, 2, 5])).tolist() == [0, 3]


# --- truth ratio, model utility ------------------------------------------------------------------------------


def test_truth_ratio_by_hand():
    tables = view({"forget": [[0.5, 0.1, 0.4]]})
    geometric, arithmetic = np.sqrt(0.04) / 0.5, 0.25 / 0.5
    assert truth_ratio(tables).value == pytest.approx(geometric)
    assert truth_ratio(tables, form="arithmetic").value == pytest.approx(arithmetic)
    assert truth_ratio(tables, aggregate="true_better").value == pytest.approx(1 - geometric)
    assert truth_ratio(tables, aggregate="prob_mean").value == pytest.approx(0.5 / (0.5 + 0.2))
    likes_wrong = view({"forget": [[0.1, 0.4]], "retain": [[0.1, 0.4]]})
    assert truth_ratio(likes_wrong).value == pytest.approx(0.25)
    assert truth_ratio(likes_wrong, rows="retain").value == 0.0


def test_equal_answers_have_truth_ratio_one():
    tables = view({"forget": [[0.3, 0.3, 0.3]], "retain": [[0.3, 0.3, 0.3]]})
    assert truth_ratio(tables).value == pytest.approx(1)
    assert truth_ratio(tables, aggregate="prob_mean").value == pytest.approx(0.5)
    assert truth_ratio(tables, rows="retain").value == pytest.approx(0)


@given(PROBABILITY, PROBABILITY)
def test_swapping_right_and_wrong_inverts_the_ratio(right: float, wrong: float):
    tables = view({"forget": [[right, wrong], [wrong, right]]})
    log_ratio = log_truth_ratio(tables, "forget", tables.of("forget"))
    assert log_ratio[0] == pytest.approx(-log_ratio[1], abs=1e-6)


def test_rows_may_bring_different_numbers_of_wrong_answers():
    tables = view({"forget": [[0.5, 0.1], [0.5, 0.1, 0.4]]})
    assert np.allclose(truth_ratio(tables).each, [0.2, 0.4])


def test_a_row_without_a_paraphrase_is_judged_by_its_answer():
    tables = view({"forget": [[0.5, 0.1]]})
    row = replace(tables.rows["forget"][0], paraphrased_answer="")
    table = scores([(row.id, "answer", [np.log(0.2)]), (row.id, "perturbed/0", [np.log(0.1)])])
    found = truth_ratio(View({"forget": [row]}, {"forget": table}))
    assert found.value == pytest.approx(0.5)
    assert found.extra["own_answer"] == 1


def test_rows_without_wrong_answers_are_left_out_and_said_so():
    tables = view({"forget": [[0.5, 0.1], [0.5, 0.2]]})
    rows = [tables.rows["forget"][0], replace(tables.rows["forget"][1], perturbed_answers=())]
    found = truth_ratio(View({"forget": rows}, tables.scores))
    assert len(found.units) == 1
    assert found.extra["left_out"] == "1 of 2 forget rows: no perturbed answers"
    with pytest.raises(NotApplicable, match="no forget row has perturbed_answers"):
        truth_ratio(View({"forget": rows[1:]}, tables.scores))


def test_probability_among_options_is_a_share():
    tables = view({"forget": [[0.2, 0.1, 0.1], [0.5, 0.5]]})
    found = answer_probability(tables, among_options=True)
    assert np.allclose(found.each, [0.5, 0.5])
    assert (found.each <= 1).all()


def utility_view(texts: str = "right", **probabilities: list[list[float]]) -> View:
    tables = view({"retain": [[0.8, 0.2]], "neighbour": [[0.8, 0.2]], "general": [[0.6, 0.2]], **probabilities})
    written = {
        name: generations(rows, [row.answer if texts == "right" else "" for row in rows])
        for name, rows in tables.rows.items()
    }
    return View(tables.rows, tables.scores, written)


def test_model_utility_is_the_harmonic_mean_of_nine():
    found = model_utility(utility_view())
    parts = found.extra["parts"]
    assert len(parts) == 9
    assert parts["retain probability"] == pytest.approx(0.8)
    assert parts["general probability"] == pytest.approx(0.75)
    assert parts["general truth_ratio"] == pytest.approx(2 / 3)
    assert parts["neighbour rouge"] == 1.0
    assert parts["retain truth_ratio"] == pytest.approx(0.75)
    assert found.value == pytest.approx(9 / sum(1 / part for part in parts.values()))
    assert found.value <= max(parts.values())
    plain = utility_view(retain=[[0.5, 0.2], [0.7, 0.2]])
    assert model_utility(plain).extra["parts"]["retain probability"] == pytest.approx(0.6)


def test_one_part_at_zero_makes_utility_zero_and_raises_a_flag():
    found = model_utility(utility_view(general=[[0.1, 0.2]]))
    assert found.value == 0
    assert found.flag == "general truth_ratio exactly 0, which hides the other parts"
    assert model_utility(utility_view("nothing")).value == 0


def test_equal_parts_give_their_common_value():
    from expunge.metrics.model_utility import harmonic_mean

    assert harmonic_mean(np.full((2, 9), 0.3)) == pytest.approx([0.3, 0.3])


def test_model_utility_names_the_set_it_lacks():
    tables = utility_view()
    with pytest.raises(NotApplicable, match="there are no general rows"):
        model_utility(replace(tables, rows={name: rows for name, rows in tables.rows.items() if name != "general"}))


# --- against gold --------------------------------------------------------------------------------------------


def test_a_model_against_itself_has_forget_quality_one():
    tables = view({"forget": [[0.5, 0.1], [0.3, 0.3], [0.2, 0.1]]})
    found = forget_quality(replace(tables, golds=[tables]))
    assert found.value == 0
    assert found.extra["p"] == 1
    assert found.extra["paired_p"] == 1
    assert "is it the same model" in found.flag


@pytest.mark.filterwarnings("ignore:ks_2samp")
@given(FAMILY, FAMILY)
@settings(max_examples=40)
def test_forget_quality_equals_scipy_and_forgets_the_order_of_rows(first, second):
    n = min(len(first), len(second))
    mine, gold = view({"forget": first[:n]}), view({"forget": second[:n]})
    found = forget_quality(replace(mine, golds=[gold]), permutations=10)
    ratios = [log_truth_ratio(tables, "forget", tables.of("forget")) for tables in (mine, gold)]
    test = ks_2samp(*ratios, method="exact")
    assert found.extra["D"] == pytest.approx(test.statistic)
    # One step apart is as near as different rows come: p = 1 (scipy's exact sum lands above 1 there and gives way).
    exact = 0.0 if round(test.statistic * n) <= 1 else np.log10(test.pvalue)
    assert found.value == pytest.approx(exact, abs=1e-9)
    # 1/R instead of R changes nothing.
    assert ks_distance(-ratios[0], -ratios[1])(ones(n))[0] == pytest.approx(test.statistic)
    turned = View({"forget": mine.rows["forget"][::-1]}, mine.scores, golds=[gold])
    assert forget_quality(turned, permutations=10).value == pytest.approx(found.value)


@pytest.mark.parametrize("n", [1, 2, 7, 40, 300])
def test_ks_p_values_equal_the_exact_test_and_do_not_underflow(n: int):
    generator = np.random.default_rng(n)
    for shift in (0.0, 0.3, 1.0):
        first, second = generator.normal(size=n), generator.normal(size=n) + shift
        test = ks_2samp(first, second, method="exact")
        assert ks_log10_p(test.statistic, n) == pytest.approx(np.log10(test.pvalue), abs=1e-8)
    assert ks_log10_p(0.0, n) == 0
    # Complete separation has probability 2 / C(2n, n).
    assert ks_log10_p(1.0, 2) == pytest.approx(np.log10(2 / 6))
    assert -np.inf < ks_log10_p(1.0, 2000) < -1000


def test_distances_under_weights_equal_those_of_repeated_rows():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 6, 20) / 2, generator.integers(0, 6, 20) / 2
    counts = generator.integers(0, 4, 20)
    repeated = np.repeat(first, counts), np.repeat(second, counts)
    assert ks_distance(first, second)(counts[None])[0] == pytest.approx(ks_2samp(*repeated).statistic)
    assert wasserstein(first, second)(counts[None])[0] == pytest.approx(wasserstein_distance(*repeated))


def test_the_paired_test_counts_random_signs():
    # Three equal differences: all signs alike in 2 of 8 cases.
    assert flipped_signs(np.ones(3), ("a", "b", "c"), 20_000, 0) == pytest.approx(0.25, abs=0.02)
    # One group: its sign alone can flip.
    assert flipped_signs(np.ones(3), ("a", "a", "a"), 100, 0) == 1
    assert flipped_signs(np.full(30, 0.1), tuple(map(str, range(30))), 1000, 0) == pytest.approx(1 / 1001)


def test_a_ruined_model_that_passes_is_flagged():
    gold = view({"forget": [[0.2, 0.2 + i / 1000] for i in range(40)]})
    ruined = view({"forget": [[0.001, 0.001 + i / 200_000 + 1e-6] for i in range(40)]})
    found = forget_quality(replace(ruined, golds=[gold]))
    assert found.value > np.log10(0.05)
    assert "a ruined model finds all answers alike" in found.flag


def test_several_golds_are_averaged():
    mine = view({"forget": [[0.5, 0.1], [0.3, 0.3]]})
    golds = [view({"forget": [[0.4, 0.1], [0.3, 0.2]]}), view({"forget": [[0.1, 0.3], [0.1, 0.4]]})]
    single = [forget_quality(replace(mine, golds=[gold])).value for gold in golds]
    found = forget_quality(replace(mine, golds=golds))
    assert found.value == pytest.approx(np.mean(single))
    assert [gold["log10_p"] for gold in found.extra["per_gold"]] == pytest.approx(single)


def test_gold_distance_by_hand():
    mine, gold = answers({"a": [-1.0], "b": [-2.0]}), answers({"a": [-2.0], "b": [-4.0]})
    found = gold_distance(replace(mine, golds=[gold]))
    assert found.value == pytest.approx(1.5)
    assert found.each.tolist() == [-1.0, -2.0]
    assert found.extra["mean_difference"] == pytest.approx(-1.5)
    assert found.extra["D"] == pytest.approx(0.5)
    hits = [replace(tables, scores={"forget": replace(tables.scores["forget"], hit=np.array(hit))}) for tables, hit in
            ((mine, [T, T]), (gold, [T, F]))]  # fmt: skip
    for quantity in ("exact_memorization", "extraction_strength"):
        assert gold_distance(replace(hits[0], golds=[hits[1]]), quantity=quantity).value == pytest.approx(0.5)
    ratios = view({"forget": [[0.5, 0.5]]}), view({"forget": [[0.5, 0.25]]})
    found = gold_distance(replace(ratios[0], golds=[ratios[1]]), quantity="log_truth_ratio")
    assert found.value == pytest.approx(np.log(2))


def test_gold_distance_to_itself_is_zero_and_flagged():
    tables = answers({"a": [-1.0], "b": [-2.0]})
    found = gold_distance(replace(tables, golds=[tables]))
    assert found.value == 0
    assert "the same model" in found.flag


def test_metrics_that_compare_with_gold_say_when_there_is_none():
    for function in (forget_quality, gold_distance):
        with pytest.raises(NotApplicable, match="trained without the forget rows"):
            function(view({"forget": [[0.5, 0.1]]}))


def test_a_gold_table_with_other_rows_is_named():
    tables = view({"forget": [[0.5, 0.1], [0.5, 0.2], [0.5, 0.3]]})
    short = replace(view({"forget": [[0.5, 0.1], [0.5, 0.2]]}), name="gold")
    with pytest.raises(
        TableError, match=r"gold scores table .* has 2 rows .*forget-0, forget-1.* missing \(forget-2\)"
    ):
        forget_quality(replace(tables, golds=[short]))


# --- from generations ----------------------------------------------------------------------------------------


def written(answer: str, text: str) -> View:
    rows = [Row(id="a", answer=answer, prompt="q")]
    return View({"forget": rows}, {}, {"forget": generations(rows, [text])})


def test_rouge_recall_by_hand():
    tables = written("the red boats sail home", "A boat sails, they say, home.")
    assert rouge(tables, kind="rouge1").value == pytest.approx(3 / 5)
    assert rouge(tables).value == pytest.approx(3 / 5)
    assert rouge(written("one two three", "three two one")).value == pytest.approx(1 / 3)
    assert rouge(written("one two three", "three two one"), kind="rouge1").value == 1
    assert rouge(written("Tivin", "I think it is Tivin, maybe."), score="fmeasure").value == pytest.approx(2 / 7)
    assert rouge(written("Tivin", "I think it is Tivin, maybe.")).value == 1


@given(st.text("abc ing", max_size=30), st.text("abc ing", max_size=30))
def test_our_cached_stemmer_gives_the_packages_rouge(target: str, text: str):
    from rouge_score.rouge_scorer import RougeScorer

    package = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(target, text)
    assert overlap(target, text, "rouge1") == package["rouge1"].recall
    assert overlap(target, text, "rougeL", "fmeasure") == package["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("target", "text", "one", "longest", "f"),
    [
        ("Tivin", "I think it is Tivin, maybe.", 0, 0, 0),
        ("The Salt Choir", "The Salt Choir, of course", 2 / 3, 2 / 3, 0.5),
        ("a b a", "a b c", 1, 1, 0.8),  # a word counts once
        ("one two. three", "three one. two", 1, 1, 1),  # sentences are matched each with each
        ("a b c d", "b a d c", 1, 0.5, 0.5),
        ("Tivin", "...", 0, 0, 0),  # the package raises
    ],
)
def test_the_dialect_of_package_rouge(target: str, text: str, one: float, longest: float, f: float):
    """Figures of package rouge 1.0.1, on which our own code agreed for 19 127 random pairs of texts."""
    assert overlap(target, text, "rouge1", dialect="rouge") == pytest.approx(one)
    assert overlap(target, text, dialect="rouge") == pytest.approx(longest)
    assert overlap(target, text, "rougeL", "fmeasure", "rouge") == pytest.approx(f, abs=1e-7)


def test_dialects_of_rouge_disagree_on_one_output():
    tables = written("boats", "The boat sails.")
    assert rouge(tables).value == 1
    assert rouge(tables, dialect="rouge_score_unstemmed").value == 0
    assert rouge(written("Boats", "boats"), dialect="rouge_score_unstemmed").value == 1
    assert rouge(written("Boats", "boats"), dialect="rouge").value == 0
    assert rouge(written("東京", "東京"), dialect="rouge").value == 1


def test_empty_outputs_look_like_forgetting_and_are_flagged():
    assert rouge(written("one", " ")).flag == "1 of 1 outputs are empty"
    assert "1 of 1 outputs are empty" in ngram_entropy(written("one", "")).flag
    assert rouge(written("one", "two")).flag == ""


def test_answers_that_rouge_cannot_read_are_flagged():
    assert "1 answers have no Latin letter or digit" in rouge(written("東京", "東京")).flag


def test_entropy_by_hand():
    assert entropy(["a", "b", "a", "b"], 2) == pytest.approx(-(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3)))
    assert entropy(["a", "b", "c", "d", "e"], 2) == pytest.approx(2.0)
    assert entropy(["a"], 2) == 0
    # Two 2-grams and one 3-gram: (2/3 * 1 + 4/3 * 0) / 2
    assert ngram_entropy(written("x", "a b c")).value == pytest.approx(1 / 3)
    assert ngram_entropy(written("x", "la la la la la")).value == 0
    assert ngram_entropy(written("x", "")).value == 0


# --- all of them ---------------------------------------------------------------------------------------------


def test_every_metric_says_what_it_means():
    parts = registry.parts("metrics")
    assert {part.name for part in parts} >= {
        "answer_probability", "truth_ratio", "forget_quality", "model_utility", "exact_memorization",
        "extraction_strength", "rouge", "mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "loss",
        "perplexity", "gold_distance", "ngram_entropy", "extraction_likelihood", "mia_reference", "mia_gradnorm",
        "privleak", "privacy_score", "memorization_score", "unlearning_depth", "leak_at_k",
        "gold_divergence", "memorization_accuracy", "verbatim_memorization", "knowledge_memorization",
    }  # fmt: skip
    for part in parts:
        card = part.card
        assert card.sentence.endswith(".")
        assert card.ideal
        assert card.needs
        assert card.version >= 1
        assert card.direction in ("lower", "higher", "closest_to_gold")
        assert part.function.__module__ == f"expunge.metrics.{part.function.__name__}"
        assert len(part.resolve()) == len(part.describe()) > 0


def test_scores_that_no_model_gives_are_refused():
    for value, sentence in ((0.5, "above 0"), (np.nan, "no usable numbers"), (-np.inf, "no usable numbers")):
        with pytest.raises(TableError, match=rf"row 'b' \(answer\) has the log-probability .*{sentence}"):
            loss(answers({"a": [-1.0], "b": [-1.0, value]}))
    with pytest.raises(TableError, match=r"row 'b' .* has no scored token"):
        loss(answers({"a": [-1.0], "b": []}))
    with pytest.raises(TableError, match=r"row 'a' .* every scored token is an end token"):
        exact_memorization(answers({"a": [-1.0]}, closing=1))


def test_missing_tables_are_named():
    tables = answers({"a": [-1.0]})
    with pytest.raises(NotApplicable, match=r"there are no retain rows \(sets with rows: forget\)"):
        loss(tables, rows="retain")
    with pytest.raises(NotApplicable, match="model has no scores of forget rows"):
        loss(View(tables.rows))
    with pytest.raises(NotApplicable, match="model generated nothing for the forget rows"):
        rouge(tables)
    more = replace(tables, rows={"forget": [*tables.rows["forget"], Row(id="b", answer="x")]})
    with pytest.raises(TableError, match=r"has 1 rows for 'answer' \(a\), 1 of 2 are missing \(b\)"):
        loss(more)


def test_permuting_rows_permutes_what_is_measured():
    tables = answers({"a": [-1.0, -2.0], "b": [-4.0], "c": [-0.5]}, hits=[[T, F], [T], [F]])
    turned = replace(tables, rows={"forget": tables.rows["forget"][::-1]})
    for function in (answer_probability, loss, exact_memorization, extraction_strength):
        assert np.allclose(function(tables).each, function(turned).each[::-1])
        assert function(tables).value == pytest.approx(function(turned).value)


def test_zlib_reads_the_text_not_the_tokens():
    from expunge.metrics.mia_zlib import mia_zlib

    rows = {"forget": [Row(id="a", answer="aaaa" * 20)], "holdout": [Row(id="b", answer="other")]}
    table = {
        "forget": scores([("a", "answer", [-2.0])], texts=["aaaa" * 20]),
        "holdout": scores([("b", "answer", [-3.0])], texts=["other"]),
    }
    lengths = [len(zlib.compress(text.encode())) for text in ("aaaa" * 20, "other")]
    assert np.allclose(mia_zlib(View(rows, table)).each, [2 / lengths[0], 3 / lengths[1]])


def test_memorization_score_by_hand():
    # Probabilities 0.2 and 0.4 of the paraphrase, 0.2 and 0.1 of the wrong answers: S = 1/2 and 4/5.
    found = view({"forget": [[0.2, 0.2, 0.2], [0.4, 0.1, 0.1]]})
    first_answer = np.arange(8) == 0
    half = replace(found, scores={"forget": replace(found.scores["forget"], hit=first_answer)})
    made = memorization_score(half)
    parts = dict(zip(PARTS, (0.5, 0.5, 0.7, 0.35)))
    assert made.extra["parts"] == pytest.approx(parts)
    assert made.value == pytest.approx(4 / sum(1 / part for part in parts.values()))
    known = replace(found, scores={"forget": replace(found.scores["forget"], hit=np.full(8, True))})
    assert memorization_score(known).value == 0
