"""Causal tracing: restoring everything is the clean run, restoring nothing the corrupted one, on every architecture."""

import json
import re

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge import causal_trace, cli
from expunge.edits import EditRow
from expunge.errors import ParameterError, RequestError, RowError
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.traced import effects, layer_of, span_of
from expunge.report import charts
from expunge.subjects.language import LanguageModel
from expunge.subjects.restoring import Corrupted, Fact, Site, locate, window
from expunge.subjects.restoring import causal_trace as traced

ILVA = EditRow("a", "where was Ilva born in", "", "Ilva", ("Tivin",))
CARTH = EditRow("b", "Carth lives in the", "", "Carth")


def made(architecture: str) -> LanguageModel:
    subject = LanguageModel(*tiny(architecture))
    with torch.no_grad():
        for name, p in subject.model.named_parameters():
            if p.dim() > 1 and "embed" not in name and "wte" not in name:
                p.mul_(5)
    return subject


def corrupted(subject, fact, scale=0.1, draws=2):
    width = subject.model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    return Corrupted(subject, fact, scale * torch.randn(draws, fact.stop - fact.first, width, generator=generator))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_restoring_every_token_is_the_clean_run_and_restoring_none_the_corrupted_one(architecture):
    subject = made(architecture)
    run = corrupted(subject, locate(subject, ILVA))
    everything = tuple(range(len(run.fact.ids)))
    sites = [Site("block", (layer,), everything) for layer in range(3)]
    # All that is added to the stream after the embeddings, and these from the clean run's first block on.
    sites += [Site("mlp", (0, 1, 2), ()), Site("block", (1,), ()), Site("attention", (), everything)]
    found = run.restored(sites)
    assert (run.low - run.clean).abs().max() > 1e-5
    assert torch.allclose(found[:3], torch.full_like(found[:3], run.clean), rtol=1e-4)
    assert torch.allclose(found[3:], run.low.expand(3, -1), rtol=1e-4)
    still = corrupted(subject, run.fact, scale=0.0)
    assert still.low.tolist() == pytest.approx([still.clean] * 2, rel=1e-5)


def test_a_restored_state_is_what_running_the_whole_model_by_hand_gives():
    subject = made("llama")
    fact = locate(subject, ILVA)
    run = corrupted(subject, fact, draws=1)
    layers = subject.model.model.layers
    ids = torch.tensor([fact.ids])
    with torch.no_grad():
        clean = subject.model.model(input_ids=ids, output_hidden_states=True).hidden_states
        states = {}
        handle = layers[1].mlp.register_forward_hook(lambda _, __, output: states.update(mlp=output))
        subject.model(input_ids=ids)
        handle.remove()
        embedded = subject.model.get_input_embeddings()(ids)
        embedded[0, fact.first : fact.stop] += run.noise[0]

        def put(where, value):
            def hook(_, __, output):
                output[0, where] = value[0, where]
                return output

            return hook

        last = fact.stop - 1
        by_hand = []
        for module, value in ((layers[1], clean[2]), (layers[1].mlp, states["mlp"])):
            handle = module.register_forward_hook(put(last, value))
            logits = subject.model(inputs_embeds=embedded).logits[0, -1]
            handle.remove()
            by_hand.append(float(logits.softmax(-1)[run.answer]))
    found = run.restored([Site("block", (1,), (last,)), Site("mlp", (1,), (last,))])
    assert found[:, 0].tolist() == pytest.approx(by_hand, rel=1e-4)
    # Last token, last block: the state that the answer is read from.
    assert float(run.restored([Site("block", (2,), (len(fact.ids) - 1,))])) == pytest.approx(run.clean, rel=1e-4)


def test_effects_do_not_depend_on_what_else_is_traced_and_average_over_draws():
    subject = made("llama")
    facts = [locate(subject, edit) for edit in (ILVA, CARTH)]
    both = traced(subject, facts, draws=3, noise=1.0)
    assert [one.chosen for one in both][1] is True  # without a known answer the model's own first choice
    assert both[0].effects["mlp"].shape == (len(facts[0].ids) - facts[0].first, 3)
    # The scale of the noise is that of all facts, so one alone gets another: noise in its own deviations is compared.
    (alone,) = traced(subject, facts[:1], draws=3, noise=0.0)
    assert alone.low == pytest.approx(alone.clean, rel=1e-5)
    assert np.abs(alone.effects["block"]).max() < 1e-6
    again = traced(subject, facts[::-1], draws=3, noise=1.0)[::-1]
    for one, other in zip(both, again):
        for kind in one.effects:
            np.testing.assert_allclose(one.effects[kind], other.effects[kind], atol=1e-6)


def test_tokens_are_called_by_their_place():
    def places(count, first, stop):
        return Fact(ILVA, tuple(range(count)), first, stop, None).places

    assert places(4, 2, 4) == ["first subject token", "last subject token"]
    assert places(3, 2, 3) == ["last subject token"]
    assert places(3, 1, 2) == ["last subject token", "last token"]
    assert places(9, 1, 5) == [
        "first subject token",
        *["middle subject tokens"] * 2,
        "last subject token",
        "first subsequent token",
        *["further tokens"] * 2,
        "last token",
    ]
    assert window(5, 12, 4) == (3, 4, 5, 6)
    assert window(0, 12, 4) == (0, 1)
    assert window(11, 12, 3) == (10, 11)
    assert window(3, 12, 1) == (3,)


def test_the_layer_of_the_largest_effect_is_edited():
    subject = made("llama")
    case = EditCase(subject, {}, edits=[ILVA, CARTH])
    with torch.no_grad():
        subject.model.model.layers[0].mlp.down_proj.weight.mul_(0)
        subject.model.model.layers[2].mlp.down_proj.weight.mul_(0)
        subject.model.model.layers[1].mlp.down_proj.weight.mul_(5)
    found = effects(case)
    assert found[[0, 2]].tolist() == pytest.approx([0, 0], abs=1e-6)
    best = 1 if found[1] > 0 else 0
    assert layer_of(case, "trace") == int(found.argmax()) == best
    assert case.summary["trace"]["effects"][1] == pytest.approx(found[1], abs=1e-4)
    assert span_of(case, (0, 1), (0.13, 0.25)) == (0, 1)
    case.memory[f"effects {['a', 'b']}"] = np.array([0.0, 0.3, 0.4])
    assert span_of(case, "trace", (0, 1)) == (1, 2)
    assert span_of(case, "trace", (0.13, 0.25)) == (1, 2)
    with pytest.raises(RequestError, match="no edit names a subject"):
        layer_of(EditCase(subject, {}, edits=[EditRow("a", "where", "Tivin")]), "trace")


def test_mistakes_are_named():
    subject = made("llama")
    with pytest.raises(RowError, match="a: tracing needs a subject"):
        locate(subject, EditRow("a", "where", "", ground_truth=("Tivin",)))
    fact = locate(subject, ILVA)
    with pytest.raises(ParameterError, match="there is no layer 3 to restore, expected 0 to 2"):
        corrupted(subject, fact).restored([Site("block", (3,), (0,))])
    for settings in ({"noise": -1.0}, {"draws": 0}, {"width": 4}):
        with pytest.raises(ParameterError, match="expected noise >= 0, draws >= 1 and width 1 to 3"):
            traced(subject, [fact], **settings)
    with pytest.raises(ParameterError, match="kinds is heads, expected some of block, mlp, attention"):
        traced(subject, [fact], kinds=["heads"])


def test_the_command_prints_shares_and_writes_values_and_a_page(tmp_path, capsys):
    made("llama").save(tmp_path / "model")
    rows = [
        {"prompt": "where was Ilva born in", "subject": "Ilva"},
        {"question": "where was Carth?", "answer": "nowhere", "entity": "Carth"},
    ]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    command = ["trace", str(tmp_path / "model"), str(facts), "--draws", "2", "--out", str(out), "--kind", "mlp"]
    assert cli.main(command) == cli.DONE
    printed = capsys.readouterr().out
    assert "last subject token" in printed
    assert "1 facts, 1 that the model does not state" in printed
    kept = json.loads((out / "trace.json").read_text())
    assert kept["left_out"] == ["facts/2"]
    (fact,) = kept["facts"]
    assert "".join(fact["tokens"]).split() == "Ilva born in".split()
    by_place = {one["place"]: one for one in kept["averages"]}
    last = by_place["last subject token"]
    row = fact["effects"]["mlp"][fact["tokens"].index(" Ilva") if " Ilva" in fact["tokens"] else 0]
    assert len(last["effects"]) == len(row) == 3
    assert last["shares"] == pytest.approx([e["value"] / (fact["clean"] - fact["corrupted"]) for e in last["effects"]])
    page = (out / "trace.html").read_text()
    assert page.count("<svg") == 2  # on average, and the fact
    assert not re.search(r"\bnan\b|https?:", page)
    assert cli.main([*command, "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["facts"][0]["prompt"] == rows[0]["prompt"]
    with pytest.raises(RowError, match="states none of 1 facts"):
        causal_trace.trace(tmp_path / "model", facts_of(tmp_path, rows[1]))


def facts_of(folder, row):
    path = folder / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_heat_map_is_full_at_1_and_has_another_colour_below_0():
    image = charts.heat(["a <b>"], [0, 1, 2, 3], [[0.25, -0.5, 3.0, float("nan")]], "words")
    assert re.findall(r'fill-opacity="([\d.]+)"', image) == ["0.250", "0.500", "1.000"]
    assert image.count("heat less") == 1
    assert "a &lt;b&gt;" in image
