"""Experts that move alone: slices of fused tensors (specs: uoe 7 and 9, wgt-scopes 9)."""

import copy

import pytest
import torch
from tiny import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from expunge import registry
from expunge.deltas import Delta, compose
from expunge.errors import MismatchError, ScopeError
from expunge.methods.optimise.loop import Training, Turn
from expunge.methods.optimise.scope import resolve
from expunge.methods.optimise.slices import changes, put, take
from expunge.methods.optimise.unlearn import unlearn
from expunge.plan import estimate
from expunge.rows import Row
from expunge.subjects.language import LanguageModel, weights_fingerprint

FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek")
IDS = torch.arange(60).view(3, 20)


def working(model, scope):
    """A copy that shares what does not move, its scope, and its parameters that move."""
    found = resolve(scope, model)
    moving = {name for name, _ in found.parameters}
    made = copy.deepcopy(model, {id(p): p for name, p in model.named_parameters() if name not in moving})
    made.requires_grad_(False)
    leaves = take(made, found.slices)
    return made, found, [*(made.get_parameter(name).requires_grad_(True) for name in moving), *leaves]


def loss(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def owner(found):
    return found.slices[0][0].rpartition(".")[0]


class Lists(nn.Module):
    """Experts as a list of modules, as models had them."""

    def __init__(self, width, inner, count):
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        kind = lambda: nn.ModuleDict({"w1": nn.Linear(width, inner), "w2": nn.Linear(inner, width)})  # noqa: E731
        self.experts = nn.ModuleList(kind() for _ in range(count))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        each = [expert["w2"](expert["w1"](x).relu()) for expert in self.experts]
        return (torch.stack(each, -1) * weights[..., None, :]).sum(-1)


class Sorted(nn.Module):
    """Fused experts that are called with tokens alone (Llama 4): all of them see every token."""

    def __init__(self, width, inner, count):
        super().__init__()
        self.num_experts = count
        self.up = nn.Parameter(0.1 * torch.randn(count, width, inner))
        self.down = nn.Parameter(0.1 * torch.randn(count, inner, width))

    def forward(self, x):
        return torch.einsum("...h,ehi,eik->...ek", x, self.up, self.down)


class Mixture(nn.Module):
    def __init__(self, width, inner, count):
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = Sorted(width, inner, count)

    def forward(self, x):
        return (self.experts(x) * self.router(x).softmax(-1)[..., None]).sum(-2)


def replaced(kind):
    model, _ = tiny("llama")
    torch.manual_seed(1)
    for layer in model.model.layers[1:]:
        layer.mlp = kind(32, 16, 4)
    return model


# --- the scope -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FUSED)
def test_one_expert_and_its_router(architecture):
    model, _ = tiny(architecture)
    found = resolve("expert(layer=1, index=3)", model)
    config = model.config
    inner = config.intermediate_size if architecture == "mixtral" else config.moe_intermediate_size
    h = config.hidden_size
    assert found.slices == [
        ("model.layers.1.mlp.experts.gate_up_proj", (3,), (1, 2 * inner, h)),
        ("model.layers.1.mlp.experts.down_proj", (3,), (1, h, inner)),
    ]
    assert found.parameters == [("model.layers.1.mlp.gate.weight", (4, h))]
    assert found.trainable == 3 * h * inner + 4 * h
    assert (found.first_layer, found.last_layer) == (1, 1)
    assert found.json()["resolved"][-1] == ["model.layers.1.mlp.experts.down_proj", [1, h, inner], [3]]
    assert not resolve("expert(layer=1, index=3, router=false)", model).parameters


def test_several_experts_are_joined_and_taken_away():
    model, _ = tiny("mixtral")
    places = lambda scope: {name.split(".", 2)[2]: at for name, at, _ in resolve(scope, model).slices}  # noqa: E731
    up, down = "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"
    assert places("expert(layer=1, index=2|0)") == {up: (0, 2), down: (0, 2)}
    assert places({"expert": {"layer": 1, "index": [0, 2]}}) == {up: (0, 2), down: (0, 2)}
    assert places("expert(layer=1, index=0)+expert(layer=1, index=2)") == {up: (0, 2), down: (0, 2)}
    assert places("expert(layer=1, index=0|1)-expert(layer=1, index=1)") == {up: (0,), down: (0,)}
    assert places("role:experts@1-expert(layer=1, index=1)") == {up: (0, 2, 3), down: (0, 2, 3)}
    everything = resolve("expert(layer=1, index=0|1|2|3)", model)
    assert everything.slices == []
    assert everything.parameters == resolve("role:experts@1+role:router@1", model).parameters
    assert len(resolve("expert(layer=-2-, index=0)", model).slices) == 4


def test_experts_that_are_modules_move_whole():
    model = replaced(Lists)
    found = resolve("expert(layer=2, index=1)", model)
    assert [name for name, _ in found.parameters] == [
        "model.layers.2.mlp.gate.weight",
        *(f"model.layers.2.mlp.experts.1.{w}.{kind}" for w in ("w1", "w2") for kind in ("weight", "bias")),
    ]
    assert found.slices == []


@pytest.mark.parametrize(
    ("scope", "architecture", "match"),
    [
        ("expert(layer=1, index=0)", "llama", "LlamaForCausalLM is dense"),
        ("expert(layer=1, index=4)", "mixtral", "no expert '4'; layer 1 has 0-3"),
        ("expert(layer=1, index=x)", "mixtral", "no expert 'x'"),
        ("expert(layer=0, index=1)", "deepseek", "layer 0 has no experts; layers with experts: 1-2"),
        ("expert(layer=7, index=1)", "mixtral", "not within 0-2"),
        ("expert(layer=1)", "mixtral", "not understood"),
        ("expert(layer=1, index=1, router=maybe)", "mixtral", "not understood"),
        ("expert(layer=1, idx=1)", "mixtral", "Did you mean index"),
    ],
)
def test_mistakes_are_named(scope, architecture, match):
    with pytest.raises(ScopeError, match=match):
        resolve(scope, tiny(architecture)[0])


# --- gradients -------------------------------------------------------------------------------------------------------


def check_gradients(model, scope, tolerance=1e-6):
    made, found, parameters = working(model, scope)
    whole = copy.deepcopy(model).requires_grad_(True)
    value = loss(made)
    assert torch.allclose(value, loss(whole), atol=1e-6)
    value.backward()
    loss(whole).backward()
    leaves = iter(parameters[len(found.parameters) :])
    for name, places, _ in found.slices:
        full = whole.get_parameter(name).grad
        for place in places:
            assert (next(leaves).grad - full[place]).abs().max() <= tolerance * max(1, float(full.abs().max()))
    for name, _ in found.parameters:
        assert torch.allclose(made.get_parameter(name).grad, whole.get_parameter(name).grad, atol=1e-6)
    assert all(p.grad is None for name, p in made.named_parameters() if name not in dict(found.parameters))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", FUSED)
def test_gradients_equal_the_slice_of_the_whole_gradient(architecture, implementation):
    model, _ = tiny(architecture)
    model.set_experts_implementation(implementation)
    check_gradients(model, "expert(layer=1, index=1|3)+expert(layer=2, index=0, router=false)")


def test_gradients_where_experts_have_biases_and_another_layout():
    import transformers

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
    )
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    made = copy.deepcopy(whole).requires_grad_(False)
    names = [name for name, _ in made.named_parameters() if name.startswith("model.layers.1.mlp.experts.")]
    assert len(names) == 4
    leaves = take(made, [(name, (2,), (1,)) for name in names])
    loss(made).backward()
    loss(whole).backward()
    for name, leaf in zip(names, leaves):
        assert leaf.grad.any()
        assert torch.allclose(leaf.grad, whole.get_parameter(name).grad[2], atol=1e-6)


def test_gradients_where_experts_are_called_in_another_way():
    check_gradients(replaced(Mixture), "expert(layer=1, index=1|2)")


def test_an_expert_that_no_token_chose_gets_zeros():
    made, _, leaves = working(tiny("mixtral")[0], "expert(layer=1, index=3, router=false)")
    experts = made.model.layers[1].mlp.experts
    experts(torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)).sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made that is no view of a parameter."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.own:
                self.found = max(self.found, tensor.numel())
        return made


@pytest.mark.parametrize("architecture", FUSED)
def test_no_tensor_of_the_size_of_all_experts_is_made(architecture):
    ids = IDS[:1, :2]

    def largest(model):
        with Largest(model) as watch:
            model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        return watch.found

    model, _ = tiny(architecture)
    model.set_experts_implementation("grouped_mm")
    made, found, _ = working(model, "expert(layer=1, index=1)")
    fused = made.get_parameter(found.slices[0][0])
    assert largest(made) < fused.numel()
    fused.requires_grad_(True)
    put(made)
    assert largest(made) >= fused.numel()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FUSED)
def test_five_steps_move_the_slices_and_nothing_else(architecture):
    model, _ = tiny(architecture)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made, found, parameters = working(model, "expert(layer=1, index=1|3)")
    assert sum(p.numel() for p in parameters) == found.trainable
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        loss(made).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert sum(s["exp_avg"].numel() for s in optimiser.state.values()) == found.trainable
    trained = float(loss(made).detach())
    with torch.no_grad():
        assert abs(float(loss(made)) - trained) < 1e-5
    put(made)
    assert abs(float(loss(made).detach()) - trained) < 1e-5
    assert type(made.get_submodule(owner(found))) is type(model.get_submodule(owner(found)))
    moving = {name: list(places) for name, places, _ in found.slices}
    for name, p in made.named_parameters():
        assert torch.equal(model.get_parameter(name), before[name])
        if name in moving:
            rest = [i for i in range(4) if i not in moving[name]]
            assert torch.equal(p[rest], before[name][rest])
            assert all(not torch.equal(p[i], before[name][i]) for i in moving[name])
        else:
            assert torch.equal(p, before[name]) == (name not in dict(found.parameters))


def test_slices_equal_a_masked_gradient_under_sgd():
    model, _ = tiny("mixtral")
    made, found, parameters = working(model, "expert(layer=1, index=2)")
    whole = copy.deepcopy(model).requires_grad_(True)
    moving = {
        **{name: list(places) for name, places, _ in found.slices},
        **{n: slice(None) for n, _ in found.parameters},
    }
    for _ in range(5):
        loss(made).backward()
        loss(whole).backward()
        with torch.no_grad():
            for p in parameters:
                p -= 0.5 * p.grad
                p.grad = None
            for name, places in moving.items():
                whole.get_parameter(name)[places] -= 0.5 * whole.get_parameter(name).grad[places]
        whole.zero_grad()
    for name, p in made.named_parameters():
        assert torch.allclose(p, whole.get_parameter(name), atol=1e-6)


def test_a_copy_made_in_training_is_an_ordinary_model():
    model, _ = tiny("mixtral")
    made, found, parameters = working(model, "expert(layer=1, index=2)")
    with torch.no_grad():
        parameters[-1].add_(0.5)
    other = copy.deepcopy(made)
    name = found.slices[-1][0]
    assert torch.equal(other.get_parameter(name), made.get_parameter(name))
    other.requires_grad_(True)
    loss(other).backward()
    assert other.get_parameter(name).grad.any()
    assert other.state_dict().keys() == model.state_dict().keys()


def test_training_resumes_from_a_checkpoint_of_slices(tmp_path):
    from expunge.files import save_tensors

    _, _, parameters = working(tiny("mixtral")[0], "expert(layer=1, index=1|3)")
    save_tensors({str(i): p.detach().contiguous() for i, p in enumerate(parameters)}, tmp_path / "t.safetensors")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(stored[str(i)], p) for i, p in enumerate(parameters))


DATA = {
    side: [Row(id=f"{side}/{i}", prompt=f"where was {side} {i} born?", answer=f"Tivin {i}") for i in range(count)]
    for side, count in (("forget", 5), ("retain", 12))
}
SHORT = Training(steps=3, batch_size=4, learning_rate=1e-2)


def unlearned(subject, scope, training=SHORT, folder=None, **changes):
    part = registry.get("methods", "npo")
    return unlearn(subject, part, {}, scope=scope, data=DATA, training=training, folder=folder, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FUSED)
def test_a_run_in_the_scope_of_an_expert_moves_it_and_its_router_only(architecture, dtype):
    model, tokenizer = tiny(architecture)
    subject = LanguageModel(model.to(dtype), tokenizer)
    before = weights_fingerprint(model)
    seen = []
    outcome = unlearned(
        subject, "expert(layer=1, index=1|3)", evaluate_at=[3], evaluate=lambda m, _: seen.append(logits(m))
    )
    assert weights_fingerprint(model) == before
    assert outcome.summary["scope"]["trainable"] == outcome.delta.cost()["parameters"]
    assert {name: entry.get("slice", torch.tensor([])).tolist() for name, entry in outcome.delta.entries.items()} == {
        "model.layers.1.mlp.experts.gate_up_proj": [1, 3],
        "model.layers.1.mlp.experts.down_proj": [1, 3],
        "model.layers.1.mlp.gate.weight": [],
    }
    for entry in outcome.delta.entries.values():
        assert all(part.any() for part in entry["difference"])
    after = outcome.delta.apply(subject)
    assert (logits(after) - logits(subject)).abs().max() > 1e-3
    assert torch.allclose(logits(after), seen[0], atol=1e-5)
    assert torch.equal(logits(outcome.subject), seen[0])
    for name, module in subject.model.named_modules():
        assert type(outcome.subject.model.get_submodule(name)) is type(module)


@torch.no_grad()
def logits(subject):
    return subject.model(input_ids=IDS, use_cache=False).logits.float()


def test_a_killed_run_in_the_scope_of_an_expert_gives_the_same_delta(tmp_path, monkeypatch):
    subject = LanguageModel(*tiny("mixtral"))
    training = Training(steps=6, batch_size=4, learning_rate=1e-3, checkpoint_seconds=0.0)
    scope = "expert(layer=1, index=1)+layers:2"
    whole = unlearned(subject, scope, training)
    original, count = Turn.backward, []

    def dies(turn):
        if len(count) == 4:
            raise SystemExit
        count.append(1)
        return original(turn)

    monkeypatch.setattr(Turn, "backward", dies)
    with pytest.raises(SystemExit):
        unlearned(subject, scope, training, tmp_path)
    monkeypatch.setattr(Turn, "backward", original)
    resumed = unlearned(subject, scope, training, tmp_path)
    assert resumed.delta.kind == "mixed"
    for name, entry in whole.delta.entries.items():
        assert torch.equal(entry["difference"], resumed.delta.entries[name]["difference"])


def test_the_plan_counts_one_expert():
    subject, part = LanguageModel(*tiny("mixtral")), registry.get("methods", "npo")
    one, every = (
        estimate(subject, part, {}, scope=scope, data=DATA, training=SHORT)
        for scope in ("expert(layer=1, index=1)", "role:experts@1+role:router@1")
    )
    h, inner, count = 32, 64, 4
    assert one["parameters"]["trainable"] == 3 * h * inner + count * h
    assert one["memory"]["optimiser"] == 8 * one["parameters"]["trainable"]
    assert one["memory"]["gradients"] == 4 * one["parameters"]["trainable"]
    assert one["memory"]["weights"] == every["memory"]["weights"]  # the fused tensors are copied
    assert one["flops"]["steps"] < every["flops"]["steps"]


# --- deltas ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    base = LanguageModel(*tiny("mixtral"), name="base")
    made, found, parameters = working(base.model, "expert(layer=1, index=1|3, router=false)")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p += 1e-2 * torch.randn(p.shape, generator=generator)
    entries = changes(base.model, made, found.slices)
    put(made)
    return base, made, Delta(base.fingerprint, entries)


def test_the_file_holds_the_slices_only(trained, tmp_path):
    base, made, delta = trained
    assert delta.kind == "slice"
    count = 2 * 3 * 32 * 64
    assert delta.cost() == {"parameters": count, "bytes": 4 * count + 2 * 2 * 8}
    delta.save(tmp_path / "delta")
    assert (tmp_path / "delta" / "delta.safetensors").stat().st_size < 4 * count + 2048
    loaded = Delta.load(tmp_path / "delta").apply(base)
    for name, p in loaded.model.named_parameters():
        assert torch.equal(p, delta.apply(base).model.get_parameter(name))
        assert torch.allclose(p, made.get_parameter(name), atol=1e-7)
        if name in delta.entries:
            assert torch.equal(p[[0, 2]], base.model.get_parameter(name)[[0, 2]])
    assert delta.sparsified().kind == "slice"


def test_slices_are_negated_and_stacked(trained):
    base, made, delta = trained
    back = delta.negate().apply(delta.apply(base), check=False)
    name = next(iter(delta.entries))
    assert torch.allclose(back.model.get_parameter(name), base.model.get_parameter(name), atol=1e-7)
    shape = made.get_parameter(name).shape
    other = Delta(delta.base, {name: {"difference": torch.ones(2, *shape[1:]), "slice": torch.tensor([0, 3])}})
    dense = Delta(delta.base, {name: {"difference": torch.ones(shape)}})
    for second, kind in ((other, "slice"), (dense, "mixed")):
        stacked = compose([delta, second])
        assert stacked.kind == kind
        one_by_one = second.apply(delta.apply(base), check=False)
        found = stacked.apply(base).model.get_parameter(name)
        assert torch.allclose(found, one_by_one.model.get_parameter(name), atol=1e-6)


def test_a_slice_of_another_shape_is_refused(trained):
    base, _, delta = trained
    name = next(iter(delta.entries))
    for entry in (
        {"difference": torch.ones(1, 2, 2), "slice": torch.tensor([0])},
        {**delta.entries[name], "slice": torch.tensor([1, 9])},
    ):
        with pytest.raises(MismatchError, match="the delta's slice"):
            Delta(base.fingerprint, {name: entry}).apply(base)
