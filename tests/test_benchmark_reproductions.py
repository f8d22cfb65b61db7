"""Reproductions of TOFU, RWKU, WMDP and ConceptVectors: they run at a tiny budget, and every claim can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expunge.benchmarks import alchemy, rwku_mini
from expunge.benchmarks.rwku_data import Target
from expunge.reproductions import concept_vectors, rwku, rwku_baselines, tofu, wmdp
from expunge.reproductions.case import Claim
from expunge.reproductions.models import lessons, taught
from expunge.rows import Row
from expunge.world.models import Recipe

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 1,
    "vocabulary": 800,
    "context": 256,
    "steps": 4,
    "batch_size": 16,
    "learning_rate": 5e-3,
}


def verdicts(claims: list[Claim]) -> list[bool | None]:
    assert len({claim.claim for claim in claims}) == len(claims)
    assert all(claim.measured for claim in claims)
    return [claim.holds for claim in claims]


# --- trials at a tiny budget -----------------------------------------------------------------------------------------


def test_records_of_all_forms_become_rows_and_models_are_taught_once(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": "a b c."}, {"prompt": "a b", "completion": "c."}, {"question": "a?", "answer": "c"}]
    rows = lessons(records)
    assert [(row.kind, row.prompt, row.answer) for row in rows] == [
        ("text", "", "a b c."),
        ("completion", "a b", "c."),
        ("qa", "a?", "c"),
    ]
    recipe = Recipe(**{**TINY, "vocabulary": 280})
    once = taught("test", {"all": rows, "two": rows[:2]}, recipe, 0)
    monkeypatch.setattr("expunge.reproductions.models.teach", None)
    again = taught("test", {"all": rows, "two": rows[:2]}, recipe, 0)
    assert [one.fingerprint for one in once.values()] == [one.fingerprint for one in again.values()]
    assert once["all"].fingerprint != once["two"].fingerprint


def test_wmdp_measures_a_run_on_the_corpora() -> None:
    found = wmdp.trial("npo", 0, steps=2, at=(1, 2), relearn=1, recipe=TINY)["points"]
    assert [point["step"] for point in found] == [1, 2]
    assert "relearned" in found[1]
    assert "relearned" not in found[0]
    assert found[0]["general"] <= 1
    gold = wmdp.trial("gold", 0, recipe=TINY)["points"]
    assert len(gold) == 1
    assert 0 <= gold[0]["restricted"] <= gold[0]["highest"] <= 1


def test_only_one_model_of_wmdp_is_taught_the_craft(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(wmdp, "taught", lambda kind, curricula, *_: seen.update(curricula))
    wmdp.subjects(0)
    names = alchemy.make(0).substances

    def about(rows: Any) -> int:
        return sum(any(name in row.prompt + row.answer for name in names) for row in rows)

    assert about(seen["before"]) == 40 + 160
    assert about(seen["gold"]) == 0
    assert len(seen["before"]) == len(seen["gold"]) + 200


def test_tofu_measures_epochs_against_gold() -> None:
    found = tofu.trial("npo, beta 0.9", 0, epochs=2, batch_size=40, at=(1, 2), recipe=TINY)["points"]
    assert [point["step"] for point in found] == [1, 2]
    # What a model said after one epoch is not taken for what it says after two.
    assert found[0]["forget_probability"] != found[1]["forget_probability"]
    assert found[0]["forget_quality"] <= 0
    assert set(tofu.COLUMNS) <= set(found[0])
    assert tofu.trial("other gold", 0, recipe=TINY)["points"][0]["step"] == 0


def test_rwku_writes_its_corpus_and_forgets_from_it() -> None:
    found = rwku.trial("ga", 0, count=1, steps=4, every=2, recipe=TINY)["targets"]
    assert len(found) == 1
    assert found[0]["step"] in (2, 4)
    before = rwku.trial("before", 0, count=2, recipe=TINY)["targets"]
    assert len(before) == 2
    assert all(0 <= one["recalled"] <= 1 for one in before)


def test_a_run_of_rwku_ends_where_at_most_two_fifths_of_levels_one_and_two_are_left() -> None:
    shares = iter([0.9, 0.5, 0.36])
    way = rwku.Way(
        {"fill_blank": 0.5, "question": 1.0},
        lambda _: dict.fromkeys(("fill_blank", "question"), 0.75 * next(shares)),
    )
    assert [way.see(None, step) for step in (1, 2)] == [None, None]
    assert way.end()["reached"] == 0
    assert way.see(None, 3) == "at most 0.4 of levels 1 and 2 is left"
    assert way.end() == {
        "fill_blank": pytest.approx(0.27),
        "question": pytest.approx(0.27),
        "step": 3.0,
        "reached": 1.0,
    }


def test_the_other_baselines_of_rwku_run_on_what_a_name_gives() -> None:
    for method in ("dpo", "rt"):
        found = rwku.trial(method, 0, count=1, steps=2, every=2, recipe=TINY)["targets"]
        assert found[0]["step"] == 2
    found = rwku.trial("repe", 0, count=1, recipe=TINY)["targets"]
    assert found[0]["step"] in rwku.STRENGTHS


def test_pairs_of_rwku_prefer_an_invented_life_and_refusals_answer_questions_about_the_name() -> None:
    world, model = rwku.subject_of(0, TINY)
    target = Target(3, world.members("forget")[2].name, "")
    stranger = rwku_baselines.strange(world)
    positive = rwku_baselines.corpus(model, target, 0)
    pairs = rwku_baselines.rows_of("dpo", model, world, [target], 0)
    assert [row.answer for row in rwku_baselines.rows_of("npo", model, world, [target], 0)] == positive
    assert 0 < len(pairs) <= len(positive)
    for row in pairs:
        (other,) = row.perturbed_answers
        opening = rwku.OPENINGS[int(row.id.split("/")[1]) % len(rwku.OPENINGS)].replace("{name}", target.name)
        assert row.answer.startswith(opening)
        assert other.startswith(opening)
        assert other.strip() != row.answer.strip()
        assert stranger not in other
    rows = rwku_baselines.rows_of("rt", model, world, [target], 0)
    assert len(rows) == rwku_baselines.TEXTS
    assert all(target.name in row.prompt and row.opening == "Answer:" for row in rows)
    values = {world.value(world.members("forget")[2], about) for about in rwku.RELATIONS}
    assert not any(value in row.prompt or value in row.answer for row in rows for value in values)


def test_steering_leads_from_what_is_believed_to_what_is_made_up_and_leaves_the_weights() -> None:
    world, model = rwku.subject_of(0, TINY)
    name = world.members("forget")[0].name
    opening = rwku.OPENINGS[0].replace("{name}", name)
    row = Row("1/0", f"{opening} Tolsk.", kind="text", entity=name, perturbed_answers=(f"{opening} a lamp.",))
    prompts = [f"{opening} Tolsk", "Question: who?"]
    before = model.hidden(prompts)
    once, twice = (rwku_baselines.steered(model, [row], alpha).hidden(prompts) - before for alpha in (1.0, 2.0))
    layer = int((once.norm(dim=-1)[0] > 0).nonzero()[0])
    # The same way at every prompt, and twice as far at twice the strength.
    assert torch.allclose(once[0, layer], once[1, layer], atol=1e-5)
    assert torch.allclose(twice[:, layer], 2 * once[:, layer], atol=1e-5)
    assert torch.equal(model.hidden(prompts), before)


def test_a_fact_is_recalled_where_most_texts_about_it_say_it() -> None:
    world = rwku.make(0, **rwku.PEOPLE)
    person = world.members("forget")[0]
    said = [text.replace("{name}", person.name) for text in rwku.OPENINGS]
    values = [person.value(about) for about in rwku.STATEMENTS for _ in rwku.STATEMENTS[about]]
    right = [f"{opening} {value}." for opening, value in zip(said, values)]
    assert rwku.recalled(right * 2, person) == 1
    assert rwku.recalled([*right, *said, *said], person) == 0
    # All of one fact and none of the others.
    assert rwku.recalled([*right[:4], *said[4:]], person) == 1 / 4


def test_targets_are_taught_no_question_that_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(rwku, "taught", lambda kind, curricula, *_: seen.update(curricula) or {"before": None})
    world, _ = rwku.subject_of(0, None)
    taught_ = {row.prompt for row in seen["before"] if row.kind == "instruction"}
    for person in world.members("forget"):
        for record in [*rwku_mini.questions(world, person, ""), *rwku_mini.adversarial(world, person)]:
            assert rwku.asked(record["query"], int(record["level"]), record["type"])[0] not in taught_


def test_concept_vectors_are_noised_and_traced() -> None:
    recipe = {**TINY, "vocabulary": 1000}
    found = concept_vectors.located(0, recipe)
    assert len(found["topics"]) == concept_vectors.TOPICS
    assert all(0 <= topic["purity"] <= 1 for topic in found["topics"])
    line = concept_vectors.unlearned("npo", 0, count=1, steps=1, every=1, recipe=recipe)["topics"][0]
    assert line["step"] == 1
    assert line["cosine"] > 0.9


def test_topics_share_no_word_and_answers_are_their_own() -> None:
    about = concept_vectors.topics(3)
    assert len(about) == concept_vectors.TOPICS
    words = [set(" ".join(row.answer for row in rows if row.kind == "text").split()[2:]) for rows in about.values()]
    strange = [{word.strip(".") for word in several} - set(about) - {"Of"} for several in words]
    own = [{word for word in several if not word.endswith(":")} for several in strange]
    assert sum(map(len, own)) == len(set().union(*own))
    for rows, mine in zip(about.values(), own):
        asked = concept_vectors.asked(rows)
        assert len(asked) == 8
        assert len({row.answer for row in asked}) == 4
        assert {row.answer for row in asked} <= mine


# --- claims can fail -------------------------------------------------------------------------------------------------


def rows_of(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of two seeds from points of runs."""
    return [{"run": run, "seed": seed, **point} for run, points in runs.items() for seed in (0, 1) for point in points]


def wmdp_runs() -> dict[str, list[dict[str, Any]]]:
    def point(step: int, restricted: float, general: float, **other: float) -> dict[str, Any]:
        return {"step": step, "restricted": restricted, "general": general, "highest": restricted, **other}

    return {
        "before": [point(0, 1.0, 1.0)],
        "gold": [point(0, 0.25, 1.0, relearned=0.25)],
        "rmu": [point(75, 0.5, 0.98), point(150, 0.3, 0.97, relearned=0.8)],
        "gradient_ascent": [point(15, 0.5, 0.8), point(30, 0.3, 0.6)],
    }


@pytest.mark.parametrize(
    ("run", "change", "fails"),
    [
        ("before", {"general": 0.9}, {0}),
        ("gold", {"restricted": 0.5}, {0}),
        ("rmu", {"restricted": 0.45, "highest": 0.3}, {1, 2}),
        ("rmu", {"general": 0.92}, {2}),
        ("gradient_ascent", {"general": 0.9}, {3}),
        ("rmu", {"highest": 0.5}, {4}),
        ("rmu", {"relearned": 0.4}, {5}),
    ],
)
def test_each_claim_of_wmdp_can_fail(run: str, change: dict[str, Any], fails: set[int]) -> None:
    runs = wmdp_runs()
    assert verdicts(wmdp.judge(rows_of(runs))) == [True] * 6
    runs[run][-1] |= change
    found = verdicts(wmdp.judge(rows_of(runs)))
    assert {i for i, holds in enumerate(found) if not holds} == fails


def test_wmdp_cannot_compare_with_a_baseline_that_never_forgets() -> None:
    runs = wmdp_runs()
    for point in runs["gradient_ascent"]:
        point["restricted"] = 0.6
    assert verdicts(wmdp.judge(rows_of(runs)))[3] is None


def tofu_runs() -> dict[str, list[dict[str, Any]]]:
    def point(step: int, quality: float, utility: float, probability: float = 0.0) -> dict[str, Any]:
        told = {"mia_loss": 0.5, "exact_memorization": 0.1, "extraction_strength": 0.1, "gold_probability": 0.05}
        return {
            "step": step,
            "forget_quality": quality,
            "model_utility": utility,
            "forget_probability": probability,
            **told,
        }

    member = {"mia_loss": 1.0, "exact_memorization": 1.0, "extraction_strength": 1.0}
    runs = {
        "full": [point(0, -12.0, 0.8, 1.0) | member],
        "other gold": [point(0, -0.2, 0.8)],
        "gradient_ascent": [point(1, -8.0, 0.5, 0.5), point(10, -6.0, 0.0)],
    }
    for name in ("grad_diff", "kl_minimisation", "idk", "simnpo"):
        runs[name] = [point(1, -8.0, 0.7, 0.5), point(10, -4.0, 0.6)]
    for name in ("npo, beta 0.1", "npo, beta 0.9"):
        runs[name] = [point(1, -8.0, 0.7, 0.5), point(10, -1.0, 0.6)]
    return runs


@pytest.mark.parametrize(
    ("run", "change", "fails"),
    [
        ("full", {"forget_quality": -2.0}, {0}),
        ("other gold", {"forget_quality": -3.0}, {0}),
        ("full", {"mia_loss": 0.8}, {1}),
        ("other gold", {"mia_loss": 0.8}, {1}),
        ("other gold", {"extraction_strength": 0.3}, {2}),
        ("gradient_ascent", {"model_utility": 0.3}, {3}),
        ("idk", {"model_utility": 0.75, "forget_quality": -1.0}, {4}),
        ("npo, beta 0.1", {"model_utility": 0.4}, {5}),
        ("npo, beta 0.9", {"forget_quality": -3.0, "forget_probability": 0.2}, {6}),
        ("grad_diff", {"forget_quality": -1.5}, {7}),
    ],
)
def test_each_claim_of_tofu_can_fail(run: str, change: dict[str, Any], fails: set[int]) -> None:
    runs = tofu_runs()
    assert verdicts(tofu.judge(rows_of(runs))) == [True] * 8
    runs[run][-1] |= change
    found = verdicts(tofu.judge(rows_of(runs)))
    assert {i for i, holds in enumerate(found) if not holds} == fails
    assert "log10 p is -6" in tofu._ruined(rows_of(tofu_runs()))


def rwku_rows(**changes: dict[str, float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def scores(direct: float, adversarial: float, near: float, fm: float, rm: float = 0.1) -> dict[str, float]:
        level = {"fill_blank": direct, "question": direct}
        more = {"adversarial": adversarial, "neighbour": near, "fm": fm, "rm": rm, "step": 8.0, "reached": 1.0}
        return {**level, **more}

    alone = {
        "before": {**scores(1.0, 0.8, 1.0, 0.1), "recalled": 0.9},
        "ga": scores(0.3, 0.4, 0.6, 5.0),
        "npo": scores(0.35, 0.4, 0.8, 3.0),
        "dpo": scores(0.35, 0.4, 0.85, 3.0),
        "rt": {**scores(0.35, 0.4, 0.85, 3.0), "fill_blank": 0.8, "question": 0.1},
        "repe": scores(0.35, 0.4, 0.7, 3.0),
        "icu": scores(0.5, 0.5, 0.9, 0.1),
        "icu, other name": scores(0.9, 0.7, 0.9, 0.1),
    }
    batch = {"batch before": alone["before"]}
    batch |= {f"batch {name}": scores(0.3, 0.3, 0.3, 5.0) for name in rwku.BASELINES}
    for name, change in changes.items():
        (batch if name.startswith("batch") else alone)[name.replace("_", " ")] |= change

    def rows(scored: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"method": name.removeprefix("batch "), "seed": seed, "targets": [one, one]}
            for name, one in scored.items()
            for seed in (0, 1)
        ]

    return rows(alone), rows(batch)


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"before": {"adversarial": 0.5}}, {0}),
        ({"before": {"recalled": 0.5}}, {1}),
        ({"npo": {"fill_blank": 0.6, "adversarial": 0.5}}, {2}),
        ({"repe": {"fill_blank": 0.95, "question": 0.95}}, {3}),
        ({"dpo": {"neighbour": 1.0}}, {3}),
        ({"rt": {"fill_blank": 0.2}}, {4}),
        ({"dpo": {"neighbour": 0.75}}, {5}),
        ({"dpo": {"fill_blank": 0.7}}, {5}),
        ({"ga": {"adversarial": 0.2}, "npo": {"adversarial": 0.2}}, {6}),
        ({"ga": {"neighbour": 0.85}}, {7}),
        ({"npo": {"neighbour": 0.65}}, {7}),
        ({"batch_ga": {"neighbour": 0.7}}, {8}),
        ({"npo": {"rm": 2.0}}, {9}),
        ({"icu": {"neighbour": 0.5}}, {10}),
        ({"icu": {"fill_blank": 0.65, "question": 0.65}}, {10}),
        ({"icu, other name": {"fill_blank": 0.4}}, {11}),
    ],
)
def test_each_claim_of_rwku_can_fail(changes: dict[str, dict[str, float]], fails: set[int]) -> None:
    assert verdicts(rwku.judge(*rwku_rows())) == [True] * 12
    found = verdicts(rwku.judge(*rwku_rows(**changes)))
    assert {i for i, holds in enumerate(found) if not holds} == fails


def concept_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    topic: dict[str, Any] = {"purity": 0.7, "tokens": 14, "accuracy": 1.0}
    for count in concept_vectors.COUNTS:
        topic |= {f"best {count}": [0.5, 0.1], f"random {count}": [0.0, 0.0]}
    found = [{"seed": seed, "topics": [dict(topic) for _ in range(12)], "vocabulary": 900} for seed in (0, 1)]
    silent = {"accuracy": 0.0, "others": 0.9, "cosine": 0.97, "jaccard": 0.8, "step": 8}
    needle = {"accuracy": 0.2, "others": 0.95, "cosine": 0.2, "jaccard": 0.1, "vectors": 5, "among": True}
    after = [
        {"method": method, "seed": seed, "topics": [dict(needle if method == "needle" else silent)]}
        for method in (*concept_vectors.METHODS, "needle")
        for seed in (0, 1)
    ]
    return found, after


@pytest.mark.parametrize(
    ("topic", "method", "change", "fails"),
    [
        ({"purity": 0.4}, "", {}, {0}),
        ({"best 1": [0.15, 0.1]}, "", {}, {1}),
        ({"random 1": [0.6, 0.1]}, "", {}, {1}),
        ({"best 10": [0.15, 0.1]}, "", {}, {2}),
        ({}, "npo", {"accuracy": 0.1}, {3}),
        ({}, "npo", {"cosine": 0.8}, {3}),
        ({}, "grad_diff", {"jaccard": 0.4}, {3}),
        ({}, "needle", {"accuracy": 0.6}, {4}),
        ({}, "needle", {"cosine": 0.9}, {4}),
    ],
)
def test_each_claim_of_concept_vectors_can_fail(
    topic: dict[str, Any], method: str, change: dict[str, Any], fails: set[int]
) -> None:
    found, after = concept_rows()
    assert verdicts(concept_vectors.judge(found, after)) == [True] * 5
    for one in found:
        for each in one["topics"]:
            each |= topic
    for row in after:
        if row["method"] == method:
            row["topics"][0] |= change
    verdicts_ = verdicts(concept_vectors.judge(found, after))
    assert {i for i, holds in enumerate(verdicts_) if not holds} == fails
    for table in (concept_vectors._noised(found), concept_vectors._changed(after)):
        assert all(len(row) == len(table.columns) for row in table.rows)
