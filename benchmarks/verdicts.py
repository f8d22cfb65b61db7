"""The verdict as a classifier over models whose truth is known, on several world seeds.

    python benchmarks/verdicts.py [--seeds 0 1 2] [--out runs/verdicts]

Judged: the original, every gold held out against the others, an output filter around the original, and what npo,
grad_diff and idk make of it (the world's own request). Exit status 1 when a known model is judged wrongly.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from expunge import world
from expunge.evidence import Evidence
from expunge.request import load
from expunge.run import audit_model, run

METHODS = ("npo", "grad_diff", "idk")


def line(seed: int, name: str, evidence: Evidence) -> str:
    verdict = evidence.verdict
    by = f" by {', '.join(verdict.by)}" if verdict.by else ""
    flags = f" [{', '.join(verdict.flags)}]" if verdict.flags else ""
    effects = {effect.name: effect.after for effect in evidence.side_effects}
    return f"{seed:4}  {name:14}  {effects.get('retain', float('nan')):6.2f}  {verdict.verdict}{by}{flags}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/verdicts"))
    options = parser.parse_args()
    wrong = []
    print("seed  model           retain  verdict")
    for seed in options.seeds:
        folder = world.build(options.out / f"world-{seed}", seed=seed)
        request = load(folder.request)
        runs = options.out / f"runs-{seed}"
        golds = [str(gold) for gold in folder.golds]
        judged = {"original": audit_model(str(folder.original), request=request, out=runs / "original")}
        for i, gold in enumerate(golds):
            rest = [*golds[:i], *golds[i + 1 :]]
            judged[f"gold {i}"] = audit_model(gold, request=request, gold=rest, out=runs / f"gold-{i}")
        judged["output filter"] = run(request, method="output_filter", out=runs / "filter")
        judged |= {method: run(request, method=method, out=runs / method) for method in METHODS}
        for name, evidence in judged.items():
            print(line(seed, name, evidence), flush=True)
            found = evidence.verdict.verdict
            expected = {"original": found == "not_forgotten", "output filter": found == "suppressed"}
            if name.startswith("gold"):
                expected[name] = found not in ("suppressed", "not_forgotten")
            if not expected.get(name, True):
                wrong.append(f"seed {seed}: {name} was judged {found}")
        caught = [
            m for m in METHODS if judged[m].verdict.verdict == "suppressed" or "damaged" in judged[m].verdict.flags
        ]
        if not caught:
            wrong.append(f"seed {seed}: none of {', '.join(METHODS)} was judged suppressed or flagged damaged")
        tests = [f"{name} (self-test failed)" for name, e in judged.items() if e.self_test and not e.self_test.passed]
        wrong += [f"seed {seed}: {name}" for name in tests]
    print("\n".join(wrong) or "every known model was judged right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
