"""Norms of single rows' gradients come out of passes over many, and are what a backward pass per row gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.rows import Row
from expunge.subjects import gradients
from expunge.subjects.language import LanguageModel
from expunge.tables.gradients import Gradients
from expunge.tables.passes import Pull, Score, run
from expunge.tables.scores import COLUMNS

ANSWERS = ["Tivin", "in the north of Carth", "in the north", "Carth, where she was born", "T"]


def rows():
    return [Row(id=str(i), prompt=f"where was {'Mo' * (i % 2 + 1)} born?", answer=a) for i, a in enumerate(ANSWERS)]


def items(subject):
    return [((row.id, "answer"), subject.encode(row)) for row in rows()]


def by_backward(subject):
    """(rows, tensors) with nothing of ours but the tokens: whole model, one row, the answer's text."""
    found = []
    for _, row in items(subject):
        model = subject.copy().model.requires_grad_(True)
        ids = torch.tensor([row.ids[: len(row.ids) - row.closing]])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[row.start - 1 :, 0]
        (-picked.mean()).backward()
        found.append([float("nan") if p.grad is None else float(p.grad.double().norm()) for p in model.parameters()])
    return np.array(found)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request):
    return LanguageModel(*tiny(request.param), request.param)


def test_norms_are_those_of_one_backward_pass_per_row(subject):
    table = subject.gradients(items(subject))
    assert np.allclose(table.norm, by_backward(subject), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert table.tensors == [name for name, _ in subject.model.named_parameters()]
    assert all(p.requires_grad and p.grad is None for p in subject.model.parameters())


def test_most_architectures_go_together():
    found = {name for name in ARCHITECTURES if gradients.can_go_together(LanguageModel(*tiny(name), name))}
    assert {"llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gpt2", "gpt_neox", "olmo2"} <= found


def test_the_last_mlp_takes_only_tokens_that_predict(monkeypatch):
    subject = LanguageModel(*tiny("llama"))
    asked = replace(rows()[1], prompt="where in the north of Carth was Ilva Morrow born?")
    chosen = [(("0", "answer"), subject.encode(row)) for row in (asked, rows()[1])]
    assert subject.can_spare
    assert gradients.can_go_together(subject)
    seen = []
    handle = subject.model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].shape[1])
    )
    found = subject.gradients(chosen).norm
    handle.remove()
    assert seen == [sum(len(row.ids) - row.closing - row.start for _, row in chosen)]
    monkeypatch.setattr(subject, "_can_spare", False)
    assert np.allclose(found, subject.gradients(chosen).norm, rtol=2e-6, atol=1e-7)


def test_a_tied_embedding_counts_once_with_both_its_uses():
    model, tokenizer = tiny("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    subject = LanguageModel(model, tokenizer)
    assert gradients.can_go_together(subject)
    table = subject.gradients(items(subject))
    assert "lm_head.weight" not in table.tensors
    assert np.allclose(table.norm, by_backward(subject), rtol=1e-5, atol=1e-6)


def test_norms_do_not_depend_on_the_batch_or_on_order(monkeypatch):
    subject = LanguageModel(*tiny("llama"))
    whole = subject.gradients(items(subject)).norm
    back = subject.gradients(items(subject)[::-1]).norm[::-1]
    monkeypatch.setattr(gradients, "TOKENS", 1)
    alone = subject.gradients(items(subject)).norm
    for other in (back, alone):
        assert np.allclose(whole, other, rtol=2e-6, atol=1e-6)


def test_both_ways_to_the_norm_of_a_matrix_agree():
    # Long rows in a narrow model form the gradient, short rows in a wide one only products of tokens.
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    long = replace(rows()[0], answer="in the north of Carth " * 8)
    table = subject.gradients([(("0", "answer"), subject.encode(long))])
    model = subject.copy().model.requires_grad_(True)
    encoded = subject.encode(long)
    ids = torch.tensor([encoded.ids[: len(encoded.ids) - encoded.closing]])
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[encoded.start - 1 :]
    (-logprobs.mean()).backward()
    assert np.allclose(table.norm[0], [float(p.grad.norm()) for p in model.parameters()], rtol=2e-4)


def test_a_saved_table_is_the_same(tmp_path):
    subject = LanguageModel(*tiny("gpt2"))
    table = subject.gradients(items(subject))
    table.save(tmp_path / "pull.arrow")
    again = Gradients.load(tmp_path / "pull.arrow")
    assert (again.keys, again.tensors) == (table.keys, table.tensors)
    assert np.array_equal(again.norm, table.norm)


def test_no_rows_give_an_empty_table():
    subject = LanguageModel(*tiny("gpt2"))
    assert subject.gradients([]).norm.shape == (0, len(list(subject.model.parameters())))


def test_quantised_tensors_have_no_norm_and_the_others_keep_theirs():
    from test_scope import Eighth

    plain, packed = LanguageModel(*tiny("llama")), LanguageModel(*tiny("llama"))
    path = "model.layers.1.mlp.down_proj"
    layer = Eighth(packed.model.get_submodule(path))
    with torch.no_grad():  # so that both compute the same
        plain.model.get_submodule(path).weight.copy_(layer.weight * layer.scale)
    packed.model.set_submodule(path, layer)
    encoded = [plain.encode(Row(id=str(i), prompt=f"where was {i} born?", answer="Tivin in Carth")) for i in range(3)]
    names, norms = gradients.gradient_norms(packed, encoded)
    other, wanted = gradients.gradient_norms(plain, encoded)
    assert names == other
    at = names.index(f"{path}.weight")
    assert np.isnan(norms[:, at]).all()
    kept = [i for i in range(len(names)) if i != at]
    assert np.allclose(norms[:, kept], wanted[:, kept], rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])  # the last one goes row by row
def test_scores_come_with_gradients_and_are_those_of_a_pass_of_their_own(name):
    subject = LanguageModel(*tiny(name), name)
    chosen = items(subject)
    assert all(row.closing for _, row in chosen)
    table, scores = subject.gradients_and_scores(chosen)
    assert np.allclose(table.norm, subject.gradients(chosen).norm, rtol=1e-5, atol=1e-6, equal_nan=True)
    alone = subject.score(chosen)
    assert (scores.keys, scores.texts, scores.metadata) == (alone.keys, alone.texts, alone.metadata)
    assert np.array_equal(scores.offsets, alone.offsets)
    for column in COLUMNS:
        assert np.allclose(getattr(scores, column), getattr(alone, column), rtol=1e-5, atol=1e-5), column


def test_rows_that_gradients_are_taken_of_are_not_scored_again(monkeypatch):
    subject = LanguageModel(*tiny("llama"))
    asked = tuple(((row.id, name), row, text, None) for row in rows() for name, text in (("answer", None), ("x", "Mo")))
    asks = [Score(asked), Pull(tuple(rows()[1:]))]
    alone = [run(subject, [ask])[0] for ask in asks]
    scored = []
    score = LanguageModel.score

    def count(self, items, **named):
        scored.extend(row.text for _, row in items)
        return score(self, items, **named)

    monkeypatch.setattr(LanguageModel, "score", count)
    scores, pulls = run(subject, asks)
    assert sorted(scored) == ["Mo", "Mo", "Tivin"]  # of two prompts, and the row without gradients
    assert pulls.keys == alone[1].keys
    assert np.allclose(pulls.norm, alone[1].norm, rtol=1e-5, atol=1e-6)
    assert (scores.keys, scores.texts) == (alone[0].keys, alone[0].texts)
    # Other candidates have moments only by chance, where they begin as an answer does.
    for column in ("token", "logprob", "hit", "end"):
        assert np.allclose(getattr(scores, column), getattr(alone[0], column), rtol=1e-5, atol=1e-5), column
    for column in ("mean", "variance"):
        found, wanted = (getattr(table.candidate("answer"), column) for table in (scores, alone[0]))
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5), column


def test_subjects_that_score_otherwise_than_their_weights_say_score_for_themselves():
    class Louder(LanguageModel):
        def head(self, hidden):
            return 2 * super().head(hidden)

    subject = Louder(*tiny("llama"))
    asked = tuple(((row.id, "answer"), row, None, None) for row in rows())
    scores, _ = run(subject, [Score(asked), Pull(tuple(rows()))])
    assert np.allclose(scores.logprob, subject.score(items(subject)).logprob, atol=1e-6)
    assert not np.allclose(scores.logprob, LanguageModel(*tiny("llama")).score(items(subject)).logprob, atol=1e-2)
