"""Every objective on every architecture: runs, stays in its scope, is deterministic, and is its delta."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge import registry
from expunge.deltas import Delta, undo
from expunge.errors import ParameterError, RequestError, RowError, ScopeError, SubjectError
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import refusals, unlearn
from expunge.rows import Row
from expunge.subjects.anatomy import structure
from expunge.subjects.language import LanguageModel, weights_fingerprint

METHODS = sorted(part.name for part in registry.serving("methods", "language") if part.card.kind == "optimise")


def rows(kind, count):
    return [
        Row(id=f"{kind}/{i}", prompt=f"where was {kind} {i} born?", answer=f"Tivin {i}", perturbed_answers=("Carth",))
        for i in range(count)
    ]


DATA = {"forget": rows("forget", 5), "retain": rows("retain", 12)}
SHORT = Training(steps=2, batch_size=4, learning_rate=1e-3)
ON_EXPERTS = {part.name for part in registry.parts("methods") if "routed_experts" in getattr(part.card, "requires", ())}
"""Methods for mixtures of experts; they choose their scope. Random experts are all used alike."""
ADAPTERS = {"gs_lora", "gs_lora_plus_plus"}
"""Methods that move adapters only, in the dense layers of MLPs; their scope is their own."""


def run(subject, method, *, scope="all", data=DATA, training=SHORT, folder=None, **settings):
    part = registry.get("methods", method)
    if method in ON_EXPERTS:
        scope, settings = None, {"contrast": 0.0, **settings}
    if method in ADAPTERS:
        scope = None
    return unlearn(subject, part, settings, scope=scope, data=data, training=training, folder=folder)


def suited(method):
    """A subject that the method can change."""
    return LanguageModel(*tiny("mixtral" if method in ON_EXPERTS else "llama"))


SCOPES = {"all": "all", "blocks": "layers:1-", "adapters": "lora(r=2, layers=1-)"}


def everything():
    """Every method on every architecture in every scope. Two thirds are slow: what is left has every pair of a method
    and an architecture once, and every method in every scope."""
    for m, method in enumerate(METHODS):
        for a, architecture in enumerate(ARCHITECTURES):
            for s, scope in enumerate(SCOPES):
                marks = () if (m + a) % 3 == s else pytest.mark.slow
                yield pytest.param(method, architecture, scope, id=f"{method}-{architecture}-{scope}", marks=marks)


@pytest.mark.parametrize(("method", "architecture", "scope"), everything())
def test_every_method_on_every_architecture_moves_its_scope_alone_repeats_by_seed_and_is_undone(
    method, architecture, scope
):
    subject = LanguageModel(*tiny(architecture))
    if method == "latent_adversarial" and subject.mode == "rows":
        with pytest.raises(SubjectError, match="takes no packed rows"):
            run(subject, method)
        return
    if method in ON_EXPERTS and not any(block.router for block in subject.blocks):
        with pytest.raises(SubjectError, match="needs routed experts"):
            run(subject, method)
        return
    if method in ADAPTERS and not structure(subject.model).roles["mlp_in"]:
        with pytest.raises(ScopeError, match="no linear layer of mlp"):
            run(subject, method)
        return
    if method == "salun" and scope == "adapters":
        with pytest.raises(ScopeError, match="not made of whole tensors"):
            run(subject, method, scope=SCOPES[scope])
        return
    before = weights_fingerprint(subject.model)
    outcome, again = (run(subject, method, scope=SCOPES[scope]) for _ in range(2))
    assert len(outcome.summary["log"]["loss"]) == 2
    assert weights_fingerprint(subject.model) == before

    resolved = outcome.setup.resolved
    adapted = {f"{target}.weight" for target in resolved.lora.targets} if resolved.lora else set()
    assert adapted or scope != "adapters" or method in ON_EXPERTS
    inside = {name for name, *_ in (*resolved.parameters, *resolved.slices)}
    assert set(outcome.delta.entries) <= inside | adapted
    # In the trained copy itself, whatever its delta says.
    base = dict(subject.model.named_parameters())
    for name, tensor in outcome.subject.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        assert ".lora_" in name or plain in inside | adapted or torch.equal(tensor, base[plain]), name

    assert same(outcome.delta, again.delta)
    after = outcome.delta.apply(subject)
    assert weights_fingerprint(after.model) != before
    assert undo(after) is subject
    back = outcome.delta.negate().apply(after, check=False)
    for name, tensor in back.model.named_parameters():
        assert torch.allclose(tensor, base[name], atol=1e-6), name


def same(first, second):
    """Whether two deltas are one bit for bit."""
    return first.entries.keys() == second.entries.keys() and all(
        torch.equal(tensor, second.entries[name][key])
        for name, entry in first.entries.items()
        for key, tensor in entry.items()
    )


@pytest.mark.parametrize("scope", ["layers:-1", "role:mlp_out@1", "role:lm_head", "layers:0-role:norm"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_everything_inside_the_scope_moves_and_nothing_outside(scope, architecture):
    from expunge.methods.optimise.scope import resolve

    subject = LanguageModel(*tiny(architecture))
    if architecture == "mixtral" and "mlp_out" in scope:
        scope = "role:experts@1"
    outcome = run(subject, "npo", scope=scope, training=Training(steps=3, batch_size=4, learning_rate=1e-3))
    inside = {name for name, _ in resolve(scope, subject.model).parameters}
    assert set(outcome.delta.entries) == inside


@pytest.mark.parametrize("modules", ["down_proj", "down_proj|up_proj"])
def test_adapters_beside_the_matrix_an_mlp_gives_out_through_start_at_it_and_learn_the_same(modules, monkeypatch):
    subject = LanguageModel(*tiny("llama"))
    training = Training(epochs=5, batch_size=4, learning_rate=1e-3, guard=None)
    with_prefix = run(subject, "gradient_ascent", scope=f"lora(r=2, modules={modules}, layers=1-)", training=training)
    # What moves earlier in the block needs the whole of it.
    assert with_prefix.entry == (1, modules == "down_proj")
    monkeypatch.setattr("expunge.methods.optimise.unlearn.entries", lambda *_, **__: None)
    without = run(subject, "gradient_ascent", scope=f"lora(r=2, modules={modules}, layers=1-)", training=training)
    assert without.entry is None
    losses = [outcome.summary["log"]["loss"] for outcome in (with_prefix, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-3)


def test_scope_none_changes_nothing():
    subject = LanguageModel(*tiny("llama"))
    outcome = run(subject, "npo", scope="none")
    assert outcome.delta.kind == "empty"
    assert outcome.summary["steps"] == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "falcon", "mixtral", "deepseek"])
def test_adapters_give_a_low_rank_delta_that_equals_the_adapted_model(architecture, tmp_path, monkeypatch):
    from expunge.methods.optimise import unlearn as module

    subject = LanguageModel(*tiny(architecture))
    before = weights_fingerprint(subject.model)
    adapted = []
    original = module._delta

    def recorded(base, working, *rest):
        adapted.append(working)
        return original(base, working, *rest)

    monkeypatch.setattr(module, "_delta", recorded)
    outcome = run(subject, "npo", scope="lora(r=2, layers=1-2)", training=Training(steps=4, learning_rate=1e-2))
    assert outcome.delta.kind == "low_rank"
    assert weights_fingerprint(subject.model) == before
    outcome.delta.save(tmp_path / "delta")
    after = Delta.load(tmp_path / "delta").apply(subject)
    items = [((row.id, "answer"), subject.encode(row)) for row in DATA["forget"]]
    scores = [model.score(items).logprob for model in (subject, adapted[0], after)]
    assert abs(scores[1] - scores[2]).max() < 1e-4
    assert abs(scores[0] - scores[2]).max() > 1e-3


def test_adapters_and_tensors_move_together():
    subject = LanguageModel(*tiny("llama"))
    outcome = run(subject, "npo", scope="lora(r=2, modules=mlp)+role:lm_head")
    assert outcome.delta.kind == "mixed"
    assert "difference" in outcome.delta.entries["lm_head.weight"]


def test_kl_keeps_a_frozen_head_when_the_head_moves():
    subject = LanguageModel(*tiny("llama"))
    outcome = run(subject, "kl_minimisation", scope="role:lm_head")
    assert list(outcome.delta.entries) == ["lm_head.weight"]
    # At the start the divergence is exactly zero: the loss is the forget term alone.
    forget = [subject.encode(row) for row in DATA["forget"]]
    table = subject.score([((str(i), "answer"), row) for i, row in enumerate(forget)])
    assert outcome.summary["log"]["loss"][0] == pytest.approx(float(table.logprob.mean()), abs=2.0)


def test_sixteen_bit_subjects_are_trained_through_masters():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model.to(torch.bfloat16), tokenizer)
    outcome = run(subject, "npo", training=Training(steps=5, batch_size=5, learning_rate=1e-4))
    assert outcome.delta.entries
    assert next(outcome.delta.apply(subject).model.parameters()).dtype == torch.bfloat16


def test_idk_with_the_answer_as_alternative_is_refused_by_name():
    subject = LanguageModel(*tiny("llama"))
    data = {**DATA, "forget": [Row(id="7", prompt="who?", answer="Carth", perturbed_answers=("Carth",))]}
    with pytest.raises(RowError, match=r"row 7: its alternative 'Carth' equals its answer"):
        run(subject, "idk", data=data, alternatives="perturbed")
    data = {**DATA, "forget": [Row(id="8", prompt="who?", answer="Carth")]}
    with pytest.raises(RowError, match="row 8: no perturbed answers"):
        run(subject, "dpo", data=data, alternatives="perturbed")


def test_missing_retain_rows_are_an_error_unless_no_retain_term_asks_for_them():
    subject = LanguageModel(*tiny("llama"))
    with pytest.raises(RequestError, match=r"request.data.retain: 0 rows, but npo\(retain='nll'\) needs at least 1"):
        run(subject, "npo", data={"forget": DATA["forget"], "retain": []})
    assert run(subject, "npo", data={"forget": DATA["forget"]}, retain="none").delta.entries


def test_an_empty_forget_set_changes_nothing():
    subject = LanguageModel(*tiny("llama"))
    outcome = run(subject, "npo", data={"forget": [], "retain": DATA["retain"]})
    assert outcome.delta.kind == "empty"


def test_parameters_are_checked_by_name_and_kind():
    subject = LanguageModel(*tiny("llama"))
    with pytest.raises(ParameterError, match=r"no parameter 'betta'\. Did you mean beta"):
        run(subject, "npo", betta=1)
    with pytest.raises(ParameterError, match="parameter beta = 'high'"):
        run(subject, "npo", beta="high")
    with pytest.raises(ParameterError, match="parameter retain = 'nil'"):
        run(subject, "npo", retain="nil")


def test_a_killed_run_goes_on_and_gives_the_same_delta(tmp_path, monkeypatch):
    from expunge.methods.optimise.loop import Turn

    subject = LanguageModel(*tiny("llama"))
    training = Training(steps=6, batch_size=4, learning_rate=1e-3, checkpoint_seconds=0.0)
    whole = run(subject, "npo", training=training)
    original, count = Turn.backward, []

    def dies(turn):
        if len(count) == 4:
            raise SystemExit
        count.append(1)
        return original(turn)

    monkeypatch.setattr(Turn, "backward", dies)
    with pytest.raises(SystemExit):
        run(subject, "npo", training=training, folder=tmp_path)
    monkeypatch.setattr(Turn, "backward", original)
    resumed = run(subject, "npo", training=training, folder=tmp_path)
    for name, entry in whole.delta.entries.items():
        assert torch.equal(entry["difference"], resumed.delta.entries[name]["difference"])


def test_an_epoch_passes_once_over_the_forget_rows_whatever_the_method_reads():
    for method in METHODS:
        outcome = run(suited(method), method, training=Training(epochs=2, batch_size=2, learning_rate=1e-4))
        # fine_tune and what is around it never see forget rows: an epoch is one pass over the retain rows nobody holds
        # out.
        assert outcome.summary["steps"] == (10 if method in ("fine_tune", "cf_k", "l1_sparse") else 6), method


def test_there_are_a_hundred_refusals():
    lines = refusals()
    assert len(lines) == len(set(lines)) == 100
    assert all(line.strip() == line and line.endswith(".") for line in lines)
