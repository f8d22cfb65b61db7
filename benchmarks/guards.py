"""What guards cost and keep as the number of targets grows: 1, 10, 100 and 1000.

The invented world's model, its forgotten people and as many other invented targets as are needed, which no model knows.
Each guard answers the same questions at every size: those of a person who is a target at all sizes, and retained ones.
A query's time is the process's CPU time for the guarded answer, one prompt at a time, all guards and sizes in turn; the
least of several rounds counts.

    python benchmarks/guards.py [--sizes 1 10 100 1000] [--rounds 5] [--guards output_filter guard alu]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from expunge import registry
from expunge.methods.guard.case import GuardCase
from expunge.metrics.matching import recovered
from expunge.rows import Row
from expunge.world.build import build
from expunge.world.facts import CODAS, ONSETS, VOWELS

SETTINGS: dict[str, dict[str, Any]] = {
    "output_filter": {},
    "guard": {"soft": 0.0, "delta": 2.0},
    "guard, by meaning": {},
    "alu": {},
}
TOKENS = 12


def invented(count: int, seed: int) -> list[list[Row]]:
    """Rows about people that no model knows, in the world's form, person by person."""
    draw = random.Random(seed)

    def word() -> str:
        return ("".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(3)) + draw.choice(CODAS)).capitalize()

    found = []
    for number in range(count):
        who, town, work = f"{word()} {word()}", word(), f"The {word()} {word()}"
        found.append(
            [
                Row(f"x{number}/0", town, f"Where was {who} born?", entity=who, value=town, relation="born_in"),
                Row(f"x{number}/1", work, f"What did {who} write?", entity=who, value=work, relation="work"),
            ]
        )
    return found


def people(rows: list[Row]) -> list[list[Row]]:
    """Rows person by person, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.entity, []).append(row)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guards", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--world", type=Path, help="a world's folder; built where it is not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expunge-guards-") as folder:
        made = options.world or build(Path(folder) / "world").path
        measure(options, made)


def measure(options: argparse.Namespace, folder: Path) -> None:
    from expunge.request import load, read_data
    from expunge.run import load_subject

    request = load(folder / "request.yaml")
    subject, data = load_subject(request), read_data(request)
    targets = [*people(data["forget"]), *invented(max(options.sizes), 0)]
    always = targets[0]
    draw = random.Random(1)
    retained = draw.sample(data["retain"], min(40, len(data["retain"])))
    held_out = [
        Row(f"{row.id}/{i}", row.answer, prompt, entity=row.entity, value=row.value, aliases=row.aliases)
        for row in always
        if row.kind == "qa"
        for i, prompt in enumerate(row.paraphrased_prompts)
    ]
    sets = {"forget": always, "other wordings": held_out, "retain": retained, "neighbour": data["neighbour"][:40]}
    asked = [*always, *retained]
    guards: dict[tuple[str, int], Any] = {}
    fitted: dict[tuple[str, int], float] = {}
    for name in options.guards:
        for size in options.sizes:
            rows = {"forget": [row for one in targets[:size] for row in one], "retain": data["retain"]}
            part = registry.get("methods", name.split(",")[0])
            began = time.perf_counter()
            guards[name, size] = part.function(GuardCase(subject, rows), **part.resolve(SETTINGS[name]))
            fitted[name, size] = time.perf_counter() - began
    cases = {("unguarded", 0): subject, **guards}
    least = dict.fromkeys(cases, float("inf"))
    for _ in range(options.rounds):
        for key, one in cases.items():
            least[key] = min(least[key], seconds(one, asked))
    print(f"{len(always)} forget and {len(retained)} retain questions, {TOKENS} tokens an answer, one at a time")
    print("| guard | targets | ms a query | against 10 targets | fit, s | " + " | ".join(sets) + " |")
    print("|---|---|---|---|---|" + "---|" * len(sets))
    for (name, size), one in cases.items():
        ms = 1000 * least[name, size] / len(asked)
        ratio = least[name, size] / least[name, 10] if (name, 10) in least else float("nan")
        known = " | ".join(f"{accuracy(one, rows):.3f}" for rows in sets.values())
        about = f"{ratio:.2f}" if size else ""
        print(f"| {name} | {size or ''} | {ms:.2f} | {about} | {fitted.get((name, size), 0):.1f} | {known} |")


def seconds(subject: Any, rows: list[Row]) -> float:
    prompts = [((row.id, "question"), subject.prompt_text(row)) for row in rows]
    # Not the clock's time: it depends on who else computes.
    began = time.process_time()
    for prompt in prompts:
        subject.generate([prompt], max_new_tokens=TOKENS)
    return time.process_time() - began


def accuracy(subject: Any, rows: list[Row]) -> float:
    prompts = [((row.id, "question"), subject.prompt_text(row)) for row in rows]
    texts = subject.generate(prompts, max_new_tokens=TOKENS).texts
    return sum(recovered(row, text[0], row.prompt) for row, text in zip(rows, texts)) / len(rows)


if __name__ == "__main__":
    main()
