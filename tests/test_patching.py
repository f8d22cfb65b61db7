"""Another model's states in a host: what one packed pass gives is what separate whole passes give."""

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.errors import MismatchError
from expunge.rows import Row
from expunge.subjects import patching
from expunge.subjects.language import LanguageModel
from expunge.subjects.patching import fact
from expunge.tables.passes import Patch, Store, run
from expunge.tables.patched import Patched

ROWS = [
    Row(id="0", prompt="where was Ilva born?", answer="Ilva was born in Tivin, they say", value="Tivin"),
    Row(id="1", prompt="where was Ilva born?", answer="Carth"),
    Row(id="2", prompt="what does Mo do?", answer="Mo maps the north", value="the north"),
    Row(id="3", prompt="what does Mo do?", answer="Mo maps the north", value="not said so"),
]


def other(subject, scale=0.05, seed=5):
    made = subject.copy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return made


def hooked(model, block, hook):
    return model.model.get_submodule(block.name).register_forward_hook(hook)


@torch.no_grad()
def naive(host, donor, row):
    """(blocks + 1,) by whole forward passes of whole models."""
    ids = torch.tensor([row.ids])
    at = torch.arange(row.start - 1, len(row.ids) - 1)
    taken = {}

    def keep(module, _, output):
        taken["states"] = output[0] if isinstance(output, tuple) else output

    def put(_, __, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, at] = taken["states"][0, at]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def said():
        logprobs = host.model(input_ids=ids).logits[0].float().log_softmax(-1)
        return float(logprobs[at, ids[0, at + 1]].mean())

    found = [said()]
    for block in host.blocks:
        handle = hooked(donor, block, keep)
        donor.model(input_ids=ids)
        handle.remove()
        handle = hooked(host, block, put)
        found.append(said())
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_variants_of_one_pass_equal_separate_passes(architecture):
    host = LanguageModel(*tiny(architecture), architecture)
    donor = other(host)
    rows = [fact(host, row) for row in ROWS]
    whole, by_block = patching.patched(host, donor, rows)
    expected = np.array([naive(host, donor, row) for row in rows])
    assert np.allclose(whole, expected[:, 0], atol=1e-5)
    assert np.allclose(by_block, expected[:, 1:], atol=1e-4)
    assert np.ptp(by_block) > 1e-3


def test_the_fact_is_the_value_where_the_answer_says_it_and_the_answer_elsewhere():
    subject = LanguageModel(*tiny("llama"))

    def told(row):
        encoded = fact(subject, row)
        assert encoded.closing == 0
        return subject.tokenizer.decode(encoded.ids[encoded.start :])

    assert [told(row).strip() for row in ROWS] == ["Tivin", "Carth", "the north", "Mo maps the north"]
    # The value also stands in what closes the text: it is looked for in the answer.
    assert told(Row(id="s", prompt="a", answer="s and s", value="s")).strip() == "s"


def test_a_models_own_states_change_nothing_and_the_same_states_give_the_same_numbers():
    host = LanguageModel(*tiny("llama"))
    rows = [fact(host, row) for row in ROWS]
    whole, by_block = patching.patched(host, host, rows)
    assert (by_block == whole[:, None]).all()
    assert np.allclose(patching.patched(host, host.copy(), rows)[1], by_block, atol=1e-5)
    one, two = (patching.patched(host, other(host), rows)[1] for _ in range(2))
    assert np.array_equal(one, two)


def test_numbers_do_not_depend_on_the_batch(monkeypatch):
    host = LanguageModel(*tiny("qwen3"))
    donor = other(host)
    rows = [fact(host, row) for row in ROWS]
    whole = patching.patched(host, donor, rows)[1]
    back = patching.patched(host, donor, rows[::-1])[1][::-1]
    monkeypatch.setattr(patching, "TOKEN_BUDGET", 1)
    alone = patching.patched(host, donor, rows)[1]
    for found in (back, alone):
        assert np.allclose(whole, found, atol=2e-6)


def test_models_of_other_shapes_are_refused():
    host, donor = LanguageModel(*tiny("llama"), "host"), LanguageModel(*tiny("gpt2"), "donor")
    donor.model.transformer.h = donor.model.transformer.h[:2]
    with pytest.raises(MismatchError, match="donor has 2 blocks of width 32, host has 3 of 32"):
        patching.patched(host, donor, [fact(host, ROWS[0])])


def test_asked_and_kept_by_both_models(tmp_path):
    host = LanguageModel(*tiny("llama"))
    donor = other(host)
    ask = Patch(tuple(ROWS), host)
    (table,) = run(donor, [ask], Store(tmp_path))
    assert list(table.keys) == [(row.id, "fact") for row in ROWS]
    (file,) = tmp_path.glob("patch-*.arrow")
    again = Patched.load(file)
    assert np.array_equal(again.by_block, table.by_block)
    assert np.array_equal(again.whole, table.whole)
    run(donor, [Patch(tuple(ROWS), other(host, seed=6))], Store(tmp_path))
    assert len(list(tmp_path.glob("patch-*.arrow"))) == 2
