"""Extraction likelihood and memorisation accuracy: the cheap way gives what the definition gives."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.bench import bench
from expunge.benchmarks import tdec
from expunge.errors import ParameterError, RowError
from expunge.metrics.exact_memorization import exact_memorization
from expunge.rows import Row
from expunge.subjects import contexts, greedy
from expunge.subjects.language import LanguageModel
from expunge.tables.passes import Score, run
from expunge.tables.view import View

WORDS = "lamp keeper tide Ostra counted eleven harbour rope north Carth Tivin glass salt evening wrote letters".split()


def text_rows(count: int, words: int = 9, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=words + i % 3)) for i in range(count)]
    return [Row(id=str(100 + 10 * seed + i), answer=text, kind="text") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def trained() -> LanguageModel:
    """A model that knows its texts in part, so that continuations go right, go wrong and come back."""
    subject = LanguageModel(*tiny("llama"))
    batch = [torch.tensor([subject.encode(row).ids]) for row in text_rows(6)]
    optimiser = torch.optim.AdamW(subject.model.parameters(), lr=8e-3)
    for _ in range(25):
        for ids in batch:
            subject.model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    subject.model.requires_grad_(False)
    return subject


@torch.no_grad()
def separately(subject: LanguageModel, ids: tuple[int, ...], t: int) -> list[int]:
    """f(x_<t) token by token, nothing reused."""
    whole = list(ids[:t])
    while len(whole) < len(ids):
        whole.append(int(subject.model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
    return whole[t:]


def overlap(written: list[int], text: tuple[int, ...], n: int) -> float:
    def grams(ids):
        return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]

    return sum(gram in grams(text) for gram in grams(written)) / len(grams(written))


@pytest.fixture(scope="module")
def written(trained) -> list[tuple[Row, tuple[int, ...], dict[int, list[int]]]]:
    """Texts, their tokens and T - 1 separate generations of each."""
    found = []
    for row in text_rows(4) + text_rows(2, seed=1):
        ids = trained.encode(row).ids
        found.append((row, ids, {t: separately(trained, ids, t) for t in range(1, len(ids))}))
    return found


@pytest.mark.parametrize("n", [1, 3, 10])
def test_reuse_equals_separate_generations_on_a_trained_model(trained, written, n):
    found = tdec.extraction_likelihood(trained, [row for row, _, _ in written], n=n)
    for i, (_, ids, each) in enumerate(written):
        # One step of each generation is the token-by-token accuracy.
        assert found.accuracy[i] == pytest.approx(np.mean([each[t][0] == ids[t] for t in each]), abs=1e-12)
        likelihood = np.mean([overlap(each[t], ids[t:], n) for t in range(1, len(ids) - n + 1)])
        assert found.likelihood[i] == pytest.approx(likelihood, abs=1e-12)
    assert 0.3 < found.means[0] < 1
    assert found.written < sum(len(tokens) for _, _, each in written for tokens in each.values())


def test_a_cut_text_is_the_text_of_its_first_tokens(trained, written):
    row, ids, _ = written[0]
    found = tdec.extraction_likelihood(trained, [row], n=3, length=20)
    path = greedy.paths(trained, [ids[:20]])[0]
    assert found.likelihood == (pytest.approx(path.overlaps(3).mean()),)
    assert found.accuracy == (path.hit[1:].mean(),)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_continuation_equals_a_separate_one(architecture, cut, monkeypatch):
    subject = LanguageModel(*tiny(architecture))
    if cut:
        assert contexts.can_cut(subject, 24)
    else:
        monkeypatch.setattr(greedy, "can_cut", lambda *_: False)
    generator = torch.Generator().manual_seed(3)
    texts = [tuple(torch.randint(3, 300, (count,), generator=generator).tolist()) for count in (9, 24, 13, 24)]
    # The first half of one text is the model's own, so that it has hits.
    texts.append((*texts[0][:3], *separately(subject, (*texts[0][:3], *[0] * 8), 3), *texts[1][:6]))
    for ids, path in zip(texts, greedy.paths(subject, texts, shortest=2)):
        for t in range(1, len(ids) - 1):
            assert path.after(t).tolist() == separately(subject, ids, t)


def test_of_an_answer_the_beginnings_start_with_its_question_and_its_end_token_does_not_count():
    subject = LanguageModel(*tiny("llama"))
    rows = [Row(id=str(i), prompt="where was Ilva born?", answer="in the north of Carth"[: 9 + 4 * i]) for i in (1, 3)]
    encoded = [subject.encode(row) for row in rows]
    table = subject.continuations([((row.id, "answer"), one) for row, one in zip(rows, encoded)], 2)
    for one, path in zip(encoded, table.paths):
        ids = one.ids[: len(one.ids) - one.closing]
        assert (path.start, path.ids.tolist()) == (one.start, list(ids))
        expected = [overlap(separately(subject, ids, t), ids[t:], 2) for t in range(one.start, len(ids) - 1)]
        assert path.overlaps(2) == pytest.approx(expected)
        assert all(t >= one.start for t in path.written)


def test_small_batches_change_nothing(trained, monkeypatch):
    rows = text_rows(6)
    whole = tdec.extraction_likelihood(trained, rows, n=3)
    monkeypatch.setattr(greedy, "TOKEN_BUDGET", 64)
    assert tdec.extraction_likelihood(trained, rows, n=3) == whole
    assert tdec.extraction_likelihood(trained, rows[::-1], n=3).likelihood == whole.likelihood[::-1]


def test_an_end_token_ends_nothing(trained):
    head = trained.model.lm_head
    subject = trained.copy()
    subject.model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    torch.nn.init.zeros_(subject.model.lm_head.weight)
    subject.model.lm_head.bias.data = torch.eye(head.out_features)[trained.tokenizer.eos_token_id]
    row = text_rows(1)[0]
    ids = subject.encode(row).ids
    (path,) = greedy.paths(subject, [ids])
    assert [len(path.after(t)) for t in range(1, len(ids))] == [len(ids) - t for t in range(1, len(ids))]
    assert set(path.after(1).tolist()) == {1}
    assert tdec.extraction_likelihood(subject, [row], n=1).likelihood == (0.0,)


def test_accuracy_is_exact_memorization_on_text_rows(trained):
    rows = text_rows(4) + text_rows(3, seed=1)
    (table,) = run(trained, [Score(tuple(((row.id, "answer"), row, None, None) for row in rows))])
    values = exact_memorization(View({"forget": rows}, {"forget": table}))
    assert tdec.extraction_likelihood(trained, rows, n=2).accuracy == pytest.approx(values.each.tolist(), abs=1e-12)


def test_a_text_the_model_wrote_itself_is_extracted_whole(trained):
    ids = trained.encode(text_rows(1, seed=5)[0]).ids
    (path,) = greedy.paths(trained, [(ids[0], *separately(trained, (ids[0], *[0] * 30), 1))])
    assert path.hit[1:].all()
    assert not path.written
    for n in (1, 5, 30):
        assert (path.overlaps(n) == 1).all()


def test_overlap_of_one_prefix_does_not_grow_with_n(trained):
    texts = [trained.encode(row).ids for row in text_rows(4) + text_rows(2, seed=1)]
    for path in greedy.paths(trained, texts):
        each = [path.overlaps(n) for n in range(1, 12)]
        for shorter, longer in pairwise(each):
            assert (longer <= shorter[: len(longer)] + 1e-12).all()


def test_the_verdict_takes_its_thresholds_from_the_model_unlearning_started_from(trained):
    forget, unseen = text_rows(6), text_rows(6, seed=7)
    before = tdec.judge(trained, forget, unseen, n=3)
    assert not before.forgotten
    assert before.start == trained.name
    assert before.forget.means[0] > before.holdout.means[0]
    after = LanguageModel(tiny("llama")[0], trained.tokenizer, "emptied")
    after.base = trained
    verdict = tdec.judge(after, forget, unseen, n=3)
    assert verdict.forgotten
    assert verdict.holdout == before.holdout
    assert verdict.start == trained.name
    highest = before.holdout.means
    each = zip(verdict.forget.accuracy, verdict.forget.likelihood)
    assert list(verdict.each) == [ma <= highest[0] and el <= highest[1] for ma, el in each]


def test_short_texts_and_other_kinds_are_named(trained):
    row = Row(id="4711", answer="lamp", kind="text", source="sample.csv: row 3")
    count = len(trained.encode(row).ids)
    with pytest.raises(RowError, match=rf"row 4711 \(sample.csv: row 3\) has {count} tokens; .* at least 11"):
        tdec.extraction_likelihood(trained, [row])
    assert tdec.extraction_likelihood(trained, [row], n=count - 1).lengths == (count,)
    with pytest.raises(RowError, match=f"has {count} tokens"):
        tdec.extraction_likelihood(trained, [row], n=count)
    with pytest.raises(RowError, match="row 100 has 8 tokens"):
        tdec.extraction_likelihood(trained, text_rows(1), length=8)
    with pytest.raises(RowError, match=r"row 4711 .* is of kind qa"):
        tdec.extraction_likelihood(trained, [replace(row, kind="qa", prompt="who?")])
    with pytest.raises(RowError, match="0 rows"):
        tdec.extraction_likelihood(trained, [])
    with pytest.raises(ParameterError, match="n = 0"):
        tdec.extraction_likelihood(trained, [row], n=0)


def sample(path: Path, *lines: str, header: str = "doc_id,corpus,text") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", newline="")
    return path


def test_published_files_are_read_with_all_their_line_ends(tmp_path):
    rows = tdec.read(sample(tmp_path / "a.csv", '4711,books3,"one\r\ntwo, ""three"""', "12,github, four "))
    assert [(row.id, row.relation, row.answer, row.kind) for row in rows] == [
        ("4711", "books3", 'one\r\ntwo, "three"', "text"),
        ("12", "github", " four ", "text"),
    ]


@pytest.mark.parametrize(
    ("lines", "header", "sentence"),
    [
        (["1,a,b"], "id,corpus,text", "column 'doc_id' is missing. Did you mean id?"),
        (["1,b"], "doc_id,text", "column 'corpus' is missing"),
        (["x7,books3,b"], "doc_id,corpus,text", "row 1: doc_id is 'x7', expected a number"),
        (["7,,b"], "doc_id,corpus,text", "row 1: field 'corpus' is empty"),
        (["7,books3,"], "doc_id,corpus,text", "row 1: field 'text' is empty"),
        (["7,books3,b", "7,books3,c"], "doc_id,corpus,text", "id '7' was used in"),
        (["7,books3,b,c"], "doc_id,corpus,text", "more cells than the header names"),
        ([], "doc_id,corpus,text", "0 rows"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, lines, header, sentence):
    with pytest.raises(RowError, match=sentence.replace("?", r"\?")):
        tdec.read(sample(tmp_path / "a.csv", *lines, header=header))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(RowError, match="does not exist"):
        tdec.read(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("doc_id,corpus,text\n1,a,caf\xe9\n".encode("latin-1"))
    with pytest.raises(RowError, match="not UTF-8"):
        tdec.read(tmp_path / "latin.csv")


def test_the_benchmark_runs_from_files(trained, tmp_path):
    for name, seed in (("forget", 0), ("holdout", 7)):
        sample(tmp_path / f"{name}.csv", *(f"{row.id},books3,{row.answer}" for row in text_rows(3, seed=seed)))
    card = bench("tdec", trained, data=str(tmp_path), settings={"n": 3, "length": 20}, out=tmp_path / "out")
    found = tdec.judge(trained, text_rows(3), text_rows(3, seed=7), n=3, length=20)
    assert card.value("memorisation_accuracy") == pytest.approx(found.forget.means[0])
    assert card.value("extraction_likelihood_of_holdout") == pytest.approx(found.holdout.means[1])
    assert ("not forgotten" in card.notes[0]) == (not found.forgotten)
