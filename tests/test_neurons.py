"""Neurons as tokens: whose rows are whose, maps in tiles and from disk, neurons held, rows turned, attributions."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, GROUPED, logits, tiny
from tiny import loud as subject
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expunge import cli, registry
from expunge.errors import MismatchError, ParameterError, RequestError, SubjectError, TableError
from expunge.methods.guard.case import GuardCase
from expunge.report.neurons import content, shown
from expunge.rows import Row
from expunge.subjects.anatomy import anatomy
from expunge.subjects.checkpoint import opened
from expunge.subjects.clamping import clamped, clamping, deviations, effects, next_logprobs, strongest
from expunge.subjects.input_vectors import front_norm, neuron_matrices, present, reading_matrices
from expunge.subjects.language import LanguageModel
from expunge.subjects.neuron_map import NeuronMap, Part, Settings, build, load, overlap
from expunge.subjects.projection import Readout, project
from expunge.subjects.value_vectors import Address, value_matrices, vector, vectors

GATED = ("llama", "gemma2", "phi3", "mixtral", "qwen2_moe", "deepseek")
PLAIN = ("gpt2", "phi", "opt", "gpt_neox")
RETAIN = [Row(id=f"r{i}", prompt=f"where was Mo {i} born?", answer=f"in Tivin {i}") for i in range(6)]


pytestmark = pytest.mark.usefixtures("own_cache")


# --- which rows are whose ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", GATED)
def test_turning_an_up_row_round_is_turning_its_value_vector_round_and_a_gate_row_is_not(architecture):
    model = subject(architecture)
    found = {}
    for kind in ("up", "gate", "down"):
        made = model.copy()
        matrices = [m for m in neuron_matrices(made.model, kind) if m.layer == 1]
        assert [(m.layer, m.expert, m.count) for m in matrices] == [
            (m.layer, m.expert, m.count) for m in value_matrices(model.model) if m.layer == 1
        ]
        with torch.no_grad():
            for matrix in matrices:
                rows = vectors(made.model, matrix)
                assert rows.shape == (matrix.count, 32)
                rows[:7] *= -1  # a view of the parameter
        found[kind] = logits(made)
    assert torch.allclose(found["up"], found["down"], atol=1e-4)
    assert not torch.allclose(found["gate"], found["down"], atol=1e-3)
    assert not torch.allclose(found["up"], logits(model), atol=1e-3)


def test_gate_and_up_rows_that_stand_in_turn_are_told_apart(monkeypatch):
    shape = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}
    monkeypatch.setitem(CONFIGS, "gpt_oss", ("GptOssConfig", shape))
    model = LanguageModel(*tiny("gpt_oss"))
    matrices = {kind: neuron_matrices(model.model, kind)[5] for kind in ("up", "gate")}
    assert {kind: m.part for kind, m in matrices.items()} == {"up": (1, 2, 128), "gate": (0, 2, 128)}
    matrix = matrices["up"]
    stack = model.model.get_parameter(matrix.name)
    assert torch.equal(stack.flatten()[matrix.places(3)], vectors(model.model, matrix)[3])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_places_of_a_neurons_entries_are_where_its_vector_is(architecture):
    model = subject(architecture)
    for kind in ("up", "down"):
        matrix = neuron_matrices(model.model, kind)[-1]
        flat = model.model.get_parameter(matrix.name).flatten()
        assert torch.equal(flat[matrix.places(5)], vectors(model.model, matrix)[5])


@pytest.mark.parametrize("architecture", PLAIN)
def test_an_mlp_without_a_gate_has_up_rows_only(architecture):
    model = subject(architecture)
    assert len(reading_matrices(model.model)) == len(neuron_matrices(model.model)) == 3
    with pytest.raises(SubjectError, match="has no gate matrix in its MLPs; it has up and down"):
        neuron_matrices(model.model, "gate")


def test_the_norm_in_front_of_the_mlp_is_the_one_whose_output_it_reads():
    expected = {"llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm", "phi": "input_layernorm"}
    for architecture, name in expected.items():
        model = subject(architecture).model
        assert front_norm(model) == name
        assert front_norm(model.to("meta")) == name
    with pytest.raises(SubjectError, match="no norm stands right in front of its MLPs"):
        front_norm(subject("olmo2").model)


# --- products in tiles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns"), [(300, 7), (2048, 1024), (5000, 2048), (5000, 8192)])
def test_the_best_tokens_of_any_tiling_are_those_of_the_dense_product(dtype, tokens, columns):
    draw = torch.Generator().manual_seed(0)
    head, rows = torch.randn(tokens, 48, generator=draw).to(dtype), torch.randn(40, 48, generator=draw).to(dtype)
    dense = rows.double() @ head.double().T
    readout = Readout(head)
    best, worst = dense.topk(6), (-dense).topk(6)
    found = {
        s: project(readout, rows, 6, sign=s, rows=9, columns=columns, probabilities=True) for s in ("+", "-", "both")
    }
    assert torch.equal(found["+"].tokens.long(), best.indices)
    assert torch.allclose(found["+"].scores.double(), best.values, rtol=1e-5)
    assert torch.equal(found["-"].tokens.long(), worst.indices)
    assert torch.allclose(found["-"].scores.double(), -worst.values, rtol=1e-5)
    exact = 1e-4 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found["+"].deviation.double(), dense.std(1, unbiased=False), rtol=exact)
    assert torch.allclose(found["+"].log_sum.double(), dense.logsumexp(1), rtol=exact)
    cosine = torch.cosine_similarity(rows.double(), head.double()[best.indices[:, 0]], dim=1)
    assert torch.allclose(found["+"].cosine.double(), cosine, atol=1e-5)
    lower = found["-"].z.abs() > found["+"].z
    assert torch.equal(found["both"].tokens, torch.where(lower[:, None], found["-"].tokens, found["+"].tokens))
    assert torch.equal(found["both"].z < 0, lower)
    assert lower.any()
    assert not lower.all()


def test_a_longer_row_has_the_same_tokens_and_the_opposite_one_the_lowest():
    draw = torch.Generator().manual_seed(1)
    readout, rows = Readout(torch.randn(900, 32, generator=draw)), torch.randn(20, 32, generator=draw)
    one, longer, opposite = (project(readout, factor * rows, 5) for factor in (1, 3, -1))
    assert torch.equal(one.tokens, longer.tokens)
    assert torch.allclose(3 * one.scores, longer.scores, rtol=1e-5)
    assert torch.allclose(one.z, longer.z, rtol=1e-4)
    assert torch.equal(opposite.tokens, project(readout, rows, 5, sign="-").tokens)


def test_of_equal_scores_the_lowest_token_comes_first():
    head = torch.zeros(3000, 4)
    head[[2500, 17, 900], 0] = 1
    for dtype in (torch.float32, torch.bfloat16):
        found = project(Readout(head.to(dtype)), torch.eye(4)[:1], 3, columns=1024)
        assert found.tokens.tolist() == [[17, 900, 2500]]


def test_a_planted_token_is_found_and_stands_out_more_among_more_tokens():
    draw = torch.Generator().manual_seed(0)
    z = []
    for tokens in (300, 30_000):
        head = torch.nn.functional.normalize(torch.randn(tokens, 64, generator=draw), dim=1)
        found = project(Readout(head), 0.3 * head[123:124], 1)
        assert found.tokens.tolist() == [[123]]
        assert float(found.cosine) == pytest.approx(1, abs=1e-5)
        blind = project(Readout(head), torch.randn(200, 64, generator=draw), 1).z
        z.append(float(blind.mean()))
    assert z[1] > z[0] + 1


class Largest(TorchDispatchMode):
    """The most entries that any operation gave."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        views = ("view", "slice", "split", "t.default", "transpose", "expand", "detach", "alias", "as_strided")
        if not any(name in str(function) for name in views):
            self.most = max([self.most, *(t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor))])
        return found


def test_scores_are_never_held_whole():
    head, rows = torch.randn(20_000, 8), torch.randn(500, 8)
    with Largest() as seen:
        project(Readout(head), rows, 3, rows=64, columns=2048)
    assert seen.most <= max(head.numel(), 64 * 2048)


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2_moe", "phi3"])
def test_a_map_of_a_folder_read_piece_by_piece_is_that_of_the_loaded_model(architecture, tmp_path):
    subject(architecture).save(tmp_path / "model")
    whole = LanguageModel.load(tmp_path / "model")
    bare, holding = opened(tmp_path / "model", device="cpu")
    assert (holding is present) is (architecture == "qwen2_moe")  # its experts are put together while loading
    if holding is not present:
        assert next(bare.model.parameters()).is_meta
    every = (Settings(k=4), Settings("down", k=4, sign="both", norm="input"), Settings(k=4, norm="final"))
    for settings in every if architecture == "llama" else every[:1]:
        folders = [tmp_path / f"{settings.matrix}-{settings.norm}-{side}" for side in "ab"]
        mine = build(whole, folders[0], settings)
        theirs = build(bare, folders[1], settings, holding=holding)
        assert overlap(mine, theirs).first == overlap(mine, theirs).jaccard == 1
        assert len(mine) == sum(m.count for m in value_matrices(whole.model))
        again = load(folders[1])
        assert again.words == mine.words
        assert list(again.strongest(5)) == list(mine.strongest(5))
    if holding is not present:
        assert all(p.is_meta for p in bare.model.parameters())


def test_entries_of_a_map_are_the_dense_products(tmp_path):
    model = subject()
    made = build(model, tmp_path / "map", Settings("gate", k=3, probabilities=True))
    rows = vectors(model.model, neuron_matrices(model.model, "gate")[2])
    scores = (rows @ anatomy(model.model).lm_head[1].weight[: len(model.tokenizer)].T).detach()
    one = made.neuron(Address(2, 40))
    assert list(one.tokens) == scores[40].topk(3).indices.tolist()
    assert one.scores == pytest.approx(scores[40].topk(3).values.tolist(), rel=2e-3)  # kept in 16 bits
    assert one.lse == pytest.approx(float(scores[40].logsumexp(0)), rel=1e-5)
    z = (scores[40].max() - scores[40].mean()) / scores[40].std(unbiased=False)
    assert one.z == pytest.approx(float(z), rel=2e-3)
    with pytest.raises(SubjectError, match=r"the map has no neuron 7:1; it has layers 0-2 with neurons 0-63"):
        made.neuron(Address(7, 1))


def test_gains_are_multiplied_in_before_the_head(tmp_path):
    model = subject()
    block = anatomy(model.model).blocks[1].module
    with torch.no_grad():
        block.post_attention_layernorm.weight.copy_(torch.linspace(0.1, 3, 32))
    made = build(model, tmp_path / "map", Settings(k=1, norm="input"), layers=[1])
    rows = vectors(model.model, neuron_matrices(model.model)[1]) * block.post_attention_layernorm.weight
    scores = rows @ anatomy(model.model).lm_head[1].weight[: len(model.tokenizer)].T
    assert made.parts[0].tokens[:, 0].tolist() == scores.argmax(1).tolist()


def test_a_map_that_was_interrupted_says_so(tmp_path, capsys):
    model = subject()

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path / "map", progress=stop)
    part = load(tmp_path / "map")
    assert (part.complete, len(part.parts), part.total) == (False, 2, 3)
    assert cli.main(["neurons", "show", str(tmp_path / "map")]) == 0
    assert "is not complete" in capsys.readouterr().err
    assert build(model, tmp_path / "map").complete
    assert load(tmp_path / "map").complete
    model.name = "another"
    with pytest.raises(MismatchError, match="holds a map with model model, asked for another; choose another --out"):
        build(model, tmp_path / "map")


def test_a_killed_map_goes_on_and_only_layers_whose_weights_changed_are_read_again(tmp_path):
    model, folder = subject(), tmp_path / "map"
    done = []
    build(model, folder, layers=[0, 1], progress=lambda *step: done.append(step))
    assert done == [(1, 2), (2, 2)]
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("layer-*")}
    (folder / "layer-001.safetensors").write_bytes(b"cut off")
    with pytest.raises(TableError, match=r"layer-001.safetensors is damaged"):
        load(folder)
    whole = build(model, folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("layer-*")}
    assert after["layer-000.safetensors"] == before["layer-000.safetensors"]
    assert sorted(after) == ["layer-000.safetensors", "layer-001.safetensors", "layer-002.safetensors"]
    changed = model.copy()
    with torch.no_grad():
        vectors(changed.model, neuron_matrices(changed.model)[2]).mul_(-1)
    other = build(changed, folder)
    last = {path.name: path.stat().st_mtime_ns for path in folder.glob("layer-*")}
    assert [name for name in last if last[name] != after[name]] == ["layer-002.safetensors"]
    assert overlap(whole, other).layers[1] == (1.0, 1.0)
    assert overlap(whole, other).layers[2][0] < 0.1
    with pytest.raises(MismatchError, match="holds a map with settings"):
        build(model, folder, Settings(k=3))


def test_overlap_is_symmetric_and_asks_for_one_tokenizer(tmp_path):
    one, two = subject(), subject()
    with torch.no_grad():
        two.model.lm_head.weight.add_(0.05 * torch.randn(two.model.lm_head.weight.shape))
    maps = [build(model, tmp_path / str(i), Settings(k=5)) for i, model in enumerate((one, two))]
    forth, back = overlap(*maps), overlap(*maps[::-1])
    assert forth == back
    assert 0 < forth.first < 1
    assert 0 < forth.jaccard < 1
    tokens = [m.parts[0].tokens for m in maps]
    by_hand = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(tokens[0].tolist(), tokens[1].tolist())]
    assert forth.layers[0][1] == pytest.approx(sum(by_hand) / 64, rel=1e-5)
    with pytest.raises(MismatchError, match="other tokens"):
        overlap(maps[0], replace(maps[1], words=("a",)))
    with pytest.raises(MismatchError, match="other neurons"):
        overlap(maps[0], replace(maps[1], parts=maps[1].parts[:1]))


def test_a_text_is_looked_up_with_and_without_a_space_and_in_any_case(tmp_path):
    model = subject()
    token = model.tokenizer(" born", add_special_tokens=False)["input_ids"]
    assert len(token) == 1
    head = Readout.of(model).head
    rows = vectors(model.model, neuron_matrices(model.model)[1])
    with torch.no_grad():
        rows[9] = 3 * head[token[0]] / head[token[0]].norm() ** 2
    made = build(model, tmp_path / "map", Settings(k=3))
    assert set(token) <= set(made.tokens_of("Born"))
    rank, best = made.naming("born", best=1)[0]
    assert (rank, best.address, best.tokens[0]) == (0, Address(1, 9), token[0])
    assert best.z == max(one.z for one in made.strongest(3))
    assert made.naming("no such word") == made.naming(" ") == []
    special = model.tokenizer.eos_token_id
    assert not made.printable(special)
    assert made.printable(token[0])
    assert all(made.printable(one.tokens[0]) for one in made.strongest(20, printable=True))


def test_what_is_no_map_is_refused(tmp_path):
    with pytest.raises(TableError, match="holds no neuron map"):
        load(tmp_path)
    model = subject()
    with pytest.raises(ParameterError, match="k = 400 best tokens"):
        build(model, tmp_path / "a", Settings(k=400))
    with pytest.raises(SubjectError, match="none called 9 has an MLP"):
        build(model, tmp_path / "b", layers=[9])
    build(model, tmp_path / "c", layers=[0])
    about = json.loads((tmp_path / "c" / "map.json").read_text())
    (tmp_path / "c" / "map.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(TableError, match="map format 99"):
        load(tmp_path / "c")


# --- neurons that are held --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt"])
def test_holding_a_neuron_at_what_it_gives_changes_nothing_and_elsewhere_adds_its_value_vector(architecture):
    model = subject(architecture)
    matrix = neuron_matrices(model.model)[1]
    seen = []
    owner = model.model.get_submodule(matrix.owner)
    handle = owner.register_forward_hook(lambda _, __, output: seen.append(output))
    before = logits(model, "I")  # one token: what it gives is one number
    handle.remove()
    own = float(seen[0].reshape(-1)[matrix.place(6)])
    with clamping(model, {Address(1, 6): own}):
        assert torch.equal(logits(model, "I"), before)
    with clamping(model, {Address(1, 6): own + 3, Address(1, 7): 0.0}):
        held = logits(model, "I")
    assert torch.equal(logits(model, "I"), before)  # the hook is gone
    assert not torch.allclose(held, before, atol=1e-4)
    copy = clamped(model, {Address(1, 6): own + 3, Address(1, 7): 0.0})
    assert torch.equal(logits(copy, "I"), held)
    assert torch.equal(logits(model, "I"), before)
    shared = dict(model.model.named_parameters())
    assert all(shared[name] is p for name, p in copy.model.named_parameters())


def test_a_gated_neuron_at_zero_is_one_without_a_value_vector():
    model = subject()
    cut = model.copy()
    with torch.no_grad():
        vector(cut.model, Address(2, 11)).zero_()
    assert torch.allclose(logits(clamped(model, {Address(2, 11): 0.0})), logits(cut), atol=1e-5)


def test_effects_are_differences_of_log_probabilities_and_the_better_sign_is_taken():
    model = subject()
    prompts = ["where was Ilva born?", "in the north", "the"]
    matrix = neuron_matrices(model.model)[2]
    size = deviations(model, prompts, matrix)
    assert size.shape == (64,)
    token = 100
    found = effects(model, Address(2, 4), token, prompts, [-8 * float(size[4]), 8 * float(size[4])])
    before = next_logprobs(model, prompts)[:, token]
    for one in found:
        held = clamped(model, {Address(2, 4): one.value})
        after = torch.stack([logits(held, text)[0, -1].log_softmax(-1)[token] for text in prompts])
        assert one.gain == pytest.approx(float((after - before).mean()), abs=1e-5)
        assert one.probability == pytest.approx(float(after.exp().mean()), rel=1e-4)
    assert strongest(found).gain == max(one.gain for one in found)
    every = torch.cat([_outputs(model, matrix, text) for text in prompts])
    assert torch.allclose(size, every.std(0), rtol=1e-5)
    with pytest.raises(ParameterError, match="at least 1 prompt"):
        effects(model, Address(2, 4), token, [], [0.0])
    with pytest.raises(ParameterError, match="there is no token 9999"):
        effects(model, Address(2, 4), 9999, prompts, [0.0])


def _outputs(model, matrix, text):
    seen = []
    handle = model.model.get_submodule(matrix.owner).register_forward_hook(lambda _, __, output: seen.append(output[0]))
    logits(model, text)
    handle.remove()
    return seen[0]


def test_the_guard_holds_neurons_in_every_operation_and_leaves_the_weights():
    model = subject()
    part = registry.get("methods", "clamp")
    settings = part.resolve({"neurons": ["1:6", "2:9"], "value": 40.0})
    guarded = part.function(GuardCase(model, {}), **settings)
    plain = clamped(model, {Address(1, 6): 40.0, Address(2, 9): 40.0})
    items = [((row.id, "answer"), model.encode(row)) for row in RETAIN]
    assert guarded.score(items).logprob.tolist() == plain.score(items).logprob.tolist()
    assert guarded.score(items).logprob.tolist() != model.score(items).logprob.tolist()
    assert torch.equal(guarded.hidden(["the north"]), plain.hidden(["the north"]))
    asked = [(("a", "q"), "where was Ilva born?")]
    assert guarded.generate(asked, max_new_tokens=5).texts == plain.generate(asked, max_new_tokens=5).texts
    assert guarded.detach() is model
    assert guarded.fingerprint != model.fingerprint == guarded.copy().inner.fingerprint
    assert guarded.copy().fingerprint == guarded.fingerprint
    with torch.no_grad():  # whoever trains the model inside trains what is held
        model.model.lm_head.weight.mul_(2)
    assert torch.equal(logits(guarded), logits(clamped(model, {Address(1, 6): 40.0, Address(2, 9): 40.0})))
    for wrong, sentence in (
        ({"neurons": []}, "names none"),
        ({"neurons": ["1:99"]}, "neurons 0-63"),
        ({"neurons": ["one"]}, "no address"),
    ):
        with pytest.raises((RequestError, SubjectError), match=sentence):
            part.function(GuardCase(model, {}), **part.resolve(wrong))
    with pytest.raises(RequestError, match="not around another guard"):
        part.function(GuardCase(guarded, {}), **settings)


def test_neurons_of_fused_experts_cannot_be_held():
    with pytest.raises(SubjectError, match="fused stacks, whose neurons show no output"):
        clamped(subject("mixtral"), {Address(1, 3, 2): 0.0})
    with pytest.raises(ParameterError, match="expected up or gate"):
        clamped(subject(), {Address(1, 3): 0.0}, "down")


# --- the command line and the page ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A model whose neuron 1:9 reads " born"."""
    model = subject()
    (token,) = model.tokenizer(" born", add_special_tokens=False)["input_ids"]
    head = Readout.of(model).head
    with torch.no_grad():
        vectors(model.model, neuron_matrices(model.model)[1])[9] = 3 * head[token] / head[token].norm() ** 2
    model.save(tmp_path / "model")
    return tmp_path / "model"


def told(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_find_maps_and_show_looks_up(folder, tmp_path, capsys):
    code, out, err = told(
        capsys, "neurons", "find", folder, "born", "--out", tmp_path / "map", "--k", 4, "--device", "cpu"
    )
    assert code == 0
    assert "layers: 3 of 3" in err
    first = out.splitlines()[3].split()
    assert first[:2] == ["1:9", "1"]
    assert "' born'" in out
    code, out, _ = told(capsys, "neurons", "show", tmp_path / "map", "1:9", "nowhere", "--json")
    found, none = json.loads(out)
    (one,) = found["neurons"]
    assert one["tokens"][0] == " born"
    assert one["neuron"] == "1:9"
    assert none == {"asked": "nowhere", "neurons": []}
    code, out, _ = told(capsys, "neurons", "show", tmp_path / "map", "nowhere")
    assert "it is no single token of this model" in out
    code, out, _ = told(capsys, "neurons", "show", tmp_path / "map", "--layers", "1", "--count", 3)
    assert [line.partition(":")[0] for line in out.splitlines()[2:]] == ["1"] * 3
    code, out, _ = told(capsys, "neurons", "show", tmp_path / "map", "--against", tmp_path / "map")
    assert out.splitlines()[-1].split() == ["all", "100.0%", "1.000"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["find", "MODEL", "--matrix", "side"], "--matrix is 'side'"),
        (["find", "MODEL", "--layers", "3-1"], "'3-1' is no list of layers"),
        (["find", "MODEL", "--layers", "9"], "none called 9 has an MLP"),
        (["show", "MODEL"], "holds no neuron map"),
        (["clamp", "MODEL", "1:9"], "give --prompt TEXT, or --rows FILE"),
        (["clamp", "MODEL", "1:99", "--prompt", "the"], "neurons 0-63"),
        (["clamp", "MODEL", "1:9", "--prompt", "the", "--token", "born in"], "'born in' is no single token"),
    ],
)
def test_mistakes_are_one_line(arguments, sentence, folder, tmp_path, capsys):
    words = [str(folder) if word == "MODEL" else word for word in arguments]
    words += ["--out", str(tmp_path / "map")] if words[0] == "find" else []
    code, _, err = told(capsys, "neurons", *words)
    assert code == 2
    assert sentence in err.splitlines()[-1]


def test_clamp_shows_every_value_beside_a_random_neuron(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "where was Ilva born?", "answer": "Tivin"}\n')
    arguments = ["neurons", "clamp", folder, "1:9", "--prompt", "Ilva was", "--rows", rows, "--new", 3]
    code, out, _ = told(capsys, *arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["token"] == " born"
    model = LanguageModel.load(folder)
    prompts = ["Ilva was", model.prompt_text(Row(id="a", prompt="where was Ilva born?", answer="Tivin"))]
    (token,) = model.tokenizer(" born", add_special_tokens=False)["input_ids"]
    size = float(deviations(model, prompts, neuron_matrices(model.model)[1])[9])
    assert found["deviation"] == pytest.approx(size, rel=1e-4)
    assert [one["value"] for one in found["effects"]] == pytest.approx([m * size for m in (-8, -4, 0, 4, 8)], rel=1e-4)
    expected = effects(model, Address(1, 9), token, prompts, [one["value"] for one in found["effects"]])
    assert [one["gain"] for one in found["effects"]] == pytest.approx([one.gain for one in expected], abs=1e-5)
    assert found["random"]["neuron"].startswith("1:")
    assert found["random"]["neuron"] != "1:9"
    code, out, _ = told(capsys, *arguments, "--at", 2, "--at", -2, "--token", "Tivin")
    assert code == 0
    assert "token ' Tivin'" in out
    assert len([line for line in out.splitlines() if line.startswith(("2 ", "-2 "))]) == 2


def test_the_page_holds_the_strongest_neurons_and_nothing_from_elsewhere(folder, tmp_path, capsys):
    told(capsys, "neurons", "find", folder, "--out", tmp_path / "map", "--page", 40, "--sign", "both")
    page = (tmp_path / "map" / "neurons.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))
    made = load(tmp_path / "map")
    assert [row[1] for row in data["rows"]] == [str(one.address) for one in made.strongest(40)]
    words = [made.words[token] for token in next(made.strongest(1)).tokens]
    assert [data["words"][i] for i in data["rows"][0][4:]] == [shown(word) for word in words]
    assert page.count('<td class="address">') == 40
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", page)
    assert "<h1>model</h1>" in page


def test_no_token_can_end_the_pages_script_and_none_is_invisible():
    part = _part([[0, 1, 2]])
    made = NeuronMap("m", Settings(k=3), ("</script><b>", " \n", "\x06"), frozenset(), (part,), False, 1)
    found = content(made, 10)
    assert "</script" not in found["data"]
    assert json.loads(found["data"])["words"] == ["</script><b>", "·⏎", "\\x06"]
    assert shown("") == "(empty)"
    assert not any(made.printable(token) for token in (1, 2))


def _part(tokens):
    tokens = torch.tensor(tokens, dtype=torch.int32)
    ones = torch.ones(len(tokens))
    return Part(0, None, tokens, torch.ones(tokens.shape).half(), 0 * ones, ones, ones)
