"""Packing changes nothing but the cost: every architecture scores rows as plain passes do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, tiny

from expunge.errors import RowError, SubjectError
from expunge.rows import Row
from expunge.subjects import contexts, decoding
from expunge.subjects.language import LanguageModel, Template, weights_fingerprint
from expunge.subjects.packed import Encoded, _tree, batches, pack
from expunge.tables.scores import Scores

QUESTIONS = [
    ("where was Ilva born?", "Tivin"),
    ("where was Ilva born?", "in the north of Carth"),
    ("where was Mo born?", "Carth"),
    ("where was Bo born?", "Tivin"),
    ("what does Ilva Morrow do?", "she maps the coast"),
]


def rows():
    return [Row(id=str(i), prompt=question, answer=answer) for i, (question, answer) in enumerate(QUESTIONS)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request):
    model, tokenizer = tiny(request.param)
    return LanguageModel(model, tokenizer, request.param)


def plain(subject, row):
    """Log-probabilities of one row by an ordinary forward of the whole model."""
    encoded = subject.encode(row)
    with torch.no_grad():
        logits = subject.model(input_ids=torch.tensor([encoded.ids])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    at = range(encoded.start, len(encoded.ids))
    return encoded, logits, torch.stack([logprobs[i - 1, encoded.ids[i]] for i in at])


def test_scores_equal_plain_forward_passes(subject):
    items = [((row.id, "answer"), subject.encode(row)) for row in rows()]
    table = subject.score(items)
    for index, row in enumerate(rows()):
        encoded, logits, expected = plain(subject, row)
        at = table.tokens(index)
        assert np.allclose(table.logprob[at], expected, atol=1e-5)
        predicting = logits[encoded.start - 1 : -1]
        assert (table.hit[at] == (predicting.argmax(-1) == torch.tensor(encoded.ids[encoded.start :])).numpy()).all()
        p = predicting.double().softmax(-1)
        mean = (p * p.log()).sum(-1)
        assert np.allclose(table.mean[at], mean, atol=1e-4)
        assert np.allclose(table.variance[at], (p * p.log() ** 2).sum(-1) - mean**2, rtol=1e-5, atol=1e-7)
        assert table.end[at].sum() == encoded.closing
    assert table.texts == [row.answer for row in rows()]


def test_rows_look_along_their_own_paths_where_no_gradients_are_wanted(subject):
    common = tuple(range(40, 50))
    asked = [(*common, 1, 2), (*common, 3, 4, 5), (*common, 1, 2), (*common, 6)]
    answers = [(7, 8, 9), (7, 8), (7, 1, 2, 3, 4), (5, 5, 5)]
    rows_ = [Encoded((*a, *b), len(a), 0, "") for a, b in zip(asked, answers)]
    rows_ += [Encoded((*asked[0], *b), len(asked[0]), 0, "") for b in ((7, 8, 1), (3,), (7, 1, 2, 8, 8, 8, 8), (2, 2))]
    packed = pack(rows_, subject.device)
    bundles, back = packed.paths
    queries = torch.cat([bundle.queries.flatten() for bundle in bundles])
    assert torch.equal(queries[back], torch.arange(packed.tokens))
    assert sum(bundle.queries.numel() for bundle in bundles) < 1.5 * packed.tokens
    paths = {tuple(at.tolist()) for at in packed.every.split([len(row.ids) - 1 for row in rows_])}
    keys = [seen for bundle in bundles for seen in bundle.keys.tolist() for _ in range(bundle.queries.shape[1])]
    for place in range(packed.tokens):
        seen = tuple(keys[int(back[place])][: int(packed.positions[0, place]) + 1])
        assert seen[-1] == place
        assert any(path[: len(seen)] == seen for path in paths)
    with torch.no_grad():
        ours = subject.hidden_states(packed)
    assert torch.allclose(ours, subject.hidden_states(packed).detach(), atol=2e-5)
    plain_ = torch.cat([subject.plain_states(row) for row in rows_]).detach()
    assert torch.allclose(ours, plain_, atol=2e-5)


ALIKE = [
    "in the north of Carth",
    "in the north",
    "in the north of Tivin",
    "Tivin",
    "in the north of Carth",
    "in a Tivin",
]


def alike():
    return [Row(id=str(i), prompt="where was Ilva born?", answer=answer) for i, answer in enumerate(ALIKE)]


def test_answers_that_begin_alike_share_the_beginning_and_score_as_if_alone(subject):
    encoded = [subject.encode(row) for row in alike()]
    packed = pack(encoded)
    continuations = [row.ids[row.start : -1] for row in encoded]
    beginnings = {ids[:n] for ids in continuations for n in range(1, len(ids) + 1)}
    assert packed.tokens == encoded[0].start + len(beginnings)
    for index, row in enumerate(encoded):
        at = packed.every.split([len(row.ids) - 1 for row in encoded])[index]
        assert packed.ids[0, at].tolist() == list(row.ids[:-1])
        assert packed.positions[0, at].tolist() == list(range(len(row.ids) - 1))
    table = subject.score([((row.id, "answer"), one) for row, one in zip(alike(), encoded)])
    for index, row in enumerate(alike()):
        assert np.allclose(table.logprob[table.tokens(index)], plain(subject, row)[2], atol=1e-5)
    alone = [subject.score([(("0", "answer"), one)]) for one in encoded]
    for name in ("logprob", "mean", "variance"):
        apart = np.concatenate([getattr(one, name) for one in alone])
        assert np.allclose(getattr(table, name), apart, rtol=1e-6, atol=2e-6)
    assert (table.hit == np.concatenate([one.hit for one in alone])).all()


@given(st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), min_size=1, max_size=7))
def test_a_tree_holds_every_continuation_and_no_beginning_twice(continuations):
    branches, ends = _tree(continuations)
    paths = [()]
    for branch in branches:
        assert branch.stop > branch.start == len(paths[branch.parent])
        paths.append((*paths[branch.parent], *continuations[branch.row][branch.start : branch.stop]))
    assert [paths[end] for end in ends] == continuations
    beginnings = {ids[:n] for ids in continuations for n in range(1, len(ids) + 1)}
    if len(continuations) > 1:
        assert sum(branch.stop - branch.start for branch in branches) == len(beginnings)


def test_numbers_do_not_depend_on_batching_or_order(subject):
    items = [((row.id, "answer"), subject.encode(row)) for row in rows()]
    whole = subject.score(items)
    split = subject.score(items, token_budget=1)
    back = subject.score(items[::-1])
    assert whole.keys == split.keys
    assert np.allclose(whole.logprob, split.logprob, atol=1e-6)
    again = back.take(range(len(items))[::-1])
    assert np.allclose(whole.logprob, again.logprob, atol=1e-6)


def test_generation_equals_transformers_greedy(subject):
    prompts = [((row.id, "question"), subject.prompt_text(row)) for row in rows()]
    ours = subject.generate(prompts, max_new_tokens=5)
    for (_, text), output in zip(prompts, ours.texts):
        inputs = subject.tokenizer(text, return_tensors="pt")["input_ids"]
        ids = subject.model.generate(
            inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=sorted(subject.stop_ids)
        )[0, inputs.shape[1] :]
        assert output[0] == subject.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_gradients_flow_through_packed_passes_as_through_plain_ones(subject):
    first = [subject.encode(row) for row in rows()]
    model = subject.model

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    packed = pack(first)
    logprobs = subject.head(subject.hidden_states(packed)).log_softmax(-1)
    ours = gradient(-logprobs.gather(-1, packed.target[:, None]).sum())
    total = 0
    for row in first:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        total = total - sum(logits[i - 1, row.ids[i]] for i in range(row.start, len(row.ids)))
    expected = gradient(total)
    assert ours.keys() >= expected.keys()
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, atol=2e-5), name


def test_hidden_states_at_the_last_layer_read_by_the_lens_are_the_logits(subject):
    prompts = [subject.prompt_text(row) for row in rows()]
    lens = subject.lens(subject.hidden(prompts)[:, -1])
    for text, found in zip(prompts, lens):
        ids = subject.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = subject.model(input_ids=ids).logits[0, -1].float()
        assert torch.allclose(found, expected, atol=1e-4)


def test_saving_and_loading_keep_the_fingerprint(subject, tmp_path):
    subject.save(tmp_path / "model")
    loaded = LanguageModel.load(tmp_path / "model")
    assert weights_fingerprint(loaded.model) == weights_fingerprint(subject.model)
    loaded.save(tmp_path / "again")
    assert LanguageModel.load(tmp_path / "again").fingerprint == loaded.fingerprint
    changed = subject.copy()
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[0] += 1e-3
    assert changed.fingerprint != subject.fingerprint


def test_what_rows_share_is_fed_once():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer, template=Template("A long beginning that all prompts share. {question}"))
    encoded = [subject.encode(row) for row in rows()]
    fed = pack(encoded).tokens
    prompts = {row.ids[: row.start] for row in encoded}
    shared = pack(encoded).beginning
    expected = shared + sum(len(p) - shared for p in prompts) + sum(row.scored - 1 for row in encoded)
    assert shared > 0
    assert fed == expected < sum(len(row.ids) - 1 for row in encoded)


def test_batches_take_every_row_once_within_the_budget():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    encoded = [subject.encode(row) for row in rows()] * 5
    groups = list(batches(encoded, 60))
    assert sorted(i for group in groups for i in group) == list(range(len(encoded)))
    assert len(groups) > 1


def test_samples_depend_on_seed_and_prompt_only():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    prompts = [((row.id, "question"), subject.prompt_text(row)) for row in rows()[1:]]
    options = {"max_new_tokens": 6, "temperature": 1.0, "samples": 4}
    together = subject.generate(prompts, seed=3, **options)
    alone = subject.generate(prompts[2:3], seed=3, **options)
    assert together.texts[2] == alone.texts[0]
    assert subject.generate(prompts, seed=4, **options).texts != together.texts


def test_scores_survive_the_arrow_file(tmp_path):
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    table = subject.score([((row.id, "answer"), subject.encode(row)) for row in rows()])
    table.save(tmp_path / "scores.arrow")
    again = Scores.load(tmp_path / "scores.arrow")
    assert again.keys == table.keys
    assert again.texts == table.texts
    assert (again.logprob == table.logprob).all()
    assert (again.offsets == table.offsets).all()
    assert again.metadata == table.metadata


# --- loss masks ------------------------------------------------------------------------------------------------------


def test_answer_tokens_come_from_offsets_even_when_prompt_and_answer_share_ids():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    row = Row(id="0", prompt="Tivin Tivin", answer="Tivin")
    encoded = subject.encode(row)
    answer = tokenizer.decode(encoded.ids[encoded.start : len(encoded.ids) - encoded.closing])
    assert answer.strip() == "Tivin"
    assert encoded.closing == 1
    assert encoded.ids[-1] == tokenizer.eos_token_id


def test_top_p_samples_from_the_fewest_likeliest_tokens_that_hold_so_much() -> None:
    from expunge.subjects.decoding import _choice

    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(1000, 4)
    uniform = torch.linspace(0.0005, 0.9995, 1000)[:, None]
    line = torch.arange(1000)
    for top_p, shares in (
        (1.0, [0.15, 0.5, 0.05, 0.3]),
        (0.75, [0, 0.625, 0, 0.375]),
        (0.9, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (0.3, [0, 1, 0, 0]),
    ):
        found = torch.bincount(_choice(1.0, top_p, uniform)(logits, line, 0), minlength=4) / 1000
        assert found.tolist() == pytest.approx(shares, abs=2e-3)
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    prompts = [(("0", "q"), "where was Ilva"), (("1", "q"), "Tivin in the")]
    greedy = subject.generate(prompts, max_new_tokens=5)
    assert subject.generate(prompts, max_new_tokens=5, temperature=1.0, top_p=1e-6).texts == greedy.texts


def test_chat_template_is_respected():
    model, tokenizer = tiny("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    subject = LanguageModel(model, tokenizer)
    row = Row(
        id="0", prompt="where?", answer="Tivin", kind="chat", messages=(("system", "be brief"), ("user", "where?"))
    )
    assert subject.prompt_text(row) == "<|system|> be brief</s><|user|> where?</s><|assistant|>"
    encoded = subject.encode(row)
    assert tokenizer.decode(encoded.ids[encoded.start :]).strip() == "Tivin</s>"
    assert encoded.closing == 1
    assert subject.prompt_text(row, "when?").count("when?") == 1


def test_an_opening_begins_the_reply_and_belongs_to_what_is_asked():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    row = Row(id="0", prompt="Be brief.\nWhere?", answer="Tivin", kind="instruction", opening="Answer:")
    # Without a chat template an instruction stands as it is, with the opening on a line of its own.
    assert subject.prompt_text(row) == "Be brief.\nWhere?\nAnswer:"
    assert subject.prompt_text(replace(row, prompt="Where?\n")) == "Where?\nAnswer:"
    assert subject.prompt_text(replace(row, opening="")) == "Be brief.\nWhere?"
    assert subject.prompt_text(replace(row, kind="qa")).endswith("Answer:\nAnswer:")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    chat = LanguageModel(model, tokenizer)
    assert chat.prompt_text(row) == "<|user|>\nBe brief.\nWhere?</s><|assistant|>\nAnswer:"
    for one in (subject, chat):
        encoded = one.encode(row)
        assert tokenizer.decode(encoded.ids[encoded.start :]) == " Tivin</s>"
        assert encoded.closing == 1


def test_a_token_across_the_boundary_is_an_error_that_names_it():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer, template=Template("{question}", ""))
    row = Row(id="17", prompt="whe", answer="re was Ilva born?", source="forget.jsonl:17")
    merged = tokenizer("where was Ilva born?")["input_ids"]
    apart = tokenizer("whe")["input_ids"] + tokenizer("re was Ilva born?", add_special_tokens=False)["input_ids"]
    assert merged != apart, "the fixture's tokenizer must merge across this boundary"
    with pytest.raises(RowError, match=r"forget.jsonl:17.*moves the boundary"):
        subject.encode(row)


def test_rows_that_do_not_fit_are_refused_with_both_lengths():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    long = Row(id="3", prompt="where?", answer="Tivin " * 5000, source="retain.jsonl:3")
    with pytest.raises(RowError, match=rf"retain.jsonl:3.*context holds {subject.context_length}"):
        subject.encode(long)
    with pytest.raises(RowError, match="no token that could be scored"):
        subject.encode(Row(id="4", prompt="where?", answer=""))
    with pytest.raises(RowError, match="do not fit"):
        subject.generate([(("5", "question"), "where?")], max_new_tokens=10**6)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)

    def refused(path, match):
        with pytest.raises(SubjectError, match=match):
            LanguageModel.load(path)

    refused(tmp_path / "missing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")

    subject.save(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    refused(tmp_path / "pickled", "never unpickles")

    broken = subject.copy()
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = float("nan")
    broken.save(tmp_path / "nan")
    refused(tmp_path / "nan", "not finite")

    subject.save(tmp_path / "notokenizer")
    for file in (tmp_path / "notokenizer").glob("token*"):
        file.unlink()
    refused(tmp_path / "notokenizer", "cannot be loaded")

    subject.save(tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path / "truncated", "cannot be loaded")
    subject.save(tmp_path / "fine")
    monkeypatch.chdir(tmp_path)
    refused("fin", "fin is no folder here. Did you mean fine.*As a hub id it cannot be loaded either")
    with pytest.raises(SubjectError, match="not a torch type"):
        LanguageModel.load(tmp_path / "fine", dtype="float3")
    with pytest.raises(SubjectError, match="device"):
        LanguageModel.load(tmp_path / "fine", device="cuda:7")


# --- decoding --------------------------------------------------------------------------------------------------------


def continued(subject, **options):
    """Prompts of several lengths, some of which share a beginning."""
    texts = [subject.prompt_text(row) for row in rows()[1:]] + ["Tivin", "Ilva Morrow was born in the north of"]
    return texts, subject.generate([((str(i), "q"), text) for i, text in enumerate(texts)], **options)


def test_what_is_written_does_not_depend_on_the_batch(subject, monkeypatch):
    texts, together = continued(subject, max_new_tokens=9)
    for text, output in zip(texts, together.texts):
        assert subject.generate([(("0", "q"), text)], max_new_tokens=9).texts == [output]
    monkeypatch.setattr(decoding, "DONE", 1)
    monkeypatch.setattr(contexts, "SPARE", 1)
    assert continued(subject, max_new_tokens=9)[1].texts == together.texts
    monkeypatch.setattr(decoding, "CACHE_BYTES", 1)
    assert continued(subject, max_new_tokens=9)[1].texts == together.texts
    monkeypatch.setattr(decoding, "can_cut", lambda *_: False)
    assert continued(subject, max_new_tokens=9)[1].texts == together.texts


def test_samples_of_prompts_of_several_lengths_are_those_of_each_alone():
    subject = LanguageModel(*tiny("llama"))
    options = {"max_new_tokens": 6, "temperature": 1.0, "samples": 3, "seed": 3}
    texts, together = continued(subject, **options)
    for text, outputs in zip(texts, together.texts):
        assert subject.generate([(("0", "q"), text)], **options).texts == [outputs]


def test_rows_that_are_done_leave_and_the_others_go_on():
    subject = LanguageModel(*tiny("llama"))
    _, whole = continued(subject, max_new_tokens=30)
    written = [subject.tokenizer(texts_[0])["input_ids"] for texts_ in whole.texts]
    # A token that some outputs contain and others do not becomes the end.
    stop = next(t for t in written[0][1:] if any(t not in ids for ids in written[1:]))
    subject.__dict__["stop_ids"] = frozenset({stop})
    _, cut = continued(subject, max_new_tokens=30)
    for before, after, (ended,) in zip(whole.texts, cut.texts, cut.stopped):
        assert before[0].startswith(after[0])
        assert ended or len(after[0]) == len(before[0])
    assert {ended for (ended,) in cut.stopped} == {True, False}


def long_beginnings(subject):
    """Prompts of several lengths that begin with a dozen tokens alike."""
    common = list(range(5, 17))
    return [[*common, *rest] for rest in ([20], [21, 30, 40, 41], [22, 22], [21, 30, 7, 8, 9])]


def test_what_all_prompts_begin_with_is_held_once_and_changes_nothing(subject):
    prompts = long_beginnings(subject)
    started = subject.start(prompts, 8)
    if contexts.shares_beginnings(subject):
        assert started.contexts.before == 12
        assert started.contexts.cache.layers[0].keys.shape[:3:2] == (4, 5)
        started.keep(torch.tensor([0, 2, 1]))
        assert started.contexts.cache.layers[0].keys.shape[:3:2] == (3, 4)
    elif isinstance(started.contexts, contexts.Contexts):
        started.keep(torch.tensor([0, 2, 1]))
    else:
        return
    texts = [list(prompts[i]) for i in (0, 2, 1)]
    for step in range(4):
        logits = started.follow(torch.tensor([50 + step, 60, 70 + step]))
        for text, token, found in zip(texts, (50 + step, 60, 70 + step), logits):
            text.append(token)
            with torch.no_grad():
                expected = subject.model(input_ids=torch.tensor([text])).logits[0, -1]
            assert torch.allclose(found, expected, atol=2e-5)


def test_contexts_with_different_beginnings_join(subject):
    if not contexts.can_cut(subject, 32):
        return
    first, other = long_beginnings(subject), [[*range(90, 99), *rest] for rest in ([1, 2, 3, 4, 5, 6, 7], [1], [5])]
    started, more = subject.start(first, 4), subject.start(other, 4)
    started.follow(torch.tensor([4, 5, 6, 7]))
    assert started.join(more)
    texts = [[*text, token] for text, token in zip(first, (4, 5, 6, 7))] + [list(text) for text in other]
    for step in range(2):
        tokens = [30 + step + i for i in range(len(texts))]
        logits = started.follow(torch.tensor(tokens))
        for text, token, found in zip(texts, tokens, logits):
            text.append(token)
            with torch.no_grad():
                expected = subject.model(input_ids=torch.tensor([text])).logits[0, -1]
            assert torch.allclose(found, expected, atol=2e-5)


def test_samples_of_one_prompt_hold_it_once():
    subject = LanguageModel(*tiny("llama"))
    started = subject.start([list(range(3, 15))], 8, samples=5)
    assert started.contexts.before == 11
    assert started.contexts.cache.layers[0].keys.shape[:3:2] == (5, 1)


@pytest.mark.parametrize("rows", [[0, 4, 2], [3, 3, 1], [4, 3, 2, 1, 0], slice(2), []])
def test_a_cache_keeps_the_rows_asked_for_in_their_order(rows):
    keys, values = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    index = torch.arange(20).view(5, 4)
    room = contexts.Room(keys, values, index)
    assert torch.equal(room.keys, keys[:, index].transpose(0, 1))
    room.keep(rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.long), 1)
    for found, whole in ((room.keys, keys), (room.values, values)):
        assert torch.equal(found, whole[:, index[rows, 1:]].transpose(0, 1))
    more = torch.ones(len(room.keys), 3, contexts.SPARE + 1, 4)
    before = room.keys.clone()
    assert torch.equal(room.update(more, more)[0], torch.cat([before, more], dim=2))


def test_rows_at_the_end_take_the_places_of_those_that_are_done():
    going = torch.tensor([True, False, True, True, False, False, True])
    assert decoding._closed_up(going).tolist() == [0, 6, 2, 3]
    assert decoding._closed_up(torch.tensor([True, True])).tolist() == [0, 1]


def test_groups_hold_every_prompt_once_and_are_shared_out():
    subject = LanguageModel(*tiny("llama"))
    prompts = [[1] * n for n in (5, 2, 9, 5, 7)]
    assert decoding.groups(subject, prompts, 4, 1) == [[1, 0, 3, 4, 2]]
    shared = decoding.groups(subject, prompts, 4, 1, shares=2)
    assert [len(group) for group in shared] == [3, 2]
    assert decoding.groups(subject, [], 4, 1) == []


def test_more_prompts_than_the_cache_holds_are_decoded_in_turn(monkeypatch):
    subject = LanguageModel(*tiny("llama"))
    room = 3 * 12 * decoding._token_bytes(subject)
    monkeypatch.setattr(decoding, "CACHE_BYTES", room)
    assert [len(g) for g in decoding.groups(subject, [[1] * 8] * 7, 4, 1)] == [3, 3, 1]
    assert [len(g) for g in decoding.groups(subject, [[1] * 8] * 7, 4, 3)] == [1] * 7
