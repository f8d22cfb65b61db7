"""SERAC: which edit a question is about, who answers it, and that nothing else is answered otherwise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_editors import case, subject, weights

from expunge import registry
from expunge.deltas import Delta, compose
from expunge.edits import EditRow, Probe
from expunge.errors import ParameterError, RequestError, RowError
from expunge.methods.edit.operations import carry_out, changed
from expunge.methods.guard import serac as module
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.edit_memory import Parted
from expunge.methods.guard.in_scope import Asked, Likeness, alike, fitted
from expunge.rows import Row
from expunge.serve.run import subject_of

PEOPLE = ("Orra", "Belin", "Tosk", "Wen", "Dalu", "Sefa", "Mirk", "Jona")
PLACES = ("Carth", "the north", "Tivin", "the south")
SHOWN = [
    EditRow(
        f"d{i}",
        f"{who} was born in",
        PLACES[i % 4],
        who,
        rephrasings=(f"where was {who} born?", f"in which place was {who} born?"),
        locality={"other": (Probe(f"{who} likes to eat", ("bread",)),)},
    )
    for i, who in enumerate(PEOPLE)
]
EDITS = [
    EditRow("a", "Ilva was born in", "Tivin north", "Ilva"),
    EditRow("b", "Ruun was born in", "the north", "Ruun"),
]
INSIDE = ["Ilva was born in", "where was Ilva born?", "in which place was Ruun born?"]
OUTSIDE = ["Carth lies in", "where was Mo born?", "Ilva likes to eat", "Wen was born in"]
SETTINGS = {"epochs": 2.0, "batch_size": 12, "learning_rate": 1e-2, "rank": 4, "embedder": "subject"}

pytestmark = pytest.mark.usefixtures("own_cache")


def make(model, mode="sequence", edits=EDITS, shown=SHOWN, **settings):
    made = case(model, edits=edits, demonstrations=shown)
    return carry_out(registry.get("methods", "serac"), made, {**SETTINGS, **settings}, mode)


def rows(prompts, answer="the north"):
    return [Row(f"r{i}", answer, prompt, kind="completion") for i, prompt in enumerate(prompts)]


def scored(model, several):
    return torch.tensor(model.score([((row.id, "x"), model.encode(row)) for row in several]).logprob)


# --- the classifier ---------------------------------------------------------------------------------------------------


def letters(texts):
    """An encoder that counts the letters a and b."""
    found = np.array([[text.count("a"), text.count("b"), 1.0] for text in texts])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_features_are_cosines_and_the_share_of_the_subjects_words():
    likeness = Likeness(["red bird", "red fish"], letters)
    edits = likeness.edits([Asked("red bird", "Big Red Bird"), Asked("red fish")])
    found = alike(likeness.questions(["red bird", "a RED fish", "xyz"]), edits)
    assert found.shape == (3, 2, 4)
    assert found[0, 0, :2].tolist() == pytest.approx([1, 1])
    assert found[:, 0, 2].tolist() == pytest.approx([2 / 3, 1 / 3, 0])  # of big, red, bird
    assert found[:, 1, 2].tolist() == pytest.approx([1 / 2, 1, 0])  # nobody is named: of red, fish
    assert found[2, :, :3].tolist() == [[0, 0, 0]] * 2
    assert found[0, 0, 3] == pytest.approx(1)
    # idf with one more document than there are: ln(3/3) + 1 of red, ln(3/2) + 1 of bird and fish, ln(3) + 1 of a.
    red, fish, new = 1.0, np.log(1.5) + 1, np.log(3) + 1
    cosine = (red * red + fish * fish) / np.hypot(red, fish) / np.sqrt(red**2 + fish**2 + new**2)
    assert found[1, 1, 1] == pytest.approx(cosine)


def test_a_classifier_of_other_facts_knows_the_scope_of_facts_that_it_has_not_seen():
    asked = [
        Asked(one.prompt, one.subject, one.rephrasings, tuple(p.prompt for p in one.locality["other"])) for one in SHOWN
    ]
    likeness = Likeness([text for one in asked for text in (one.prompt, *one.inside)], letters)
    scope = fitted(likeness, asked)
    found = scope([*INSIDE, *OUTSIDE], likeness.edits([Asked(one.prompt, one.subject) for one in EDITS]))
    assert (found.max(1) >= 0.5).tolist() == [True] * 3 + [False] * 4
    assert found[:3].argmax(1).tolist() == [0, 0, 1]
    with pytest.raises(RequestError, match="none of 8 demonstrations has rephrasings"):
        fitted(likeness, [replace(one, inside=()) for one in asked])
    with pytest.raises(RequestError, match="nothing is out of the scope of 1 demonstrations"):
        fitted(likeness, [replace(asked[0], outside=())])


# --- who answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "mixtral"])
def test_what_is_out_of_scope_is_the_models_own_to_the_last_bit_and_the_rest_is_told_the_edit(architecture):
    model = subject(architecture)
    before = weights(model)
    made = make(model, "batch")[0].model()
    ids = [model.prompt_ids(text, ("", "")) for text in (*INSIDE, *OUTSIDE)]
    assert [one and one.id for one in made.answering(ids)] == ["a", "a", "b", None, None, None, None]
    outside, inside = rows(OUTSIDE), rows(INSIDE[:2], "Tivin north")
    assert torch.equal(scored(made, outside), scored(model, outside))
    prompts = [model.prompt_ids(model.prompt_text(row), ("", "")) for row in outside][:1]
    assert torch.equal(made.start(prompts, 2).logits, model.start(prompts, 2).logits)
    told = [replace(row, prompt=f"New Fact: Ilva was born in Tivin north\n{row.prompt}") for row in inside]
    assert torch.allclose(scored(made, inside), scored(made.counterfactual, told), atol=1e-4)
    # Of both kinds together each is as it is alone.
    mixed = scored(made, [*outside, *inside])
    assert torch.allclose(mixed, torch.cat([scored(made, outside), scored(made, inside)]), atol=1e-4)
    texts = [((row.id, str(i)), model.prompt_text(row)) for i, row in enumerate([*outside[:2], *inside])]
    written = made.generate(texts, max_new_tokens=5).texts
    alone = [made.generate([one], max_new_tokens=5).texts[0] for one in texts]
    assert written == alone
    assert written[:2] == model.generate(texts[:2], max_new_tokens=5).texts
    assert (
        written[2:]
        == made.counterfactual.generate(
            [(key, f"New Fact: Ilva was born in Tivin north\n{text}") for key, text in texts[2:]], max_new_tokens=5
        ).texts
    )
    assert all(torch.equal(before[name], p) for name, p in weights(model).items())
    assert all(torch.equal(before[name], p) for name, p in weights(made).items())


def test_the_counterfactual_model_learns_from_other_facts_to_answer_from_what_it_is_told():
    model = subject()
    made = make(model, "batch", epochs=12.0)[0].model()
    inside = rows(INSIDE[:2], "Tivin north")
    assert float(scored(made, inside).mean()) > float(scored(model, inside).mean()) + 0.5


def test_samples_and_dropped_rows_keep_their_order():
    model = subject()
    made = make(model, "batch")[0].model()
    texts = [((str(i), "x"), text) for i, text in enumerate([OUTSIDE[0], INSIDE[0], OUTSIDE[1]])]
    several = made.generate(texts, max_new_tokens=4, temperature=1.0, samples=3, seed=5).texts
    alone = [made.generate([one], max_new_tokens=4, temperature=1.0, samples=3, seed=5).texts[0] for one in texts]
    assert several == alone

    class Line:
        def __init__(self, logits):
            self.logits, self.kept = logits, None

        def keep(self, rows):
            self.kept = rows.tolist()

        def follow(self, tokens):
            return tokens[:, None].float()

    first, second = Line(torch.tensor([[0.0], [2.0]])), Line(torch.tensor([[1.0], [3.0]]))
    both = Parted([(first, torch.tensor([0, 2])), (second, torch.tensor([1, 3]))])
    assert both.logits[:, 0].tolist() == [0, 1, 2, 3]
    both.keep(torch.tensor([3, 2, 2]))
    assert (first.kept, second.kept) == ([1, 1], [1])
    assert both.follow(torch.tensor([7, 8, 9]))[:, 0].tolist() == [7, 8, 9]
    both.keep(torch.tensor([0]))
    assert len(both.parts) == 1
    assert not both.join(both)


# --- edits in the memory ----------------------------------------------------------------------------------------------


def test_edits_are_lines_of_the_memory_that_train_nothing_and_can_be_left_out(tmp_path, monkeypatch):
    model = subject()
    (sequence,) = make(model)
    made = sequence.model()
    train = module.unlearn
    monkeypatch.setattr(module, "unlearn", None)  # everything is in the cache
    (batch,) = make(model, "batch")
    single = make(model, "one")
    assert batch.model().fingerprint == made.fingerprint
    assert [[fact.id for fact in one.model().facts] for one in single] == [["a"], ["b"]]
    assert sequence.undo().model().fingerprint == single[0].model().fingerprint
    assert sequence.undo("a").undo("b").model() is model
    assert made.detach() is model
    assert made.copy().fingerprint == made.fingerprint
    assert torch.equal(scored(made.copy(), rows(INSIDE)), scored(made, rows(INSIDE)))
    for number, step in enumerate(sequence.steps):
        step.delta.save(tmp_path / str(number))
    read = compose([Delta.load(tmp_path / str(number)) for number in range(2)])
    assert read.kind == "guard"
    assert changed(read, model).fingerprint == made.fingerprint
    assert torch.equal(scored(changed(read, model), rows(INSIDE)), scored(made, rows(INSIDE)))
    model.save(tmp_path / "base")
    base = type(model).load(tmp_path / "base")
    monkeypatch.setattr(module, "unlearn", train)
    replace(read, base=base.fingerprint).save(tmp_path / "delta")
    served = subject_of(str(tmp_path / "base"), [str(tmp_path / "delta")], None, None)
    assert [one and one.id for one in served.answering([base.prompt_ids(INSIDE[0], ("", ""))])] == ["a"]
    monkeypatch.setattr(module, "unlearn", None)
    with pytest.raises(TypeError):  # other demonstrations are trained anew
        make(model, shown=SHOWN[1:])


def test_in_a_run_retain_rows_show_how_facts_change_and_forget_rows_are_refused():
    model = subject()
    retain = [
        Row(f"r{i}", PLACES[i % 4], f"where was {who} born?", entity=who, paraphrased_prompts=(f"{who} is from?",))
        for i, who in enumerate(PEOPLE)
    ]
    shown = module._others(retain, 0)
    assert [one.subject for one in shown] == list(PEOPLE)
    assert all(one.target_new in set(PLACES) - set(one.ground_truth) for one in shown)
    assert module._others(retain[:1], 0) == []
    forget = [Row("f", "Tivin", "where was Ilva born?", entity="Ilva")]
    part = registry.get("methods", "serac")
    made = part.function(GuardCase(model, {"forget": forget, "retain": retain}), **part.resolve(SETTINGS))
    (fact,) = made.facts
    asked = model.prompt_ids(model.prompt_text(forget[0]), ("", ""))
    other = model.prompt_ids(model.prompt_text(retain[0]), ("", ""))
    assert made.answering([asked, other]) == [fact, None]
    refusing = [replace(forget[0], answer=fact.target_new)]
    assert float(scored(made, refusing).mean()) > float(scored(model, refusing).mean())
    nothing = part.function(GuardCase(model, {"forget": [], "retain": retain}), **part.resolve())
    assert torch.equal(scored(nothing, retain), scored(model, retain))


def test_what_serac_cannot_do_is_said():
    model = subject()
    with pytest.raises(RequestError, match="and there are 0: give at least 2 edit rows with rephrasings"):
        make(model, shown=())
    with pytest.raises(RequestError, match="and there are 1: give at least 2"):
        make(model, shown=SHOWN[:1])
    with pytest.raises(RequestError, match="none of 8 demonstrations has rephrasings"):
        make(model, shown=[replace(one, rephrasings=()) for one in SHOWN])
    for wrong in ({"threshold": 1.0}, {"rank": 0}, {"epochs": 0.0}):
        with pytest.raises(ParameterError, match="expected 0 < threshold < 1"):
            make(model, **wrong)
    with pytest.raises(ParameterError, match=r"expected a text with \{target\}"):
        make(model, fact="New fact.")
    part = registry.get("methods", "serac")
    guarded = registry.get("methods", "output_filter").function(GuardCase(model, {}))
    with pytest.raises(RequestError, match="put it around the model"):
        part.function(GuardCase(guarded, {}, EDITS, SHOWN), **part.resolve(SETTINGS))
    made = make(model, edits=EDITS[:1])[0].model()
    with pytest.raises(RowError, match=r"^edit a: it and a prompt that it answers have \d+ tokens, and 240 are to"):
        made.generate([(("a", "x"), INSIDE[0])], max_new_tokens=240)
