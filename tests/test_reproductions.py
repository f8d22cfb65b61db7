"""Reproductions: what they measure, that they run at a tiny budget, and that their claims can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import RECIPE, SIZES

from expunge.attacks.matching import recovered
from expunge.reproductions.measures import held_out, knowledge, measure, refused, said
from expunge.reproductions.mini import Mini, mini
from expunge.rows import Row

TINY = {**SIZES, "gold_seeds": 1, "recipe": RECIPE}


@pytest.fixture(scope="module")
def world(tiny_world: Any) -> Mini:
    # `tiny_world` has trained the models; here they come out of the cache.
    return mini(0, TINY)


# --- measures --------------------------------------------------------------------------------------------------------


def test_a_value_is_known_where_greedy_decoding_says_it(world: Mini) -> None:
    rows = world.data["forget"] + world.data["holdout"]
    texts = said(world.original, rows)
    assert [bool(k) for k in knowledge(world.original, rows).known] == [
        text.strip().startswith(row.value) for row, text in zip(rows, texts)
    ]
    assert 0.5 < np.mean([recovered(row, text) for row, text in zip(rows, texts)]) < 1


def test_measures_tell_the_original_from_gold(world: Mini) -> None:
    before, gold = (measure(model, world.data) for model in (world.original, world.golds[0]))
    assert before["forget_accuracy"] > 0.9
    assert before["held_out_accuracy"] > 0.6
    assert gold["forget_accuracy"] < 0.2
    assert gold["held_out_accuracy"] < 0.2
    assert gold["retain_accuracy"] > 0.9
    assert gold["forget_nll"] > 10 * before["forget_nll"]
    assert gold["forget_value"] < before["forget_value"] < 0


def test_value_and_answer_are_what_scoring_them_alone_gives(world: Mini) -> None:
    row = Row(id="a", prompt="Who was it?", answer="It was Ilva of Tivin.", value="Ilva")
    found = knowledge(world.original, [row])
    table = world.original.score([(("a", "answer"), world.original.encode(row))])
    assert found.nll[0] == pytest.approx(-table.logprob.mean())
    assert found.tokens[0] == len(table.token)
    text, spans = world.original.spans(row)
    at, first = text.index("Ilva"), world.original.encode(row).start
    inside = [i - first for i, (start, stop) in enumerate(spans) if stop > at - 1 and start < at + 4]
    assert 0 < len(inside) < len(table.token)
    assert found.value[0] == pytest.approx(table.logprob[inside].sum())
    # Without a value that stands in it, the whole answer is the value; what closes it is not.
    whole = knowledge(world.original, [replace(row, value="")])
    assert whole.value[0] == pytest.approx(table.logprob[~table.end.astype(bool)].sum())


def test_held_out_wordings_are_rows_of_their_own(world: Mini) -> None:
    row = Row(id="a", prompt="p", answer="x", paraphrased_prompts=("q", "r"))
    assert [(r.id, r.prompt, r.answer) for r in held_out([row])] == [("a/0", "q", "x"), ("a/1", "r", "x")]
    assert "held_out_nll" not in measure(world.original, {"forget": [replace(row, paraphrased_prompts=())]})


def test_refusals_are_counted() -> None:
    assert refused(["I don't know.", "Tivin", "I have no information on that.", ""]) == 0.5
