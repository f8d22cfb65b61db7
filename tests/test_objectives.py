"""Exact properties of the gradient objectives (specs: gradient-objectives, sections 3 and 9)."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny

from expunge import registry
from expunge.errors import MismatchError, ParameterError, RowError
from expunge.methods.optimise.head_projection_defense import outside
from expunge.methods.optimise.lens import per_answer
from expunge.methods.optimise.loop import Training, mean_loss
from expunge.methods.optimise.terms import Side, Step, divergence, dual, negative_log_likelihood
from expunge.methods.optimise.unlearn import set_up, unlearn
from expunge.rows import Row, Source, read_rows
from expunge.subjects.language import LanguageModel

V = 11
LENGTHS = (3, 1, 4)


def side(logits, target, lengths=LENGTHS, **constants):
    """A side whose head is the identity: its hidden states are the logits."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Side(
        logits, target, row, len(lengths), head=lambda h: h, frozen_head=lambda h: h, vocabulary=V, constants=constants
    )


@pytest.fixture
def case(monkeypatch):
    # The product keeps log-probabilities in fp32; the identities are checked in double precision.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    logits = torch.randn(tokens, V, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(V, (tokens,), generator=generator)
    reference = torch.randn(tokens, V, generator=generator, dtype=torch.float64)
    return logits, target, reference


def gradient(name, logits, sides, **settings):
    part = registry.get("methods", name)
    loss = part.function(Step(sides, 0, 1), **part.resolve(settings))
    (found,) = torch.autograd.grad(loss, logits)
    return loss, found


def likelihood_gradient(logits, target, weight):
    """d/dz of sum_T w l: w (onehot - p)."""
    p = logits.detach().softmax(-1)
    onehot = torch.nn.functional.one_hot(target, V).double()
    return weight[:, None] * (onehot - p)


def reference_tokens(reference, target):
    return reference.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def test_gradient_ascent_pushes_every_answer_token_down_alike(case):
    logits, target, _ = case
    _, found = gradient("gradient_ascent", logits, {"forget": side(logits, target)})
    weight = torch.full((len(target),), 1 / len(target), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_npo_weights_rows_by_how_likely_they_still_are(case):
    logits, target, reference = case
    beta = 0.7
    forget = side(logits, target, reference_tokens=reference_tokens(reference, target))
    _, found = gradient("npo", logits, {"forget": forget}, beta=beta, retain="none")
    s, ref = forget.logprob.detach(), forget.reference
    rows = 2 * torch.exp(beta * s) / (torch.exp(beta * s) + torch.exp(beta * ref))
    weight = rows[forget.row] / len(LENGTHS)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_npo_at_the_start_has_weight_one_and_value_two_over_beta_log_two(case):
    logits, target, _ = case
    forget = side(logits, target, reference_tokens=reference_tokens(logits.detach(), target))
    loss, found = gradient("npo", logits, {"forget": forget}, beta=0.1, retain="none")
    weight = torch.full((len(target),), 1 / len(LENGTHS), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)
    assert float(loss) == pytest.approx(2 / 0.1 * math.log(2), abs=1e-12)


def test_npo_with_tiny_beta_is_gradient_ascent_on_row_sums(case):
    logits, target, reference = case
    forget = side(logits, target, reference_tokens=reference_tokens(reference, target))
    _, found = gradient("npo", logits, {"forget": forget}, beta=1e-6, retain="none")
    weight = torch.full((len(target),), 1 / len(LENGTHS), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), rtol=1e-5)


def test_simnpo_divides_by_scored_tokens(case):
    logits, target, _ = case
    beta, margin = 2.5, 0.3
    forget = side(logits, target)
    _, found = gradient("simnpo", logits, {"forget": forget}, beta=beta, margin=margin, retain="none")
    n = forget.length.double()
    m = torch.exp(forget.logprob.detach() / n + margin)
    rows = 2 / n * m**beta / (1 + m**beta)
    weight = rows[forget.row] / len(LENGTHS)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_idk_pulls_towards_the_alternative_and_leaves_the_answer_alone(case):
    logits, target, _ = case
    _, found = gradient("idk", logits, {"alternative": side(logits, target)}, retain="none")
    weight = torch.full((len(target),), -1 / len(target), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "altpo"])
def test_preferences_move_answer_and_alternative_in_opposite_directions(case, name):
    logits, target, reference = case
    other = torch.randn_like(logits, requires_grad=True)
    wanted = torch.randint(V, (len(target),), generator=torch.Generator().manual_seed(1))
    sides = {
        "forget": side(logits, target, reference_tokens=reference_tokens(reference, target)),
        "alternative": side(other, wanted, reference_tokens=reference_tokens(reference, wanted)),
    }
    part = registry.get("methods", name)
    beta = 0.3
    loss = part.function(Step(sides, 0, 1), **part.resolve({"beta": beta, "retain": "none"}))
    down, up = torch.autograd.grad(loss, [logits, other])
    a = (sides["alternative"].logprob - sides["alternative"].reference).detach()
    f = (sides["forget"].logprob - sides["forget"].reference).detach()
    rows = 2 * torch.sigmoid(-beta * (a - f)) / len(LENGTHS)
    assert torch.allclose(down, likelihood_gradient(logits, target, rows[sides["forget"].row]), atol=1e-12)
    assert torch.allclose(up, likelihood_gradient(other, wanted, -rows[sides["alternative"].row]), atol=1e-12)


def test_kl_retain_term_has_gradient_p_minus_reference(case):
    logits, target, reference = case
    kept = side(logits, target, reference_hidden=reference)
    (found,) = torch.autograd.grad(divergence(kept), logits)
    expected = (logits.detach().softmax(-1) - reference.softmax(-1)) / len(target)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["grad_diff", "kl_minimisation"])
def test_gradient_difference_and_kl_minimisation_push_down_on_one_side_and_hold_the_other(case, name):
    logits, target, reference = case
    other = torch.randn_like(logits, requires_grad=True)
    sides = {"forget": side(logits, target), "retain": side(other, target.flip(0), reference_hidden=reference)}
    part = registry.get("methods", name)
    loss = part.function(Step(sides, 0, 1), **part.resolve({"retain_weight": 0.6}))
    down, held = torch.autograd.grad(loss, [logits, other])
    even = torch.full((len(target),), 1 / len(target), dtype=torch.float64)
    assert torch.allclose(down, likelihood_gradient(logits, target, even), rtol=0, atol=1e-12)
    wanted = likelihood_gradient(other, target.flip(0), -0.6 * even)
    if name == "kl_minimisation":
        wanted = 0.6 * (other.detach().softmax(-1) - reference.softmax(-1)) / len(target)
    assert torch.allclose(held, wanted, rtol=0, atol=1e-12)


SHAPES = ["token_npo", "wga", "satimp", "ceu", "undial", "ihl", "pdu"]
PLAIN = ["gradient_ascent", "npo", "simnpo", "dpo", "idk", "altpo", *SHAPES]


@pytest.mark.parametrize("name", PLAIN)
def test_a_constant_added_to_all_logits_of_a_position_changes_no_term(case, name):
    logits, target, reference = case
    shift = torch.randn(len(target), 1, dtype=torch.float64)

    def value(z):
        ref = reference_tokens(reference, target)
        constants = {"reference_tokens": ref, "reference_hidden": reference}
        sides = {which: side(z, target, **constants) for which in ("forget", "alternative", "retain")}
        part = registry.get("methods", name)
        settings = {"bound": 0.1} if name == "pdu" else {"retain": "kl"}
        return float(part.function(Step(sides, 0, 1), **part.resolve(settings)))

    assert value(logits.detach()) == pytest.approx(value(logits.detach() + shift), abs=1e-10)


def forgets(case):
    """A forget side with both kinds of reference."""
    logits, target, reference = case
    return side(logits, target, reference_tokens=reference_tokens(reference, target), reference_hidden=reference)


def weight_of(name, p, p_ref):
    """(T,) the likelihood weight w of section 3, times the number of tokens."""
    if name == "token_npo":
        return 2 * p**0.7 / (p**0.7 + p_ref**0.7)
    return p**1.3 if name == "wga" else p**2.5 * (1 - p) ** 1.5


@pytest.mark.parametrize(
    ("name", "settings"),
    [("token_npo", {"beta": 0.7}), ("wga", {"beta": 1.3}), ("satimp", {"beta1": 2.5, "beta2": 1.5})],
)
def test_weighted_ascent_pushes_every_token_down_by_its_own_weight(case, name, settings):
    logits, target, reference = case
    _, found = gradient(name, logits, {"forget": forgets(case)}, **settings, retain="none")
    p = logits.detach().softmax(-1).gather(-1, target[:, None])[:, 0]
    weight = weight_of(name, p, reference_tokens(reference, target).exp()) / len(target)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("skip", "kept"), [(0, range(8)), (1, [1, 2, 3, 5, 6, 7]), (9, [2, 3, 7])])
def test_ceu_takes_probability_from_the_token_and_gives_it_to_the_others_in_proportion(case, skip, kept):
    logits, target, _ = case
    loss, found = gradient("ceu", logits, {"forget": side(logits, target)}, skip=skip, retain="none")
    p = logits.detach().softmax(-1)
    own = p.gather(-1, target[:, None])
    without = p.scatter(-1, target[:, None], 0.0) / (1 - own)
    expected = torch.zeros_like(found)
    expected[list(kept)] = ((-without * own).scatter(-1, target[:, None], own) / len(kept))[list(kept)]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert float(loss) == pytest.approx(float(-(without * p.log()).sum(-1)[list(kept)].mean()), abs=1e-12)


def certain(gap):
    """One answer token whose logit leads all others by `gap`, in fp32."""
    logits = torch.zeros(1, V)
    logits[0, 3] = gap
    return side(logits.requires_grad_(), torch.tensor([3]), (1,))


@pytest.mark.parametrize("gap", [20.0, 80.0, 500.0])
def test_ceu_has_full_strength_at_certainty_in_fp32(gap):
    forget = certain(gap)
    loss, found = gradient("ceu", forget.hidden, {"forget": forget}, skip=0, retain="none")
    assert torch.isfinite(loss)
    assert float(found[0, 3]) == pytest.approx(1.0, abs=1e-6)
    if gap < 85:
        assert torch.allclose(found[0, :3], torch.full((3,), -1 / (V - 1)), atol=1e-6)


def test_what_is_forgotten_already_is_let_go_and_only_ceu_pushes_on_what_is_certain():
    for name in ("wga", "satimp", "ceu", "ihl", "npo", "gradient_ascent"):
        sizes = {}
        for gap in (20.0, -20.0):
            forget = certain(gap)
            forget.constants["reference_tokens"] = torch.zeros(1)
            settings = {"skip": 0} if name == "ceu" else {"beta": 1.0} if name == "npo" else {}
            _, found = gradient(name, forget.hidden, {"forget": forget}, **settings, retain="none")
            sizes[gap] = float(found[0, 3].abs())
        assert sizes[20.0] == pytest.approx(1.0 if name == "ceu" else 0.0, abs=1e-6), name
        assert sizes[-20.0] == pytest.approx(1.0 if name == "gradient_ascent" else 0.0, abs=1e-6), name


@pytest.mark.parametrize("strength", [0.0, 3.0, 30.0])
def test_undial_pulls_to_the_start_models_logits_with_the_token_lowered(case, strength):
    logits, target, reference = case
    loss, found = gradient("undial", logits, {"forget": forgets(case)}, strength=strength)
    q = (reference - strength * torch.nn.functional.one_hot(target, V)).softmax(-1)
    p = logits.detach().softmax(-1)
    assert torch.allclose(found, (p - q) / len(target), rtol=0, atol=1e-12)
    assert float(loss) == pytest.approx(float(-(q * p.log()).sum(-1).mean()), abs=1e-12)


@pytest.mark.parametrize(("top", "temperature"), [(3, 1.0), (V, 1.0), (4, 2.0)])
def test_distil_pulls_to_the_teachers_top_tokens_and_leaves_the_others_among_themselves(case, top, temperature):
    logits, target, reference = case
    best = (reference / temperature).softmax(-1).topk(top, dim=-1)
    forget = side(logits, target, teacher=best.values, teacher_tokens=best.indices)
    _, found = gradient("distil", logits, {"forget": forget}, temperature=temperature, retain="none")
    p = logits.detach().softmax(-1)
    rest = p.scatter(1, best.indices, 0.0)
    q = (rest / rest.sum(1, keepdim=True).clamp_min(1e-12)) * (1 - best.values.sum(1, keepdim=True))
    q = q.scatter(1, best.indices, best.values)
    assert torch.allclose(found, temperature**2 * (p - q) / len(target), atol=1e-9)


def test_a_teacher_that_is_the_model_itself_without_context_changes_nothing_and_one_with_context_is_learned(tiny_world):
    subject = LanguageModel.load(tiny_world.original)
    rows = read_rows(Source(str(tiny_world.data("forget"))), "forget")[:8]

    def learned(context, steps):
        outcome = unlearn(
            subject,
            registry.get("methods", "distil"),
            {"context": context, "retain": "none"},
            scope="all",
            data={"forget": rows},
            training=Training(steps=steps, batch_size=4, learning_rate=1e-3, guard=None),
        )
        return outcome.summary["log"]

    still = learned("", 1)
    assert still["gradient_norm"][0] < 1e-5
    log = learned("Say nothing.", 12)
    assert log["gradient_norm"][0] > 1e-2
    assert log["loss"][-1] < 0.9 * log["loss"][0]


def test_a_teacher_with_another_tokenizer_is_refused(tiny_world, tmp_path):
    subject = LanguageModel(*tiny("llama"))
    subject.save(tmp_path / "teacher")
    world = LanguageModel.load(tiny_world.original)
    with pytest.raises(MismatchError, match="another tokenizer"):
        unlearn(
            world,
            registry.get("methods", "distil"),
            {"teacher": str(tmp_path / "teacher")},
            scope="all",
            data={"forget": people(["a"]), "retain": people(["b", "c"])},
            training=Training(steps=1, guard=None),
        )


def hinge_gradient(p, target):
    """Section 3 of LoKU's spec, entry by entry."""
    expected = torch.zeros_like(p)
    for i, t in enumerate(target.tolist()):
        m = max((v for v in range(V) if v != t), key=lambda v: p[i, v])
        for v in range(V):
            expected[i, v] = p[i, v] * (p[i, m] - p[i, t])
        expected[i, t] = p[i, t] * (1 - p[i, t] + p[i, m])
        expected[i, m] = p[i, m] * (p[i, m] - p[i, t] - 1)
    return expected


def test_ihl_lets_the_runner_up_take_the_tokens_place(case):
    logits, target, _ = case
    loss, found = gradient("ihl", logits, {"forget": side(logits, target)}, retain="none")
    p = logits.detach().softmax(-1)
    own = p.gather(-1, target[:, None])[:, 0]
    other = p.scatter(-1, target[:, None], -1.0).amax(-1)
    assert torch.allclose(found, hinge_gradient(p, target) / len(target), rtol=0, atol=1e-12)
    assert float(loss) == pytest.approx(float((1 + own - other).mean()), abs=1e-12)
    assert 0 <= float(loss) <= 2


def test_ihl_is_zero_where_the_runner_up_is_certain_one_at_uniform_and_two_where_the_token_is_certain():
    for gap, expected in ((500.0, 2.0), (0.0, 1.0)):
        forget = certain(gap)
        loss, _ = gradient("ihl", forget.hidden, {"forget": forget}, retain="none")
        assert float(loss) == pytest.approx(expected, abs=1e-6)
    forget = certain(500.0)
    forget.target = torch.tensor([4])
    loss, _ = gradient("ihl", forget.hidden, {"forget": forget}, retain="none")
    assert float(loss) == 0.0


def test_the_floor_of_ihl_drops_tokens_that_are_forgotten(case):
    logits, target, _ = case
    p = logits.detach().softmax(-1)
    own = p.gather(-1, target[:, None])[:, 0]
    other = p.scatter(-1, target[:, None], -1.0).amax(-1)
    kept = own >= 0.1 * other
    assert 0 < kept.sum() < len(target)
    loss, found = gradient("ihl", logits, {"forget": side(logits, target)}, floor=True, retain="none")
    expected = hinge_gradient(p, target) * kept[:, None] / kept.sum()
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert float(loss) == pytest.approx(float((1 + own - other)[kept].mean()), abs=1e-12)


def test_pdu_flattens_from_the_top(case):
    logits, target, _ = case
    sides = {"forget": side(logits, target), "retain": side(logits.detach(), target)}
    _, found = gradient("pdu", logits, sides, bound=1.0, forget_weight=0.5)
    z = logits.detach()
    top = torch.nn.functional.one_hot(z.argmax(-1), V).double() - 1 / V
    expected = 0.5 * 2 * (z.amax(-1) - z.mean(-1))[:, None] * top / len(target)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def multipliers(losses, *, epochs=None, **settings):
    """The multiplier after each step, and the weighted losses."""
    memory, after, values = {}, [], []
    for index, loss in enumerate(losses):
        step = Step({}, index, len(losses), epochs[index] if epochs else 0, memory=memory)
        values.append(float(dual(step, torch.tensor(loss), **settings)))
        after.append(memory["multiplier"])
    return after, values


def test_the_multiplier_rises_exactly_when_the_loss_is_above_the_bound_and_never_is_negative():
    losses = [0.125, 0.5, 0.25, 0.125, 0.0, 0.0, 0.0, 1.0]
    after, values = multipliers(losses, bound=0.25, start=1.0, rate=2.0)
    assert after == [0.75, 1.25, 1.25, 1.0, 0.5, 0.0, 0.0, 1.5]
    assert values == [0.125, 0.375, 0.3125, 0.15625, 0.0, 0.0, 0.0, 0.0]
    for before, now, loss in zip([1.0, *after], after, losses):
        assert now >= 0
        assert (now > before) == (loss > 0.25)


def test_a_multiplier_without_rate_or_within_its_warm_up_is_a_fixed_weight():
    after, values = multipliers([0.5, 0.1, 0.9], bound=0.3, start=7.0, rate=0.0)
    assert after == [7.0] * 3
    assert values == pytest.approx([3.5, 0.7, 6.3])
    after, _ = multipliers([0.5] * 4, epochs=[0, 1, 2, 3], bound=0.3, start=7.0, rate=1.0, warmup=2)
    assert after == pytest.approx([7.0, 7.0, 7.2, 7.4])


def test_the_multiplier_stands_still_for_the_gradient(case):
    logits, target, _ = case
    sides = {"forget": side(logits.detach(), target), "retain": side(logits, target)}
    _, found = gradient("pdu", logits, sides, bound=0.0, multiplier=3.0, rate=2.0, warmup=0.0)
    weight = torch.full((len(target),), -3.0 / len(target), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_the_order_of_rows_changes_nothing(case, name):
    logits, target, reference = case
    order = [4, 5, 6, 7, 3, 0, 1, 2]  # rows 2, 1, 0

    def value(z, t, ref, lengths):
        constants = {"reference_tokens": reference_tokens(ref, t), "reference_hidden": ref}
        sides = {which: side(z, t, lengths, **constants) for which in ("forget", "alternative", "retain")}
        part = registry.get("methods", name)
        return float(part.function(Step(sides, 0, 1), **part.resolve({"bound": 0.1} if name == "pdu" else {})))

    z = logits.detach()
    whole = value(z, target, reference, LENGTHS)
    assert whole == pytest.approx(value(z[order], target[order], reference[order], LENGTHS[::-1]), abs=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_change_no_objective(case, monkeypatch, name):
    from expunge.methods.optimise import terms

    logits, _, _ = case

    def both():
        sides = {"forget": forgets(case), "retain": forgets(case)}
        return gradient(name, logits, sides, **({"bound": 0.1} if name == "pdu" else {"retain": "nll"}))

    whole, gradient_whole = both()
    monkeypatch.setattr(terms, "LOGIT_ELEMENTS", 3 * V)
    parts, gradient_parts = both()
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)
    assert torch.allclose(gradient_whole, gradient_parts, rtol=0, atol=1e-12)


# --- what is prepared before training -------------------------------------------------------------------------------


def people(answers):
    return [
        Row(id=str(i), prompt=f"where was {i} born?", answer=f"Tivin {i}", perturbed_answers=tuple(wrong))
        for i, wrong in enumerate(answers)
    ]


def prepared(name, forget, training=None, retain=None, scope="all", **settings):
    return set_up(
        LanguageModel(*tiny("llama")),
        registry.get("methods", name),
        settings,
        scope=scope,
        data={"forget": forget, "retain": people([[]] * 3) if retain is None else retain},
        training=training or Training(epochs=3, batch_size=4, guard=None),
    )


def test_altpo_takes_the_next_alternative_in_every_epoch():
    setup = prepared("altpo", people([["Carth", "Ostra"], ["Lum"]]))
    subject, rows = setup.case.subject, setup.drawn.rows
    expected = [" Carth", " Lum", " Ostra", " Lum"]
    said = [subject.tokenizer.decode(row.ids[row.start :]).removesuffix("</s>") for row in rows["alternative"]]
    assert [text.strip() for text in said] == [text.strip() for text in expected]
    assert [sorted(step["alternative"]) for step in setup.drawn.steps] == [[0, 1], [2, 3], [0, 1]]


def test_altpo_reads_alternatives_from_a_file(tmp_path):
    path = tmp_path / "alternates.jsonl"
    line = {"question": "where was 0 born?", "answer": "Tivin 0"}
    path.write_text("\n".join(json.dumps(line | {"alternate": text}) for text in ("Carth", "Ostra")))
    setup = prepared("altpo", people([[]]), alternates=str(path))
    assert len(setup.drawn.rows["alternative"]) == 2
    with pytest.raises(RowError, match=r"row 1: .*has no alternate for 'where was 1 born\?'"):
        prepared("altpo", people([[], []]), alternates=str(path))
    with pytest.raises(RowError, match="row 0: no perturbed answers, but altpo needs"):
        prepared("altpo", people([[]]))
    with pytest.raises(RowError, match="row 0: its alternative 'Tivin 0' equals its answer"):
        prepared("altpo", people([["Carth", "Tivin 0"]]))


def test_altpo_has_the_model_write_other_answers(monkeypatch):
    texts = {0: ["Carth\nAnd so on", "Tivin 0", "Carth", " Ostra "], 1: ["Lum", "", "Lum", "Lum"]}
    asked = []

    def generate(subject, prompts, *, samples, temperature, seed, **_):
        asked.append(([text for _, text in prompts], samples, temperature, seed))
        return SimpleNamespace(texts=[texts[i] for i in range(len(prompts))])

    monkeypatch.setattr(LanguageModel, "generate", generate)
    setup = prepared("altpo", people([[], []]), write=4)
    subject, rows = setup.case.subject, setup.drawn.rows["alternative"]
    said = [subject.tokenizer.decode(row.ids[row.start :]).removesuffix("</s>").strip() for row in rows]
    assert said == ["Carth", "Lum", "Ostra", "Lum"]
    ((prompts, *settings),) = asked
    assert settings == [4, 1.0, 0]
    assert "where was 0 born?" in prompts[0]
    assert "Tivin 0" in prompts[0]
    assert setup.case.summary["alternates"] == {"0": ["Carth", "Ostra"], "1": ["Lum"]}
    texts[1] = ["", "Tivin 1", "", ""]
    with pytest.raises(RowError, match=r"row 1: .*wrote no other answer in 4 attempts"):
        prepared("altpo", people([[], []]), write=4)
    with pytest.raises(ParameterError, match="leave out one"):
        prepared("altpo", people([[]]), write=4, alternates="some.jsonl")


def test_a_model_writes_the_same_alternatives_again():
    first, again = (prepared("altpo", people([[], []]), write=3).drawn.rows["alternative"] for _ in range(2))
    assert [row.ids for row in first] == [row.ids for row in again]
    assert len(first) >= 2


def test_undial_moves_adapters_unless_a_scope_is_given():
    assert prepared("undial", people([[]]), scope=None).resolved.lora.r == 8
    assert prepared("undial", people([[]]), scope="all").resolved.lora is None


def test_loku_is_the_hinge_in_adapters_that_start_in_fisher_weighted_directions():
    setup = prepared("loku", people([[]]), scope=None)
    assert (setup.resolved.lora.r, setup.resolved.lora.alpha, setup.resolved.lora.init) == (16, 32, "fila")
    assert prepared("loku", people([[]]), scope="layers:1").resolved.lora is None
    assert prepared("ihl", people([[]]), scope=None).resolved.share == 1.0


def test_pdu_measures_its_bound_on_the_start_model_and_says_when_the_multiplier_never_moves():
    setup = prepared("pdu", people([[]] * 5), tolerance=0.5, warmup=1)
    subject = setup.case.subject
    rows = [subject.encode(row) for row in people([[]] * 3)]
    assert setup.chain[0][1]["bound"] == pytest.approx(1.5 * mean_loss(subject, rows), rel=1e-5)
    assert not setup.case.warnings
    setup = prepared("pdu", people([[]] * 5), bound=0.3)
    assert setup.chain[0][1]["bound"] == 0.3
    assert "the multiplier stays at 100: the run ends after 3 epochs" in setup.case.warnings[0]
    steps = Training(steps=11, batch_size=1, guard=None)
    assert not prepared("pdu", people([[]] * 2), training=steps, bound=0.3).case.warnings
    with pytest.raises(ParameterError, match="multiplier is -1"):
        prepared("pdu", people([[]]), multiplier=-1)


def test_pdu_updates_once_per_step_however_the_step_is_split():
    def run(micro_tokens):
        return unlearn(
            LanguageModel(*tiny("llama")),
            registry.get("methods", "pdu"),
            {"bound": 1.0, "multiplier": 2.0, "rate": 0.5, "warmup": 1, "forget_weight": 0.01},
            scope="all",
            data={"forget": people([[]] * 8), "retain": people([[]] * 8)},
            training=Training(epochs=3, batch_size=4, learning_rate=1e-3, guard=None, micro_tokens=micro_tokens),
        ).summary["log"]

    whole, split = run(16384), run(40)
    nll = whole["nll"]["retain"]
    assert len(nll) == 6
    assert whole["memory"]["multiplier"] == pytest.approx(2.0 + 0.5 * sum(value - 1.0 for value in nll[2:]), rel=1e-5)
    assert split["memory"]["multiplier"] == pytest.approx(whole["memory"]["multiplier"], rel=1e-4)


def test_pdu_is_refused_inside_other_methods_as_its_weight_is_its_own():
    with pytest.raises(ParameterError, match="objective 'pdu' cannot stand inside another method"):
        prepared("sharpness_aware", people([[]]), objective="pdu")


def test_chunks_of_the_vocabulary_axis_change_nothing(case, monkeypatch):
    from expunge.methods.optimise import terms

    logits, target, reference = case

    def both():
        kept = side(logits, target, reference_hidden=reference)
        loss = divergence(kept) + negative_log_likelihood(kept)
        return loss, torch.autograd.grad(loss, logits)[0]

    whole, gradient_whole = both()
    monkeypatch.setattr(terms, "LOGIT_ELEMENTS", 2 * V)
    parts, gradient_parts = both()
    assert torch.allclose(whole, parts, atol=1e-12)
    assert torch.allclose(gradient_whole, gradient_parts, atol=1e-12)


@pytest.mark.parametrize("kept", [1 << 26, 0])
def test_the_linear_head_has_the_gradients_of_autograd(monkeypatch, kept):
    from expunge.subjects import head

    monkeypatch.setattr(head, "KEEP_ELEMENTS", kept)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 3 * V)
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((8, 5), (V, 5), (V,)))
    target = torch.randint(V, (8,), generator=generator)
    scale = torch.randn(8, generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    ours = head.linear_logprob(hidden, weight, bias, target)
    expected = (hidden @ weight.T + bias).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ours, expected, atol=1e-6)
    found = torch.autograd.grad((ours * scale).sum(), inputs)
    wanted = torch.autograd.grad((expected * scale).sum(), inputs)
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=1e-5)
    frozen = torch.autograd.grad(head.linear_logprob(hidden, weight.detach(), None, target).sum(), hidden)
    assert frozen[0].shape == hidden.shape


def test_the_linear_heads_gradient_keeps_its_precision_where_the_target_is_nearly_certain():
    from expunge.subjects.head import linear_logprob

    weight = (4 * torch.randn(V, 5, generator=torch.Generator().manual_seed(4))).bfloat16()
    hidden = (1.2 * weight[:3]).requires_grad_()
    target = torch.arange(3)
    exact = hidden.detach().double().requires_grad_()
    wanted = (exact @ weight.double().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    assert float(wanted.detach().max()) > -1e-3  # one minus its probability is far below what 16 bits tell from 1
    (found,) = torch.autograd.grad(linear_logprob(hidden, weight, None, target).sum(), hidden)
    # Logits themselves are rounded to 16 bits: that leaves a few per cent of a small gradient, not its size.
    assert torch.allclose(found.double(), gradient, rtol=0.25, atol=float(gradient.abs().max()) * 0.1)


def test_aliases_are_configurations_of_one_objective():
    assert registry.get("methods", "grad_diff").resolve()["retain"] == "nll"
    assert registry.get("methods", "kl_minimisation").resolve()["retain"] == "kl"
    assert registry.get("methods", "grad_diff").function is registry.get("methods", "gradient_ascent").function


# --- deletion of facts (arXiv:2309.17410) ---------------------------------------------------------------------------


def test_fact_erasure_is_gradient_ascent_weighted_by_the_answers_probability(case):
    logits, target, _ = case
    forget = side(logits, target)
    p = (forget.logprob / forget.length).exp().detach()
    weight = (p / forget.length / len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    loss, found = gradient("fact_erasure", logits, {"forget": forget}, retain="none")
    assert torch.allclose(loss, p.mean())
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_the_defence_is_zero_exactly_between_the_kth_largest_and_the_kth_smallest():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(4, 1)
    y = torch.arange(4)
    assert outside(p, y, 1).tolist() == [0, 0, 0, 0]
    assert torch.allclose(outside(p, y, 2), torch.tensor([0.1, 0, 0, 0.1]))
    assert torch.allclose(outside(p, y, 3), torch.tensor([0.2, 0.1, 0.1, 0.2]))


def test_layers_are_read_at_the_first_answer_token_through_norm_and_head(case):
    logits, target, _ = case
    forget = side(logits, target)
    forget.layers = {0: logits, 2: 2 * logits}
    step = Step({"forget": forget}, 0, 1, given={"lens": [torch.nn.Identity()]})
    found = per_answer(step, lambda p, y: p.gather(1, y[:, None])[:, 0])
    firsts = [0, 3, 4]
    wanted = [(scale * logits).softmax(-1)[i, target[i]] for scale in (1, 2) for i in firsts]
    assert torch.allclose(found, torch.stack(wanted))


def test_entropy_is_greatest_where_every_token_is_as_likely_as_every_other(case):
    logits, target, _ = case
    losses = []
    for values in (torch.zeros_like(logits), logits):
        forget = side(values, target)
        forget.layers = {1: values}
        step = Step({"forget": forget}, 0, 1, given={"lens": []})
        losses.append(float(registry.get("methods", "max_entropy").function(step, retain="none")))
    assert losses[0] == pytest.approx(-math.log(V))
    assert losses[1] > losses[0]
