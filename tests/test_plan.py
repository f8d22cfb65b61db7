"""What a plan says is what a run needs: FLOPs by torch's counter, bytes by what autograd and the optimiser hold."""

import collections
import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from tiny import ARCHITECTURES, CONFIGS, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from expunge import registry
from expunge.arithmetic import achieved, fed
from expunge.attacks.case import Case, carry_out
from expunge.costs import STAGES, Pass, kept, structure
from expunge.methods.optimise import loop
from expunge.methods.optimise.loop import Guard, Training
from expunge.methods.optimise.scope import resolve
from expunge.methods.optimise.unlearn import unlearn
from expunge.metrics.measure import more_tables
from expunge.plan import estimate, passes
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded, pack
from expunge.tables.passes import Store, ask_all, longest_answer


def counting() -> FlopCounterMode:
    """torch's counter, with the one operation of ours that it does not know."""
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **__: 2 * a[0] * a[1] * b[1]}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def people(count: int) -> dict[str, list[Row]]:
    return {
        side: [
            Row(id=f"{side}{i}", prompt=f"where was {side} {i} born?", answer=f"in Tivin {7 * i} of Carth")
            for i in range(many)
        ]
        for side, many in (("forget", count), ("retain", 3 * count))
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_of_a_pass_are_those_of_the_counter(architecture: str) -> None:
    model, _ = tiny(architecture)
    if getattr(model.config, "num_experts_per_tok", None):
        model.set_experts_implementation("eager")  # the counter knows no products over groups of experts
    model.set_attn_implementation("eager")
    shape = structure(model, resolve("all", model))
    once = Pass(40, 40 * 40, (40,), 40)
    with counting() as forward:
        logits = model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits
    with counting() as backward:
        logits.float().sum().backward()
    assert shape.forward(once) == pytest.approx(forward.get_total_flops(), rel=0.005)
    # Ours counts five products of attention, as fused kernels do; eager attention has four.
    assert shape.backward(once) == pytest.approx(backward.get_total_flops(), rel=0.06)


@pytest.mark.parametrize(
    ("architecture", "method", "scope"),
    [
        ("llama", "npo", "all"),
        ("llama", "grad_diff", "role:mlp_out@1"),
        ("llama", "npo", "lora(r=4)"),
        ("llama", "kl_minimisation", "layers:-1-"),
        ("llama", "idk", "role:lm_head"),
        ("gpt2", "dpo", "role:attention_qkv@1-2"),
        ("gemma2", "simnpo", "lora(r=2, modules=attention, layers=1-2)"),
        ("mixtral", "npo", "expert(layer=1, index=2)"),
        ("mixtral", "uoe", None),
        ("llama", "rmu", None),
        ("gpt2", "circuit_breaker", None),
        ("llama", "undial", "all"),
        ("llama", "sam", "all"),
        ("qwen3", "latent_adversarial", "layers:1-"),
    ],
)
def test_flops_of_a_run_are_those_of_the_counter(architecture: str, method: str, scope: str | None) -> None:
    model, tokenizer = tiny(architecture)
    if architecture == "mixtral":
        model.set_experts_implementation("eager")  # the counter knows no products over groups of experts
    subject = LanguageModel(model, tokenizer)
    assert all((subject.mode, subject.fingerprint, subject.plain or True))  # not part of what is counted
    part, training, data = registry.get("methods", method), Training(epochs=2, batch_size=8), people(12)
    settings = {"contrast": 0.0} if method == "uoe" else {}
    planned = estimate(subject, part, settings, scope=scope, data=data, training=training)
    with counting() as counted, sdpa_kernel(SDPBackend.MATH):
        outcome = unlearn(subject, part, settings, scope=scope, data=data, training=training)
    assert planned["tokens"]["steps"] == outcome.summary["steps"]
    assert planned["flops"]["total"] == pytest.approx(counted.get_total_flops(), rel=0.06)
    assert planned["parameters"]["trainable"] == outcome.summary["scope"]["trainable"]


def test_what_steps_reach_is_their_arithmetic_over_the_time_they_took() -> None:
    model, tokenizer = tiny("llama")
    subject, part, data = LanguageModel(model, tokenizer), registry.get("methods", "npo"), people(12)
    training = Training(steps=6, batch_size=4, learning_rate=1e-4, guard=Guard(every=2))
    outcome = unlearn(subject, part, {}, scope="all", data=data, training=training)
    assert list(outcome.step_seconds) == [2, 3, 4, 5, 6]
    assert all(0 < seconds < 60 for seconds in outcome.step_seconds.values())
    planned = estimate(subject, part, {}, scope="all", data=data, training=training)["flops"]
    found = achieved(subject, replace(outcome, step_seconds=dict.fromkeys(range(1, 7), 0.5)), training)
    assert found["flops"] == pytest.approx(planned["steps"])
    # The guard looked before the first step and after three of the six.
    assert 0.5 * sum(found["steps"].values()) == pytest.approx(planned["steps"] + 3 / 4 * planned["guard"])
    assert found["machine_share"] == pytest.approx(found["flop_per_second"] / found["machine_flop_per_second"])
    measured = achieved(subject, outcome, training)
    assert 0 < measured["machine_share"] < 1
    assert "flop_per_second" not in achieved(subject, replace(outcome, step_seconds={}), training)


@pytest.mark.parametrize("scope", ["layers:2", "role:mlp_out@2"])
def test_steps_that_start_at_a_stored_prefix_are_counted_from_there(scope: str) -> None:
    model, tokenizer = tiny("llama")
    subject, part, data = LanguageModel(model, tokenizer), registry.get("methods", "npo"), people(8)
    training = Training(epochs=4, batch_size=8, learning_rate=1e-4, guard=None)
    # Not part of what is counted.
    assert all((subject.mode, subject.can_enter, subject.can_enter_inside(2), subject.fingerprint))
    settings = {"retain": "none"}
    with counting() as counted, sdpa_kernel(SDPBackend.MATH):
        outcome = unlearn(subject, part, settings, scope=scope, data=data, training=training)
    assert outcome.entry == (2, "mlp_out" in scope)
    planned = estimate(subject, part, settings, scope=scope, data=data, training=training)["flops"]
    steps = achieved(subject, outcome, training)["flops"]
    assert steps < 0.8 * planned["steps"]
    entry = (2, STAGES["mlp_out"]) if "mlp_out" in scope else (2, 0)
    prefix = sum(2 * m.size for m in structure(model, resolve(scope, model)).matrices if m.at < entry)
    tokens = planned["needs"] + prefix * pack([subject.encode(row) for row in data["forget"]]).tokens
    assert steps + tokens == pytest.approx(counted.get_total_flops(), rel=0.08)


def test_a_step_too_large_for_one_pass_costs_one_more_forward_pass() -> None:
    model, tokenizer = tiny("llama")
    part, data = registry.get("methods", "grad_diff"), people(8)
    one, split = (
        estimate(LanguageModel(model, tokenizer), part, {}, scope="all", data=data, training=training)["flops"]["steps"]
        for training in (Training(steps=1, batch_size=8), Training(steps=1, batch_size=8, micro_tokens=100))
    )
    assert 1.2 < split / one < 4 / 3


def test_small_scopes_cost_less() -> None:
    model, tokenizer = tiny("llama")
    subject, part, data = LanguageModel(model, tokenizer), registry.get("methods", "npo"), people(8)
    costs = [
        estimate(subject, part, {}, scope=scope, data=data, training=Training(steps=2))
        for scope in ("all", "layers:1-", "role:mlp_out@2", "role:lm_head")
    ]
    for larger, smaller in pairwise(costs):
        assert smaller["flops"]["steps"] < larger["flops"]["steps"]
        assert smaller["memory"]["total"] < larger["memory"]["total"]
        assert smaller["memory"]["optimiser"] == 8 * smaller["parameters"]["trainable"]


def held_by_autograd(subject: LanguageModel, rows: list[Encoded]) -> int:
    """Bytes of distinct storages that a pass keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in subject.model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        subject.hidden_states(pack(rows))
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["all", "role:attention_out@1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral", "deepseek"])
def test_activations_are_within_three_fifths_of_what_autograd_keeps(architecture, scope, dtype) -> None:
    name, settings = CONFIGS[architecture]
    wide = {"hidden_size": 128, "n_embd": 128, "intermediate_size": 320, "moe_intermediate_size": 64, "head_dim": 32}
    settings = {key: wide.get(key, value) for key, value in settings.items()}
    torch.manual_seed(0)  # which experts are chosen changes what is kept
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).eval().to(dtype)
    subject = LanguageModel(model, tiny("llama")[1])
    resolved = resolve(scope, model)
    rows = [Encoded(tuple((7 * i + 3 * j) % 290 + 5 for j in range(50)), 25, 1, "") for i in range(8)]
    predicted = kept(subject, resolved, rows) * pack(rows).tokens
    model.requires_grad_(False)
    for parameter_name, _ in resolved.parameters:
        model.get_parameter(parameter_name).requires_grad_(True)
    assert 0.85 < predicted / held_by_autograd(subject, rows) < 1.6


def resident(what: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at the highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


SCOPES = ("all", "layers:-2-", "lora(r=8)")


def measure() -> None:
    """Run in a process of its own: prints planned and measured peak bytes of training a model of 10M parameters."""
    import peft  # noqa: F401  (the program itself is not part of the plan)

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=6,
        max_position_embeddings=256,
    )
    subject = LanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval(), tiny("llama")[1])
    part, training, data = registry.get("methods", "npo"), Training(steps=2, batch_size=8), people(20)
    unlearn(subject, part, {}, scope="layers:0", data=data, training=replace(training, steps=1))
    for scope in SCOPES:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
        before = resident("VmRSS")
        unlearn(subject, part, {}, scope=scope, data=data, training=training)
        grown = resident("VmHWM") - before
        planned = estimate(subject, part, {}, scope=scope, data=data, training=training)["memory"]
        print(planned["total"], grown + 4 * subject.model.num_parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads resident memory from /proc")
def test_peak_memory_is_within_a_quarter_of_the_process() -> None:
    code = "import test_plan; test_plan.measure()"
    # Freed memory goes back at once: what the allocator hoards is not part of the plan.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    for scope, line in zip(SCOPES, done.stdout.splitlines(), strict=True):
        planned, measured = map(float, line.split())
        assert 0.75 < planned / measured < 1.25, scope


@pytest.mark.parametrize("scope", ["layers:1", "all"])
def test_the_loop_holds_what_the_plan_says(scope: str) -> None:
    """Eight bytes of optimiser state and four of gradient for every fp32 parameter that moves; of an embedding only the
    rows that are fed do."""
    model, tokenizer = tiny("llama")
    subject, part, data = LanguageModel(model, tokenizer), registry.get("methods", "grad_diff"), people(8)
    planned = estimate(subject, part, {}, scope=scope, data=data, training=Training(steps=1))
    held: dict[str, int] = {}

    class Spy(loop.AdamW):
        def step(self, *arguments: object) -> None:
            held["gradients"] = sum(p.grad.nbytes for p in self.parameters)
            super().step(*arguments)
            held["optimiser"] = sum(t.nbytes for p in self.masters for t in self.state[p].values() if t.ndim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "AdamW", Spy)
        unlearn(subject, part, {}, scope=scope, data=data, training=Training(steps=1))
    if scope == "all":
        assert held["optimiser"] < 8 * planned["parameters"]["trainable"]
    assert held == {name: planned["memory"][name] for name in held}


def test_passes_of_the_audit_are_those_that_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("llama")
    subject, data = LanguageModel(model, tokenizer), people(4)
    data["forget"] = [replace(row, paraphrased_prompts=(f"{row.prompt} please",)) for row in data["forget"]]
    long = f"{data['forget'][0].answer}, as everybody in the valley and beyond it has known for years"
    data["forget"][0] = replace(data["forget"][0], answer=long)
    attacks = [("direct", {}), ("paraphrase", {}), ("decoding", {"samples": 4}), ("logit_lens", {}), ("quantise", {})]
    attacks += [("relearn", {"steps": 5, "batch_size": 3})]
    attacks += [("editing_attack", {"editor": {"name": "ft_m", "steps": 1}, "edits": 2})]
    without_weights = LanguageModel(copy.deepcopy(model).to("meta"), tokenizer)
    planned = passes(without_weights, data, attacks, 1)
    made = collections.Counter[str]()

    def watched(name: str, count: Callable[..., tuple[str, int]]) -> None:
        original = getattr(LanguageModel, name)

        def call(self: LanguageModel, asked: list, *rest: object, **settings: object) -> object:
            kind, number = count(self, asked, *rest, **settings)
            made[kind if self is subject else "copies"] += number
            return original(self, asked, *rest, **settings)

        monkeypatch.setattr(LanguageModel, name, call)

    watched("score", lambda _, items, *__, **___: ("scored", len(items)))
    watched("gradients_and_scores", lambda _, items, *__, **___: ("gradients", len(items)))
    watched("patched_into", lambda _, __, items, **___: ("patched", len(items)))
    watched("continuations", lambda _, items, *__, **___: ("continuations", len(items)))
    watched("hidden", lambda _, prompts, *__: ("hidden", len(prompts)))
    watched(
        "generate",
        lambda _, prompts, *__, samples, temperature, **___: (
            "sampled" if temperature else "asked",
            len(prompts) * samples,
        ),
    )

    def trained(*arguments: object, **settings: object) -> dict:
        log = fit(*arguments, **settings)
        made["steps"] += len(log["losses"])
        made["tokens"] += log["tokens"]
        return log

    fit = loop.fit
    monkeypatch.setattr(loop, "fit", trained)
    edit = Case.edit

    def edited(self: Case, edits: list, *rest: object, **settings: object) -> object:
        made["facts"] += len(edits)
        return edit(self, edits, *rest, **settings)

    monkeypatch.setattr(Case, "edit", edited)
    store, limit = Store(tmp_path), longest_answer(subject, data)
    more = more_tables() - {"divergences"}
    ask_all(subject, data, limit, store, more=more, host=subject)
    carry_out(Case(subject, data, max_new_tokens=limit), attacks, store)
    assert planned["answers scored per model"] == made["scored"]
    assert planned["questions asked per model"] == made["asked"]
    assert planned["answers sampled per model"] == made["sampled"]
    assert planned["hidden states per model"] == made["hidden"]
    assert planned["rows with gradients per model"] == made["gradients"] > 0
    assert planned["rows whose states are patched per model"] == made["patched"] > 0
    assert planned["answers continued from every beginning per model"] == made["continuations"] == 1
    compared = "rows compared with an untrained network per model"
    assert planned[compared] == 0
    assert passes(without_weights, data, [], 1, metrics=["zrf"])[compared] == len(data["forget"])
    assert planned["questions to changed copies per model"] == made["copies"]
    assert planned["relearning steps per model"] == made["steps"] == 2 * 5
    assert planned["relearning tokens per model"] == made["tokens"] > 0
    assert planned["facts edited into copies per model"] == made["facts"] == 2 * (1 + 2)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_own_answers_are_planned_with_their_gradients_only_where_they_are_scored_so(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny(architecture)
    subject, data = LanguageModel(model, tokenizer), people(2)
    planned = passes(LanguageModel(copy.deepcopy(model).to("meta"), tokenizer), data, [], 1)
    made: list[int] = []
    score = LanguageModel.score

    def counted(self: LanguageModel, items: list, **settings: object) -> object:
        made.append(len(items))
        return score(self, items, **settings)

    monkeypatch.setattr(LanguageModel, "score", counted)
    ask_all(subject, data, 0, more={"gradients"})
    assert planned["answers scored per model"] == sum(made) == (6 if architecture == "llama" else 8)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_passes_without_gradients_are_counted_along_the_paths_of_rows(architecture: str) -> None:
    model, tokenizer = tiny(architecture)
    subject = LanguageModel(model, tokenizer)
    assert subject.mode == "families"
    assert subject.plain is None
    shape = structure(model, resolve("none", model))
    # A common beginning, a question with several answers, and a row that is much longer.
    asked = [("Answer briefly: where was Ilva born?", f"{place} of Carth") for place in ("Tivin", "Orl", "Tarn", "Vel")]
    asked += [("Answer briefly: where did Orin live?", "in the north of Carth and beyond it for many years")]
    rows = [subject.encode(Row(id=str(i), prompt=q, answer=a)) for i, (q, a) in enumerate(asked)]
    counted = {}
    for gradients in (False, True):
        with counting() as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(gradients):
            subject.hidden_states(pack(rows))
        counted[gradients] = counter.get_total_flops()
        planned = shape.forward(replace(fed([rows], gradients=gradients), answers=()))
        assert planned == pytest.approx(counted[gradients], rel=0.005)
    assert counted[False] < counted[True]
