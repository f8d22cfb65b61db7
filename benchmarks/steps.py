"""Seconds, floating-point operations and memory of one optimiser step, against the machine's rate of matrix products.

    python benchmarks/steps.py [--shape small bigvocab] [--dtype fp32 bf16] [--jobs npo rmu ...] [--device cuda]
                               [--steps 5] [--repeats 3] [--threads 2] [--json FILE] [--peer open-unlearning/]

Random weights and invented rows of TOFU's lengths: a prompt of 57-61 tokens, 37 of them a beginning that all prompts
share, an answer of 18-39 tokens (28.6 in the mean); 8 forget and 8 retain rows in a step. Every row comes three times,
as in a run of three epochs: what our side stores of a row before it trains (`prepare`) is stored once. Our side is
`unlearn` as users run it: clipping, AdamW, log and all. Jobs:

- train: likelihood of 16 rows;    grad_diff, npo: with the likelihood of retain rows;
- rmu: read after block 2 of 4, everything moves;    rmu3: the paper's three matrices.

Every measurement runs in a process of its own, with the peer's between ours. A step's operations are counted as in
matrix products only: blocks 2 P per token forward and 4 P backward, the head at answer positions only (`needed`). The
limit is that count over the rates which the machine reached in this run; the share is the limit over the best step.

`--peer` is a checkout of locuslab/open-unlearning: its own trainer classes and collator run on the same model, rows and
batches (`peer_steps.py`), and the losses and gradient norms of both are compared at the first step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 4096},
    "bigvocab": {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 128256},
}
BLOCKS = 4
EPOCHS = 3
"""How often a row comes."""
READ = 2
"""Block after which RMU reads."""
STEERING = 2.0
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# method, its settings, scope, row sets
JOBS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "train": ("fine_tune", {}, "all", ("retain",)),
    "grad_diff": ("grad_diff", {}, "all", ("forget", "retain")),
    "npo": ("npo", {"beta": 0.1}, "all", ("forget", "retain")),
}
_RMU = {"layer": READ, "coefficient": STEERING, "retain_weight": 1.0, "positions": "answer"}
JOBS["rmu"] = ("rmu", _RMU, "all", ("forget", "retain"))
JOBS["rmu3"] = ("rmu", _RMU, f"role:mlp_out@0-{READ}", ("forget", "retain"))
TOUCH = {"small": 1 << 30, "bigvocab": 5 << 30}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


@dataclass(frozen=True)
class Case:
    """One measurement: which program, on what."""

    who: str
    job: str
    shape: str
    dtype: str
    device: str
    steps: int
    batch: int
    threads: int
    peer: str = ""


# --- one measurement, in a process of its own -----------------------------------------------------------------------


class Stamps:
    """Wall and CPU time at the end of every step, and the memory taken since the start."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[tuple[float, float]] = []
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            _forget_peak()
            self.start = _status("VmRSS")
        self.began = time.perf_counter()
        self.peak = 0

    def mark(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self.start
        else:
            self.peak = _status("VmHWM") - self.start
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self) -> dict[str, Any]:
        """The first step warms up: allocators, kernels' first choices, the optimiser's state."""
        pairs = list(zip(self.marks[1:], self.marks[2:]))
        return {
            "prepare": self.marks[0][0] - self.began,
            "seconds": [after[0] - before[0] for before, after in pairs],
            "cpu": [after[1] - before[1] for before, after in pairs],
            "memory": self.peak,
        }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak then includes what came before the start
        print("peak memory cannot be reset on this system", file=sys.stderr)


def setting(case: Case) -> tuple[Any, dict[str, Any], Any]:
    """(subject, data, training) of a case: the same weights and rows in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expunge.methods.optimise.loop import Training
    from expunge.rows import Row
    from expunge.subjects.language import LanguageModel
    from expunge.subjects.packed import Encoded

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[case.shape],
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(case.device, getattr(torch, DTYPES[case.dtype]))
    subject = LanguageModel(model, tokenizer=None, name=case.shape)
    # Rows are tokens already.
    subject.__dict__ |= {"fingerprint": "invented", "encode": lambda row, **_: tokens[row.id]}
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, config.vocab_size, (count,), generator=generator).tolist())

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    shared = ids(37)
    tokens: dict[str, Encoded] = {}
    data: dict[str, list[Row]] = {"forget": [], "retain": []}
    each = case.batch * math.ceil((case.steps + 1) / EPOCHS)
    _, _, _, sides = JOBS[case.job]
    for side in sides:
        for number in range(each * 2 // len(sides)):
            prompt, answer = length(57, 61), length(18, 39)
            name = f"{side}-{number}"
            tokens[name] = Encoded(shared + ids(prompt - 37 + answer), prompt, 1, name)
            data[side].append(Row(id=name, answer=name, prompt=name))
    size = case.batch * 2 // len(sides)
    training = Training(steps=case.steps + 1, batch_size=size, learning_rate=1e-5, seed=0, guard=None)
    return subject, data, training


def warm(case: Case) -> None:
    """Whatever libraries set up at their first use is not part of a step's memory.

    Virtual machines are slow (10-80 us a page, measured) to hand out memory that nobody used for a while, and steps map
    and unmap a lot of it: it is touched before, for every program alike.
    """
    import accelerate
    import torch
    import transformers

    assert accelerate.PartialState
    assert transformers.Trainer
    if case.device == "cpu":
        pages = torch.empty(TOUCH[case.shape], dtype=torch.uint8)
        pages[::4096] = 1
        del pages
    weight = torch.randn(64, 64, device=case.device, requires_grad=True)
    (weight @ weight).logsumexp(-1).sum().backward()


def ours(case: Case) -> dict[str, Any]:
    from expunge.methods.optimise.unlearn import unlearn
    from expunge.registry import get

    name, settings, scope, _ = JOBS[case.job]
    subject, data, training = setting(case)
    warm(case)
    stamps = Stamps(case.device)
    outcome = unlearn(
        subject,
        get("methods", name),
        settings,
        scope=scope,
        data=data,
        training=training,
        evaluate_at=range(case.steps + 2),
        evaluate=lambda _, __: stamps.mark(),
    )
    log = outcome.summary["log"]
    return {
        **stamps.result(),
        "loss": log["loss"][0],
        "norm": log["gradient_norm"][0],
        **counts(decided(case, subject, data, training)),
    }


def counts(setup: Any) -> dict[str, float]:
    """Tokens of a step in the mean over the timed steps: fed by us, fed without shared beginnings, padded, answers."""
    from expunge.subjects.packed import pack

    drawn = setup.drawn
    found = []
    for step in drawn.steps[1:]:
        sides = [[drawn.rows[side][i] for i in step[side]] for side in drawn.rows]
        rows = [row for side in sides for row in side]
        found.append(
            (
                pack(rows).tokens,
                sum(len(row.ids) - 1 for row in rows),
                sum(len(side) * max(len(row.ids) for row in side) for side in sides),
                sum(row.scored for row in rows),
            )
        )
    return dict(zip(("tokens", "unshared", "padded", "answers"), map(statistics.mean, zip(*found))))


def decided(case: Case, subject: Any, data: dict[str, Any], training: Any) -> Any:
    """What our loop decides before it computes anything: rows of every step, RMU's direction."""
    from expunge.methods.optimise.unlearn import set_up
    from expunge.registry import get

    name, settings, scope, _ = JOBS[case.job]
    return set_up(subject, get("methods", name), settings, scope=scope, data=data, training=training)


def products(case: Case) -> dict[str, Any]:
    """GFLOP/s of matrix products in the shapes of this case's blocks and head."""
    import torch

    dtype = getattr(torch, DTYPES[case.dtype])
    d, wide, vocabulary = (SHAPES[case.shape][k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes = {
        "square": (1024, 1024, 1024) if case.device == "cpu" else (8192, 8192, 8192),
        "block": (1600 if case.shape == "small" else 800, d, wide),
        "head": (800, d, vocabulary),
    }
    found = {}
    for name, (n, k, m) in shapes.items():
        left = torch.randn(n, k, device=case.device).to(dtype)
        right = torch.randn(m, k, device=case.device).to(dtype)
        times: list[float] = []
        until = time.perf_counter() + 1.0
        while time.perf_counter() < until or len(times) < 5:
            if case.device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            torch.nn.functional.linear(left, right)
            if case.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found[name] = 2e-9 * n * k * m / min(times)
    return found


def child(case: Case) -> dict[str, Any]:
    import torch

    torch.set_num_threads(case.threads)
    torch.set_flush_denormal(True)
    if case.who == "products":
        return products(case)
    if case.who == "ours":
        return ours(case)
    from peer_steps import run

    return run(case, Path(case.peer))


# --- what a step must compute ---------------------------------------------------------------------------------------


def needed(job: str, shape: str, tokens: float, answers: float) -> tuple[float, float]:
    """GFLOP of a step in (blocks, head). Attention's own products are under 4 % at these lengths and not counted."""
    d, wide, vocabulary = (SHAPES[shape][k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    block = 4 * d * d + 3 * d * wide
    if job == "rmu":
        return 6e-9 * block * (READ + 1) * tokens, 0.0
    if job == "rmu3":
        # Forward to the layer; activations' gradients down to the lowest matrix; three weights' gradients.
        return 1e-9 * tokens * (2 * block * (READ + 1) + 2 * block * READ + (READ + 1) * 2 * d * wide), 0.0
    return 6e-9 * block * BLOCKS * tokens, 6e-9 * d * vocabulary * answers


# --- the whole run --------------------------------------------------------------------------------------------------


def start(case: Case) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(case.threads),
        "MKL_NUM_THREADS": str(case.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if case.who == "peer":
        environment["THP_MEM_ALLOC_ENABLE"] = "0"  # torch's default: our package asks for huge pages, the peer does not
    command = [sys.executable, __file__, "--child", json.dumps(case.__dict__)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def present(job: str) -> bool:
    from expunge.errors import UnknownNameError
    from expunge.registry import get

    try:
        get("methods", JOBS[job][0])
    except UnknownNameError:
        return False
    return True


def measure(case: Case, repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """All repeats of one job: products, ours, the peer, and so on in turn."""
    who = ["products", "ours", *(["peer"] if case.peer else [])]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
    for number in range(repeats):
        for name in who:
            tell(f"{case.shape} {case.dtype} {case.job}: {name} {number + 1}/{repeats}")
            runs[name].append(start(Case(**{**case.__dict__, "who": name})))
    rates = {key: max(run[key] for run in runs["products"]) for key in ("square", "block", "head")}
    first = runs["ours"][0]
    blocks, head = needed(case.job, case.shape, first["tokens"], first["answers"])
    found: dict[str, Any] = {
        **{key: getattr(case, key) for key in ("job", "shape", "dtype", "device", "threads", "batch")},
        **{key: first[key] for key in ("tokens", "unshared", "padded", "answers", "loss", "norm")},
        "gflop": blocks + head,
        "rates": rates,
        "limit": blocks / rates["block"] + (head / rates["head"] if head else 0.0),
    }
    for name in who[1:]:
        seconds = [value for run in runs[name] for value in run["seconds"]]
        found[name] = {
            "best": min(seconds),
            "median": statistics.median(seconds),
            "cpu": statistics.median(value for run in runs[name] for value in run["cpu"]),
            "cpu_best": min(value for run in runs[name] for value in run["cpu"]),
            "prepare": statistics.median(run["prepare"] for run in runs[name]),
            "memory": statistics.median(run["memory"] for run in runs[name]),
        }
    found["gflops"] = found["gflop"] / found["ours"]["best"]
    found["share"] = found["limit"] / found["ours"]["best"]
    if case.peer:
        other = runs["peer"][0]
        found["peer"] |= {key: other[key] for key in ("loss", "norm", "note")}
        found["ratio"] = {key: found["peer"][key] / found["ours"][key] for key in ("best", "median", "cpu", "memory")}
        found["same"] = {key: abs(other[key] - first[key]) / abs(first[key]) for key in ("loss", "norm")}
    return found


HEAD = (
    "| job | s/step best (median) | CPU s | tokens fed, answers | GFLOP | GFLOP/s | limit s | share | peak MB |",
    "|---|---|---|---|---|---|---|---|---|",
)
PEER = (
    "| job | peer s best (median) | CPU s | tokens fed | peak MB | best: peer / ours | median | CPU | memory | loss |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def line(found: dict[str, Any]) -> str:
    our = found["ours"]
    return (
        f"| {found['job']} | {our['best']:.3f} ({our['median']:.3f}) | {our['cpu']:.2f} "
        f"| {found['tokens']:.0f}, {found['answers']:.0f} | {found['gflop']:.1f} | {found['gflops']:.0f} "
        f"| {found['limit']:.3f} | {found['share']:.0%} | {our['memory'] / 1e6:.0f} |"
    )


def peer_line(found: dict[str, Any]) -> str:
    peer, ratio, same = found["peer"], found["ratio"], found["same"]
    tolerance = TOLERANCE[found["dtype"]]
    if peer["note"]:
        told = f"{found['loss']:.5g} and {peer['loss']:.5g}: {peer['note']}"
    else:
        verdict = "same" if max(same.values()) <= tolerance else "**DIFFERS**"
        told = f"{verdict}: value {same['loss']:.0e}, gradient norm {same['norm']:.0e} apart"
    return (
        f"| {found['job']} | {peer['best']:.3f} ({peer['median']:.3f}) | {peer['cpu']:.2f} | {found['padded']:.0f} "
        f"| {peer['memory'] / 1e6:.0f} | **{ratio['best']:.2f}** | {ratio['median']:.2f} | {ratio['cpu']:.2f} "
        f"| {ratio['memory']:.2f} | {told} |"
    )


def report(results: Sequence[dict[str, Any]]) -> str:
    lines: list[str] = []
    for shape, dtype in dict.fromkeys((found["shape"], found["dtype"]) for found in results):
        chosen = [found for found in results if (found["shape"], found["dtype"]) == (shape, dtype)]
        rates = {key: max(found["rates"][key] for found in chosen) for key in ("square", "block", "head")}
        where = f"{chosen[0]['device']}, {chosen[0]['threads']} threads, {chosen[0]['batch']} + {chosen[0]['batch']}"
        lines += [
            f"\n## {shape}, {dtype} ({where} rows; {chosen[0]['unshared']:.0f} tokens with prompts unshared)",
            f"\nProducts: blocks {rates['block']:.0f}, head {rates['head']:.0f}, "
            f"square {rates['square']:.0f} GFLOP/s\n",
            *HEAD,
            *map(line, chosen),
        ]
        if "peer" in chosen[0]:
            lines += ["", *PEER, *map(peer_line, chosen)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process, after one that warms up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="forget rows of a step, and as many retain rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path, help="checkout of locuslab/open-unlearning")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(child(Case(**json.loads(options.child)))))
        return
    if options.peer and not (options.peer / "src/trainer/unlearn/npo.py").is_file():
        raise SystemExit(f"{options.peer} is no checkout of locuslab/open-unlearning (src/trainer/unlearn/npo.py)")
    jobs = [job for job in options.jobs if present(job)]
    for job in options.jobs:
        if job not in jobs:
            print(f"{job}: skipped, there is no method {JOBS[job][0]} yet")
    results = []
    peer = str(options.peer.resolve()) if options.peer else ""
    for shape in options.shape:
        for dtype in options.dtype:
            for job in jobs:
                case = Case(
                    "ours", job, shape, dtype, options.device, options.steps, options.batch, options.threads, peer
                )
                results.append(measure(case, options.repeats, lambda text: print(text, file=sys.stderr)))
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
