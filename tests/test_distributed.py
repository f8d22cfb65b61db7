"""Several processes of one launch: the same trajectories, tables and verdicts as one process, with and without FSDP.

Run as a program this file is one of the two processes that the tests compare with (gloo, on the CPU).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge import processes
from expunge.cli import main
from expunge.deltas import Delta
from expunge.errors import LaunchError, RowError
from expunge.evidence import Evidence
from expunge.ledger import Ledger
from expunge.methods.optimise import shards
from expunge.methods.optimise.loop import Guard, Training
from expunge.methods.optimise.unlearn import unlearn
from expunge.registry import get, serving
from expunge.request import load
from expunge.rows import Row
from expunge.run import run
from expunge.subjects import decoding
from expunge.subjects.entering import Start, stored
from expunge.subjects.language import LanguageModel

CASES = {
    "npo, kl and a guard": ("llama", "npo", "all", {"retain": "kl"}, {"micro_tokens": 60, "guard": Guard(every=2)}),
    "rmu": ("llama", "rmu", None, {}, {"weight_decay": 0.1}),
    "sharpness_aware": ("llama", "sharpness_aware", "all", {}, {}),
    # One forget row and two processes: one of them has nothing to do in forget passes.
    "sharpness_aware, noise, batch 1": ("llama", "sharpness_aware", "all", {"variant": "rs"}, {"batch_size": 1}),
    "latent_adversarial": ("llama", "latent_adversarial", "all", {"inner_steps": 3}, {}),
    "adapters": ("qwen2", "npo", "lora(r=4)", {}, {}),
    "upper layers": ("gpt2", "npo", "layers:2", {}, {"steps": 5}),
    "fused experts": ("qwen3_moe", "grad_diff", "all", {}, {}),
    "one expert and its router": ("qwen3_moe", "npo", "expert(layer=1, index=2)", {}, {}),
    "one expert": ("qwen3_moe", "npo", "expert(layer=1, index=2, router=false)", {}, {}),
}


# Every other gradient method, once under all its names, at its defaults; some choose their scope.
OWN_SCOPE = {"uoe", "gs_lora", "loku"}
EVERY = {
    part.name: (
        "mixtral" if "routed_experts" in part.card.requires else "llama",
        part.name,
        None if part.name in OWN_SCOPE else "all",
        {"contrast": 0.0} if "routed_experts" in part.card.requires else {},
        {"steps": 2},
    )
    for part in serving("methods", "language")
    if part.card.kind == "optimise" and part.name not in {case[1] for case in CASES.values()}
    if part.name in (part.function.__name__, "loku")
}


def rows(word, count):
    return [
        Row(
            id=str(i),
            prompt=f"where was {word} {i}?",
            answer=f"Tivin {i * 7}",
            entity=str(i),
            perturbed_answers=("Carth",),
        )
        for i in range(count)
    ]


def train(name, folder=None, progress=None):
    """(delta's tensors, loss of every step, warnings)"""
    architecture, method, scope, settings, changes = {**CASES, **EVERY}[name]
    part = get("methods", method)
    outcome = unlearn(
        LanguageModel(*tiny(architecture)),
        part,
        part.resolve(settings),
        scope=scope,
        data={"forget": rows("born", 7), "retain": rows("bred", 9)},
        training=Training(
            **{"steps": 3, "batch_size": 3, "learning_rate": 2e-4, "guard": None, "checkpoint_seconds": 0, **changes}
        ),
        folder=folder,
        progress=progress,
    )
    return outcome.delta.entries, outcome.summary["log"]["loss"], outcome.summary["warnings"]


def tables(subject, *, parts=False):
    """Everything that passes give, from many small groups; `parts`: what they give while weights lie in parts."""
    asked = [row for count in (2, 9) for row in rows("born" if count == 2 else "bred and born", count)]
    encoded = [((row.id, "answer"), subject.encode(row)) for row in asked]
    prompts = [((row.id, "question"), subject.prompt_text(row)) for row in asked]
    scores = subject.score(encoded, token_budget=60)
    greedy = subject.generate(prompts, max_new_tokens=4)
    sampled = subject.generate(prompts, max_new_tokens=4, samples=3, temperature=1.0, seed=5)
    single = (
        {}
        if parts
        else {
            "gradients": subject.gradients(encoded).norm,
            "patched": subject.patched_into(subject.copy(), encoded).by_block,
        }
    )
    return {
        **single,
        "logprob": scores.logprob,
        "mean": scores.mean,
        "variance": scores.variance,
        "texts": [greedy.texts, sampled.texts, greedy.stopped, sampled.stopped],
        "hidden": subject.hidden([text for _, text in prompts]).numpy(),
        "entries": torch.cat(
            [states for (states,) in stored(subject, [item for _, item in encoded], Start(1, inside=False))]
        ).numpy(),
    }


def equal(a, b):
    return all(np.array_equal(a[key], b[key]) if key != "texts" else a[key] == b[key] for key in a)


# --- the program -----------------------------------------------------------------------------------------------------


def worker(folder, every):
    torch.set_num_threads(1)
    processes.start()
    rank = processes.rank()
    assert processes.count() == 2
    found = {}
    if not every:
        check_agreement(rank)
        found["tables"] = check_tables(rank)
    for fsdp in (False, True):
        os.environ["ACCELERATE_USE_FSDP"] = str(fsdp).lower()
        for name in EVERY if every else CASES:
            found[name, fsdp] = train(name)
    if not every:
        check_parts()
        check_interrupted(folder)
    if processes.first():
        torch.save(found, folder / "found.pt")
    processes.end()


def check_interrupted(folder):

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("adapters", folder, stop)


def check_agreement(rank):
    assert processes.once(lambda: rank) == 0

    def fail(*_):
        raise RowError(f"row of process {rank}")

    with pytest.raises(RowError, match="row of process 0"):
        processes.once(fail)
    whose = processes.shared([[i] for i in range(5)], lambda item: (item[0], rank))
    assert whose == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    assert processes.shared([], lambda item: item) == []
    with pytest.raises(RowError, match="row of process 1"):
        processes.shared([[0], [1]], lambda item: fail() if item[0] else item)
    with pytest.raises(RuntimeError, match="came to another pass"):
        processes.shared([[0]], lambda item: item, of=rank)
    with pytest.raises(LaunchError, match="process 1 does not find the same rows as process 0"):
        processes.same("rows", rank)


def check_tables(rank):
    subject = LanguageModel(*tiny("llama"))
    decoded = []
    original = decoding.decode

    def counting(subject, prompts, *rest, **more):
        decoded.append(len(prompts))
        return original(subject, prompts, *rest, **more)

    with patch.object(decoding, "decode", counting):
        found = tables(subject)
    counts = processes.shared([[0], [1]], lambda _: sum(decoded))
    assert min(counts) > 0
    assert sum(counts) == 22  # 11 rows asked twice: nobody decodes a row that another one does
    return found


def check_parts():
    """While weights lie in parts, passes give what they gave; afterwards all is where it was."""
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = tables(subject)
    plan, subject._plain = subject.plain, False  # weights that lie in parts run the model's own code
    own = tables(subject, parts=True)
    subject._plain = plan
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    with shards.sharded(subject, parameters) as parts:
        inside = [part for part, p in zip(parts, parameters) if part is not p]
        assert len(inside) == len([name for name in before if ".layers." in name])
        assert sum(shards.local(part).numel() for part in inside) <= 0.51 * sum(part.numel() for part in inside)
        assert sum(p.numel() for p in parameters) < 0.5 * sum(tensor.numel() for tensor in before.values())
        assert equal(tables(subject, parts=True), own)
        with pytest.raises(LaunchError, match="gradients of single rows need whole weights"):
            subject.gradients([(("0", "answer"), subject.encode(rows("born", 1)[0]))])
        assert float(shards.norm(parts)) == pytest.approx(float(sum(t.square().sum() for t in before.values()).sqrt()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert equal(tables(subject), whole)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes found, and the folder where their interrupted run is."""
    return two_processes(tmp_path_factory.mktemp("pair"), "cases")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """What two processes found of every other method."""
    return two_processes(tmp_path_factory.mktemp("every"), "every")[0]


def two_processes(folder, what):
    port = free_port()
    source = str(Path(__file__).parent.parent / "src")
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    workers = []
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        workers.append(
            subprocess.Popen(
                [sys.executable, __file__, str(folder), what], env={**os.environ, **environment}, stderr=subprocess.PIPE
            )
        )
    try:
        errors = [worker.communicate(timeout=280)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(text[-3000:] for text in errors)
    return torch.load(folder / "found.pt", weights_only=False), folder


# --- one against two -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_one_and_two_processes_give_the_same_trajectory(pair, name, fsdp):
    compare(name, fsdp, pair[0])


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("name", EVERY)
def test_every_method_takes_one_way_in_one_and_in_two_processes(every, name, fsdp):
    compare(name, fsdp, every)


def compare(name, fsdp, theirs):
    entries, losses, _ = train(name)
    found, their_losses, warnings = theirs[name, fsdp]
    assert their_losses == pytest.approx(losses, abs=1e-5)
    assert found.keys() == entries.keys()
    for tensor, entry in entries.items():
        for key, value in entry.items():
            assert torch.allclose(found[tensor][key].float(), value.float(), atol=1e-5), (tensor, key)
    assert any("FSDP had nothing to cut" in text for text in warnings) == (fsdp and name == "one expert")


def test_tables_of_two_processes_are_those_of_one_bit_for_bit(pair):
    assert equal(pair[0]["tables"], tables(LanguageModel(*tiny("llama"))))


def test_a_run_under_fsdp_goes_on_in_one_process(pair, tmp_path):
    whole, losses, _ = train("adapters")
    shutil.copytree(pair[1] / "checkpoint", tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 1
    steps = []
    resumed, again, _ = train("adapters", tmp_path, lambda done, _: steps.append(done))
    assert steps == [2, 3]
    assert again == pytest.approx(losses, abs=1e-5)
    assert resumed.keys() == whole.keys()
    assert all(torch.allclose(resumed[n][k], whole[n][k], atol=1e-5) for n in whole for k in whole[n])


# --- the command -----------------------------------------------------------------------------------------------------

QUICK = {
    "training.steps": 5,
    "training.learning_rate": 2e-4,
    "audit.bootstrap": 100,
    "audit.attacks": ["direct", "logit_lens", {"relearn": {"steps": 2}}],
}


def launch(request, out, ledger, options=("--multi_gpu",), changes=QUICK):
    """`accelerate launch --num_processes 2 -m expunge run`, started."""
    sets = [text for name, value in changes.items() for text in ("--set", f"{name}={json.dumps(value)}")]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", free_port(), "-m", "expunge", "run", str(request), "--out", str(out), *sets]
    environment = {**os.environ, "EXPUNGE_LEDGER": str(ledger), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    try:
        output, errors = process.communicate(timeout=250)
    finally:
        process.kill()  # its processes end with it
    assert process.returncode == 0, errors
    return output


def arrows(folder):
    return {path.name: path.read_bytes() for path in (folder / "tables").glob("*.arrow")}


def test_two_launched_processes_give_the_weights_the_tables_and_the_verdict_of_one(tiny_world, tmp_path):
    process = launch(tiny_world.request, tmp_path / "two" / "run", tmp_path / "ledger.sqlite")
    request = load(tiny_world.request, QUICK)
    alone = run(request, out=tmp_path / "one" / "run", ledger=Ledger(tmp_path / "other.sqlite"))
    output = finished(process)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    evidence = Evidence.load(two / "evidence.json")
    assert output.count("verdict:") == 1
    assert evidence.environment["processes"] == 2
    assert (evidence.verdict.verdict, evidence.verdict.flags) == (alone.verdict.verdict, alone.verdict.flags)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert [entry.event for entry in ledger.list()] == ["request_received", "started", "finished"]
    assert ledger.verify()[0]

    mine, theirs = Delta.load(one / "delta").entries, Delta.load(two / "delta").entries
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[n]["difference"], theirs[n]["difference"], atol=1e-5) for n in mine)

    # Tables of the models that nothing changed are in both runs, bit for bit.
    common = arrows(one).keys() & arrows(two).keys()
    assert len(common) > 10
    assert all(arrows(one)[name] == arrows(two)[name] for name in common)
    # Those of the changed model, taken again by one process from the weights that two have made.
    copy = tmp_path / "copy" / "run"
    shutil.copytree(two, copy)
    for name in arrows(two).keys() - common:
        (copy / "tables" / name).unlink()
    (copy / "evidence.json").unlink()
    run(request, out=copy, ledger=Ledger(tmp_path / "third.sqlite"))
    assert arrows(copy) == arrows(two)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--multi_gpu",), ("--use_fsdp",)], ids=["ddp", "fsdp"])
def test_a_launch_that_was_killed_goes_on_and_leaves_no_process_behind(tiny_world, tmp_path, options):
    changes = {**QUICK, "training.steps": 60, "training.checkpoint_seconds": 0.0}
    out, ledger = tmp_path / "two" / "run", tmp_path / "ledger.sqlite"
    process = launch(tiny_world.request, out, ledger, options, changes)
    limit = time.monotonic() + 100
    while not (out / "checkpoint" / "state.json").is_file():
        assert time.monotonic() < limit
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # its pipes close when the last of its processes is gone
    assert not (out / "delta").exists()
    finished(launch(tiny_world.request, out, ledger, options, changes))
    events = [entry.event for entry in Ledger(ledger).list()]
    # The first process may have been the last to end, and have noticed that the other one was gone.
    assert [event for event in events if event != "failed"] == ["request_received", "started", "resumed", "finished"]
    request = load(tiny_world.request, changes)
    alone = run(request, out=tmp_path / "one" / "run", ledger=Ledger(tmp_path / "other.sqlite"))
    assert Evidence.load(out / "evidence.json").verdict.verdict == alone.verdict.verdict
    mine, theirs = Delta.load(tmp_path / "one" / "run" / "delta").entries, Delta.load(out / "delta").entries
    assert all(torch.allclose(mine[n]["difference"], theirs[n]["difference"], atol=1e-3) for n in mine)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """An environment like that of the first of two processes."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_commands_that_run_in_one_process_say_so(launched, capsys):
    assert main(["list", "methods"]) == 2
    assert "error E530: `expunge list` runs in one process, and 2 were launched; only run and audit" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "launched with DeepSpeed, which expunge does not use"),
        ("FSDP_OFFLOAD_PARAMS", "true", "parameters offloaded to the CPU"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "write dtype: bfloat16 there"),
    ],
)
def test_what_a_launch_asks_for_in_vain_is_refused(launched, name, value, message):
    launched.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        processes.start()


def test_only_the_first_process_speaks(launched, capsys):
    from expunge.commands.console import progressing, remark, say

    launched.setenv("RANK", "1")
    say("verdict")
    remark("progress")
    with progressing(quiet=False) as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


def test_one_process_started_in_place_of_several_is_remarked(monkeypatch, capsys, tmp_path):
    # What `accelerate launch --cpu --num_processes 2` gives.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    main(["run", str(tmp_path / "missing.yaml")])
    assert "one process was started" in capsys.readouterr().err


def test_what_fsdp_cannot_cut_is_refused_by_name():
    model, _ = tiny("llama")
    model.model.layers[1].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    blocks = [f"model.layers.{i}" for i in range(3)]
    with pytest.raises(LaunchError, match=r"cannot cut model.layers.1.mlp.experts.0.weight: modules in a list"):
        shards._check(model, blocks, {id(p) for p in model.parameters()})
    shards._check(model, blocks, {id(p) for p in model.model.layers[0].parameters()})
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(LaunchError, match=r"layers.2.mlp.gate_proj.weight: it is one tensor with model.layers.0"):
        shards._check(model, blocks, {id(p) for p in model.model.layers[0].parameters()})


def test_one_process_needs_no_launch():
    assert (processes.count(), processes.rank(), processes.sharding()) == (1, 0, False)
    told = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    assert processes.shared([[1, 2], [3]], sum, progress=progress) == [3, 3]
    assert told == [(2, 3), (3, 3)]
    with pytest.raises(ZeroDivisionError):
        processes.shared([[0]], lambda item: 1 / item[0])


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2] == "every")
    processes.leave(0)
