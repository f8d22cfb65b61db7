"""The baselines of image tables: exact relations between them, on pictures; that they run on text the matrix tests."""

import numpy as np
import pytest
import torch
from torch import nn

from expunge import registry
from expunge.errors import ParameterError, RequestError, SubjectError
from expunge.methods.edit.case import EditCase
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import set_up, unlearn
from expunge.pictures import chosen
from expunge.subjects.fresh import fresh
from expunge.subjects.image import ImageClassifier, Preparation
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, untrained

CLASSES = [str(i) for i in range(10)]
TRAINING = Training(epochs=3, batch_size=4, learning_rate=1e-3, guard=None)
SHORT = Training(steps=4, batch_size=4, learning_rate=1e-3, guard=None)


@pytest.fixture(scope="module")
def data():
    forget, retain = chosen(digits(8)["train"][:48], {"label": "3"})
    return {"forget": forget, "retain": retain}


@pytest.fixture(scope="module")
def subject():
    return untrained(CLASSES, Recipe(side=8, widths=(4, 8)), 0)


def run(subject, data, method, *, scope="all", training=TRAINING, **settings):
    return unlearn(subject, registry.get("methods", method), settings, scope=scope, data=data, training=training)


def differ(first, second):
    names = first.delta.entries.keys() | second.delta.entries.keys()
    zero = torch.zeros(())
    pairs = [[o.delta.entries.get(n, {"difference": zero})["difference"] for o in (first, second)] for n in names]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    "method", ["neggrad_plus", "random_label", "amnesiac", "bad_teacher", "scrub", "salun", "grad_diff", "npo"]
)
def test_every_baseline_runs_on_a_classifier(subject, data, method):
    outcome = run(subject, data, method)
    assert outcome.delta.entries
    assert np.isfinite(outcome.summary["log"]["loss"]).all()


def test_neggrad_plus_lies_between_fine_tuning_and_ascent(subject, data):
    alone = run(subject, data, "gradient_ascent")
    assert differ(alone, run(subject, data, "neggrad_plus", weight=0.0)) < 1e-5
    assert differ(alone, run(subject, data, "neggrad_plus", weight=0.5)) > 1e-4


def test_scrub_without_ascent_and_teacher_is_fine_tuning(subject, data):
    plain = run(subject, data, "scrub", ascent_epochs=0, alpha=0.0)
    assert differ(plain, run(subject, data, "neggrad_plus", weight=1.0)) < 1e-6
    assert differ(plain, run(subject, data, "scrub", ascent_epochs=3, alpha=0.0)) > 1e-4


def test_random_labels_never_hit_the_true_class_and_are_even(subject, data):
    many = {"forget": data["forget"] * 20, "retain": data["retain"]}
    setup = set_up(subject, registry.get("methods", "random_label"), {}, scope="all", data=many, training=TRAINING)
    drawn = torch.cat([row["wrong"] for row in setup.case.constants["forget"]]).flatten()
    counts = torch.bincount(drawn, minlength=10)
    assert counts[3] == 0
    expected = len(drawn) / 9
    assert all(abs(int(n) - expected) < 5 * expected**0.5 for i, n in enumerate(counts) if i != 3)
    setup = set_up(
        subject,
        registry.get("methods", "random_label"),
        {"include_true": True},
        scope="all",
        data=many,
        training=TRAINING,
    )
    assert 3 in torch.cat([row["wrong"] for row in setup.case.constants["forget"]])


def test_amnesiac_draws_once_and_random_label_every_epoch(subject, data):
    assert differ(run(subject, data, "amnesiac"), run(subject, data, "random_label", redraw=False)) == 0
    assert differ(run(subject, data, "amnesiac"), run(subject, data, "random_label")) > 0


def test_a_bad_teacher_that_is_the_start_model_teaches_nothing(data):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

    subject = ImageClassifier(make(), CLASSES, Preparation((8, 8)), "linear", make)
    outcome = run(subject, data, "bad_teacher", training=Training(steps=1, batch_size=4, guard=None))
    assert outcome.summary["log"]["loss"][0] == pytest.approx(0, abs=1e-6)
    assert outcome.summary["log"]["gradient_norm"][0] == pytest.approx(0, abs=1e-5)


def test_a_whole_mask_is_no_mask_and_half_a_mask_moves_half_of_the_weights(subject, data):
    assert differ(run(subject, data, "salun", share=1.0), run(subject, data, "random_label")) == 0
    outcome = run(subject, data, "salun", share=0.25)
    total = sum(p.numel() for p in subject.model.parameters())
    moved = sum(int((e["difference"] != 0).sum()) for e in outcome.delta.entries.values())
    assert 0 < moved <= int(0.25 * total)
    assert outcome.summary["prepared"]["mask"] == {"kept": int(0.25 * total), "of": total}
    with pytest.raises(ParameterError, match=r"weight_decay is 0\.1, expected 0"):
        run(subject, data, "salun", training=Training(steps=1, weight_decay=0.1))
    kept = run(subject, data, "salun", objective="fine_tune", share=0.25, training=SHORT)
    assert kept.summary["prepared"]["mask"]["kept"] == int(0.25 * total)
    other = run(subject, data, "salun", objective={"gradient_ascent": {"retain": "nll"}}, share=0.25)
    assert differ(outcome, other) > 0


def test_an_l1_penalty_of_nothing_is_its_objective_and_its_pull_fades(subject, data):
    plain = run(subject, data, "fine_tune", training=SHORT)
    assert differ(plain, run(subject, data, "l1_sparse", training=SHORT, strength=0.0)) == 0
    sizes = {}
    for share in (0.0, 0.5):
        outcome = run(subject, data, "l1_sparse", training=SHORT, strength=1.0, plain=share)
        sizes[share] = sum(float(p.detach().abs().sum()) for p in outcome.subject.model.parameters())
    before = sum(float(p.detach().abs().sum()) for p in subject.model.parameters())
    assert sizes[0.0] < before
    assert sizes[0.0] < sizes[0.5]
    around = run(subject, data, "l1_sparse", training=SHORT, objective={"gradient_ascent": {"retain": "nll"}})
    assert differ(around, run(subject, data, "grad_diff", training=SHORT)) > 0


def test_the_pull_of_an_l1_penalty_by_hand():
    from types import SimpleNamespace

    from expunge.methods.optimise.l1_sparse import l1_sparse

    first, second = nn.Parameter(torch.tensor([2.0, -3.0, 0.0])), nn.Parameter(torch.tensor([-1.0]))
    turn = SimpleNamespace(backward=lambda: torch.tensor(7.0), index=1, total=4, parameters=[first, second])
    first.grad = torch.ones(3)
    assert float(l1_sparse(turn, strength=0.4, plain=0.5)) == 7.0
    # A quarter of the steps is half of the penalised half: 0.4 (1 - 0.25 / 0.5) = 0.2
    assert torch.allclose(first.grad, torch.tensor([1.2, 0.8, 1.0]))
    assert torch.allclose(second.grad, torch.tensor([-0.2]))
    first.grad, turn.index = None, 2
    l1_sparse(turn, strength=0.4, plain=0.5)
    assert first.grad is None


def test_cf_k_moves_the_last_blocks_alone(subject, data):
    outcome = run(subject, data, "cf_k", scope=None, training=SHORT)
    assert set(outcome.delta.entries) == {
        n for n, _ in subject.model.named_parameters() if "stages.1" in n or n.startswith("classifier")
    }
    two = run(subject, data, "fine_tune", scope=None, training=SHORT, blocks=2)
    assert any("stages.0" in name for name in two.delta.entries)
    assert not any("embedder" in name for name in two.delta.entries)
    assert differ(run(subject, data, "cf_k", training=SHORT), run(subject, data, "fine_tune", training=SHORT)) == 0
    with pytest.raises(SubjectError, match="has 2 blocks, there are no last 3"):
        run(subject, data, "cf_k", scope=None, training=SHORT, blocks=3)


def test_last_blocks_alone_are_a_scope(subject, data):
    outcome = run(subject, data, "fine_tune", scope="layers:-1 + role:head")
    assert {name.split(".")[0] for name in outcome.delta.entries} == {"resnet", "classifier"}
    assert not [name for name in outcome.delta.entries if "stages.0" in name or "embedder" in name]


# --- edits and retraining ---------------------------------------------------------------------------------------------


def edit(subject, data, method, **settings):
    part = registry.get("methods", method)
    case = EditCase(subject, data, Training(seed=0))
    return part.function(case, **part.resolve(settings)), case


def test_fisher_noise_is_nothing_at_scale_zero_and_smaller_where_weights_matter(subject, data):
    few = {"forget": data["forget"][:2], "retain": data["retain"][:8]}
    assert not edit(subject, few, "fisher_forgetting", alpha=0.0)[0].entries
    from expunge.methods.edit.fisher_forgetting import deviation

    importance = torch.logspace(-12, 2, 50)
    found = deviation(importance, 1e-6)
    assert (found[1:] <= found[:-1]).all()
    first, second = (edit(subject, few, "fisher_forgetting")[0] for _ in range(2))
    assert first.entries.keys() == {name for name, _ in subject.model.named_parameters()}
    assert all(torch.equal(first.entries[n]["difference"], second.entries[n]["difference"]) for n in first.entries)


def test_retraining_starts_anew_and_is_decided_by_its_seed(subject, data):
    first, case = edit(subject, data, "retrain", epochs=2.0, batch_size=16)
    second, _ = edit(subject, data, "retrain", epochs=2.0, batch_size=16)
    assert [n for n in first.entries if "running_mean" in n]
    assert all(torch.equal(first.entries[n]["difference"], second.entries[n]["difference"]) for n in first.entries)
    assert case.summary["retrain"]["rows"] == len(data["retain"])
    more, _ = edit(subject, {**data, "forget": []}, "retrain", epochs=2.0, batch_size=16)
    assert all(torch.equal(first.entries[n]["difference"], more.entries[n]["difference"]) for n in first.entries)


def test_eu_k_keeps_what_stands_below_bit_for_bit_and_begins_anew_above(subject, data):
    first, case = edit(subject, data, "eu_k", epochs=1.0, batch_size=16)
    second, _ = edit(subject, data, "eu_k", epochs=1.0, batch_size=16)
    assert all(torch.equal(e["difference"], second.entries[n]["difference"]) for n, e in first.entries.items())
    assert case.summary["eu_k"]["modules"] == ["resnet.encoder.stages.1", "classifier.1"]
    assert not [n for n in first.entries if not n.startswith(("resnet.encoder.stages.1.", "classifier."))]
    assert [n for n in first.entries if "stages.1" in n and "running_mean" in n]
    still, _ = edit(subject, data, "eu_k", epochs=1.0, batch_size=16, learning_rate=1e-12)
    made, anew = still.apply(subject).model, fresh(subject, 0).model
    for name in ("resnet.encoder.stages.1", "classifier.1"):
        pairs = zip(made.get_submodule(name).parameters(), anew.get_submodule(name).parameters())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


class Stack(nn.Module):
    """Nothing stands below its blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(192, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks[1](self.blocks[0](x.flatten(1)).tanh()).tanh())


def test_eu_k_of_a_model_that_is_all_above_is_retraining(data):
    torch.manual_seed(5)
    net = ImageClassifier(Stack(), CLASSES, Preparation((8, 8)), "net", Stack)
    first, _ = edit(net, data, "eu_k", blocks=2, epochs=2.0, batch_size=16)
    second, _ = edit(net, data, "retrain", epochs=2.0, batch_size=16)
    assert first.entries.keys() == second.entries.keys()
    assert all(torch.equal(e["difference"], second.entries[n]["difference"]) for n, e in first.entries.items())


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", ["model.layers.2", "model.norm", "lm_head"]),
        ("gpt2", ["transformer.h.2", "transformer.ln_f"]),  # its head is the embedding
        ("opt", ["model.decoder.layers.2", "model.decoder.final_layer_norm", "model.decoder.project_out"]),
    ],
)
def test_what_stands_above_a_decoders_last_blocks(architecture, expected):
    from tiny import tiny

    from expunge.subjects.anatomy import top

    model, _ = tiny(architecture)
    assert top(model, 1) == expected


def test_without_restriction_training_is_plain_training_and_with_it_gradients_shrink(subject, data):
    plain, _ = edit(subject, data, "retrain", epochs=2.0, batch_size=16)
    same, _ = edit(subject, data, "retrain", epochs=2.0, batch_size=16, restriction=0.0)
    other, _ = edit(subject, data, "retrain", epochs=2.0, batch_size=16, restriction=0.1)
    assert all(torch.equal(e["difference"], same.entries[n]["difference"]) for n, e in plain.entries.items())
    assert not all(torch.equal(e["difference"], other.entries[n]["difference"]) for n, e in plain.entries.items())


def test_the_gradient_of_the_restriction_is_its_finite_difference(data):
    from types import SimpleNamespace

    from expunge.methods.optimise.curvature import mean_gradient
    from expunge.methods.optimise.importance import flowing
    from expunge.methods.optimise.restriction import restricted

    torch.manual_seed(0)
    net = ImageClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 10)).double(),
        CLASSES,
        Preparation((8, 8)),
        "net",
    )
    rows = [net.encode(row) for row in data["retain"][:6]]
    names = [name for name, _ in net.model.named_parameters()]
    parameters = list(net.model.parameters())
    recipe = SimpleNamespace(sides=("rows",))
    turn = SimpleNamespace(subject=net, parameters=parameters, recipe=recipe, rows=lambda sides: rows)

    def penalty():
        return sum(float(g.norm()) for g in mean_gradient(net, rows, names))

    with flowing(net.model, parameters):
        restricted(turn, 0.3)
    found = {name: p.grad.clone() for name, p in net.model.named_parameters()}
    net.model.zero_grad()
    plain = dict(zip(names, mean_gradient(net, rows, names)))
    for name, place in (("1.weight", (2, 90)), ("1.bias", (1,)), ("3.weight", (7, 3)), ("3.bias", (0,))):
        parameter = net.model.get_parameter(name)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * 1e-3
            sides.append(penalty())
            with torch.no_grad():
                parameter[place] -= sign * 1e-3
        expected = float(plain[name][place]) + 0.3 * (sides[0] - sides[1]) / 2e-3
        assert float(found[name][place]) == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_scrub_is_rewound_to_the_epoch_that_errs_as_on_holdout_rows(subject, data, monkeypatch):
    from expunge.methods.edit import scrub_r as file
    from expunge.methods.edit.case import Known

    # Accuracies after steps 2, 4 and 5 on forget rows, then on holdout rows.
    said = iter([0.9, 0.5, 0.1, 0.4])
    monkeypatch.setattr(file, "knows", lambda model, rows: Known(0.0, next(said)))
    training = Training(steps=5, batch_size=4, learning_rate=1e-3)
    sets = {"forget": data["retain"][:8], "retain": data["retain"][8:], "holdout": data["forget"]}
    part = registry.get("methods", "scrub_r")
    case = EditCase(subject, sets, training)
    delta = part.function(case, **part.resolve({}))
    about = case.summary["scrub_r"]
    assert about["steps"] == [2, 4, 5]
    assert about["errors"] == pytest.approx([0.1, 0.5, 0.9])
    assert (about["holdout_error"], about["chosen_step"]) == (pytest.approx(0.6), 4)
    four = run(subject, sets, "scrub", training=Training(steps=4, batch_size=4, learning_rate=1e-3, guard=None))
    assert delta.entries.keys() == four.delta.entries.keys()
    for name, entry in four.delta.entries.items():
        assert torch.allclose(delta.entries[name]["difference"], entry["difference"], atol=1e-7)
    with pytest.raises(RequestError, match=r"request.data.holdout: 0 rows, but scrub_r rewinds"):
        edit(subject, data, "scrub_r")


def test_unsir_makes_noise_that_errs_and_leaves_the_start_model_alone(subject, data):
    from expunge.subjects.image import weights_fingerprint

    before = weights_fingerprint(subject.model)
    delta, case = edit(subject, data, "unsir", copies=1, pictures=4, noise_steps=6, learning_rate=1e-3)
    assert case.summary["noise"]["last"] < case.summary["noise"]["first"]
    assert case.summary["noise"]["class"] == "3"
    assert weights_fingerprint(subject.model) == before
    assert delta.entries
    assert not [name for name in delta.entries if "running" in name]
    mixed = {"forget": [*data["forget"], data["retain"][0]], "retain": data["retain"]}
    with pytest.raises(RequestError, match="unsir needs a class request"):
        edit(subject, mixed, "unsir")


def test_methods_of_another_modality_are_refused_by_name(subject, data):
    with pytest.raises(RequestError, match="idk is for language models, resnet, seed 0 is of modality image"):
        run(subject, data, "idk")


def test_language_models_are_retrained_and_noised_by_the_same_methods():
    from tiny import tiny

    from expunge.rows import Row
    from expunge.subjects.language import LanguageModel

    language = LanguageModel(*tiny("llama"))
    rows = [Row(id=str(i), prompt=f"where was {i} born?", answer=f"Tivin {i}") for i in range(8)]
    sets = {"forget": rows[:2], "retain": rows[2:]}
    retrained, _ = edit(language, sets, "retrain", epochs=2.0, batch_size=3)
    assert len(retrained.entries) > len(list(language.model.parameters())) // 2
    above, _ = edit(language, sets, "eu_k", epochs=2.0, batch_size=3)
    assert {n.split(".")[2] if "layers" in n else n for n in above.entries} == {
        "2",
        "model.norm.weight",
        "lm_head.weight",
    }
    rewound, case = edit(language, {**sets, "holdout": rows[4:]}, "scrub_r")
    assert rewound.entries
    assert len(case.summary["scrub_r"]["errors"]) == 5
    restricted, _ = edit(language, sets, "retrain", epochs=1.0, batch_size=3, restriction=0.1)
    assert restricted.entries
    noised, _ = edit(language, sets, "fisher_forgetting", alpha=1e-9)
    assert noised.apply(language).fingerprint != language.fingerprint
