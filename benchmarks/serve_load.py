"""Many clients that stream from `expunge serve` at once, on loopback: errors, leaks, memory, speed.

A server process with a small random model and an output filter over 1000 targets; each client asks again and again,
some hang up in the midst of their answers. Every joined stream is searched for the forbidden strings.

    python benchmarks/serve_load.py [--clients 64] [--seconds 60] [--tokens 48]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from expunge.methods.guard.forbidden import Forbidden
from expunge.subjects.language import LanguageModel
from expunge.world.facts import make

TARGETS = 1000


def model(folder: Path) -> list[str]:
    """A random model whose vocabulary is made of words, so that its answers are; returns the words."""
    world = make(0)
    texts = [
        f"{p.name} was born in {p.born_in}, works as a {p.trade} and wrote {p.work}." for p in world.people.values()
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=0,
    )
    logging.disable_progress_bar()
    LanguageModel(LlamaForCausalLM(config), fast).save(folder)
    return sorted({word for text in texts for word in text.replace(",", "").replace(".", "").split()})


def resident(process: int) -> float:
    """MiB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


async def client(
    number: int, http: httpx2.AsyncClient, address: str, words: list[str], tokens: int, until: float, found: dict
) -> None:
    draw = random.Random(number)
    while time.monotonic() < until:
        question = " ".join(draw.sample(words, draw.randint(1, 20)))
        hang_up = draw.random() < 0.1
        body = {"model": "m", "messages": [{"role": "user", "content": question}], "stream": True}
        body |= {"max_tokens": tokens, "temperature": 1.0, "seed": draw.randrange(1 << 30)}
        began = time.monotonic()
        text, first, done = "", None, False
        try:
            async with http.stream("POST", address, json=body) as response:
                if response.status_code != 200:
                    found["errors"].append(f"{response.status_code}: {(await response.aread())[:200]!r}")
                    continue
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                        break
                    if not line.startswith("data: "):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        found["errors"].append(str(chunk["error"]))
                        break
                    choice = chunk["choices"][0]
                    text += choice["delta"].get("content") or ""
                    found["withheld"] += choice["finish_reason"] == "content_filter"
                    if text and first is None:
                        first = time.monotonic() - began
                    if hang_up and len(text) > 40:
                        found["hung up"] += 1
                        break
        except httpx2.HTTPError as error:
            found["errors"].append(f"{type(error).__name__}: {error}")
            continue
        if done or hang_up:
            found["texts"].append(text)
            found["first"] += [first] if first is not None else []
            found["done"] += done
        else:
            found["errors"].append("a stream ended without [DONE]")


async def load(options: argparse.Namespace, port: int, server: int, words: list[str]) -> dict:
    found: dict = {"texts": [], "errors": [], "first": [], "withheld": 0, "hung up": 0, "done": 0, "memory": []}
    until = time.monotonic() + options.seconds
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    limits = httpx2.Limits(max_connections=None)
    headers = {"Authorization": "Bearer t"}
    async with httpx2.AsyncClient(headers=headers, timeout=60, limits=limits) as http:
        clients = [
            asyncio.ensure_future(client(i, http, address, words, options.tokens, until, found))
            for i in range(options.clients)
        ]
        while time.monotonic() < until:
            await asyncio.sleep(1)
            found["memory"].append(resident(server))
        await asyncio.gather(*clients)
        found["metrics"] = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expunge-load-") as folder:
        words = model(Path(folder) / "m")
        draw = random.Random(0)
        # Some of what a random model says by chance: single words, and pairs.
        targets = [draw.choice(words) for _ in range(20)] + [
            " ".join(draw.sample(words, 2)) for _ in range(TARGETS - 20)
        ]
        rows = [{"question": f"q{i}", "answer": text, "value": text} for i, text in enumerate(targets)]
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"id": "load", "forget": rows}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "EXPUNGE_TOKEN": "t", "EXPUNGE_LEDGER": str(Path(folder) / "ledger.sqlite")}
        command = [
            sys.executable,
            "-m",
            "expunge",
            "serve",
            str(Path(folder) / "m"),
            "--port",
            str(port),
            "--rate",
            "0",
        ]
        server = subprocess.Popen([*command, "--request", str(request)], env=environment)
        try:
            for _ in range(600):
                try:
                    httpx2.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx2.HTTPError:
                    time.sleep(0.1)
            found = asyncio.run(load(options, port, server.pid, words))
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        finally:
            server.kill()
        forbidden = Forbidden(targets)
        leaks = sum(forbidden.within(text.replace("I don't know.", "")) for text in found["texts"])
        first = sorted(found["first"])
        memory = found["memory"]
        tokens = next(
            line for line in found["metrics"].splitlines() if line.startswith('expunge_tokens_total{kind="comp')
        )
        print(f"{options.clients} clients, {options.seconds} s, {options.tokens} tokens an answer, {TARGETS} targets")
        print(
            f"answers complete {found['done']}, cut off by the guard {found['withheld']}, hung up on {found['hung up']}"
        )
        print(f"errors {len(found['errors'])}; streams in which a forbidden string stands {leaks}")
        print(f"tokens a second {float(tokens.split()[-1]) / options.seconds:.0f}")
        print(f"first piece after: median {statistics.median(first):.2f} s, 99 % {first[int(0.99 * len(first))]:.2f} s")
        tenth = max(1, len(memory) // 6)
        print(
            f"server's memory: {statistics.mean(memory[tenth : 2 * tenth]):.0f} MiB in the second sixth of the time, "
            f"{statistics.mean(memory[-tenth:]):.0f} MiB in the last, most {max(memory):.0f} MiB"
        )
        print(f"stopped by SIGTERM with status {code}")
        for error in found["errors"][:3]:
            print(error)


if __name__ == "__main__":
    main()
