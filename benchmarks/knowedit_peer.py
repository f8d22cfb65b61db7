"""KnowEdit's scores beside EasyEdit's own functions: the same models, edits and prompts, number by number.

    python benchmarks/knowedit_peer.py --peer EasyEdit/ --model MODEL [--edits 8] [--layer 0]

MODEL is one that `expunge world build` made; edits are those of the mini version's counterfact set, each made by our
`rome` over the model. Both sides score the same edited model with the first of several answers (published tables do
so). Nothing of the peer is copied: the functions are taken from its file as it lies in the checkout, because the file
itself imports packages that nothing here needs. Its word tokenizer comes from nltk and needs no download.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FUNCTIONS = ("test_prediction_acc", "slice_list", "compute_n_gram_entropy", "compute_freq")


def peer(checkout: Path) -> dict[str, Callable[..., Any]]:
    """The peer's functions by name."""
    import functools

    import nltk
    import numpy
    import scipy.stats
    import torch

    source = (checkout / "easyeditor" / "evaluate" / "evaluate_utils.py").read_text(encoding="utf-8")
    wanted = [node for node in ast.parse(source).body if getattr(node, "name", "") in FUNCTIONS]
    words = functools.partial(nltk.word_tokenize, preserve_line=True)
    found: dict[str, Any] = {
        "np": numpy,
        "torch": torch,
        "scipy": scipy,
        "typing": typing,
        "normalize_device": lambda device: device,
        "nltk": SimpleNamespace(word_tokenize=words, ngrams=nltk.ngrams, FreqDist=nltk.FreqDist),
    }
    exec(compile(ast.Module(wanted, []), "evaluate_utils.py", "exec"), found)
    return {name: found[name] for name in FUNCTIONS}


def scored_by_peer(of: dict[str, Callable[..., Any]], before: Any, after: Any, edit: Any) -> dict[str, float]:
    """The peer's scores of one edit, put together as its KnowEdit script does."""
    import numpy as np

    settings = SimpleNamespace(max_length=40)

    def accuracy(model: Any, prompts: list[str], answers: list[str], **more: Any) -> Any:
        prediction = of["test_prediction_acc"]
        return prediction(model.model, model.tokenizer, settings, prompts, answers, model.device, **more)

    def means(probes: Any, score: Callable[[list[str], list[str]], list[float]]) -> float:
        parts = [score([p.prompt for p in several], [p.answers[0] for p in several]) for several in probes.values()]
        return float(np.mean([np.mean(part) for part in parts]))

    def alike(prompts: list[str], answers: list[str]) -> list[float]:
        both = [accuracy(model, prompts, answers, locality=True) for model in (before, after)]
        return [float(np.mean(np.equal(a, b))) for a, b in zip(*both)]

    found = {
        "edit_success": accuracy(after, [edit.prompt], [edit.target_new])[0],
        "rephrase": float(np.mean(accuracy(after, list(edit.rephrasings), [edit.target_new] * len(edit.rephrasings)))),
        "locality": means(edit.locality, alike),
    }
    if edit.portability:
        found["portability"] = means(edit.portability, lambda p, a: accuracy(after, p, a))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--layer", type=float, default=0)
    options = parser.parse_args()

    import numpy as np

    from expunge.bench import read_world
    from expunge.benchmarks.knowedit_data import factual, locate, prefixes, texts_for_keys
    from expunge.benchmarks.knowedit_mini import mini
    from expunge.edit_scores import by_edit, compared
    from expunge.methods.edit.case import EditCase
    from expunge.methods.edit.operations import carry_out
    from expunge.metrics.texts import text_entropy
    from expunge.registry import get
    from expunge.subjects.language import LanguageModel

    model = LanguageModel.load(options.model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        mini(read_world(options.model.parent.parent), folder)
        edits = factual(locate(folder, "counterfact", "test"), "first", options.edits).edits
        case = EditCase(model, {}, edits=edits, corpus=texts_for_keys(folder, ""), prefixes=prefixes(folder))
    made = carry_out(get("methods", "rome"), case, {"layer": options.layer}, "one")
    edits, asked, answers = compared(model, made, fluency=0)
    ours = by_edit(asked, answers)
    functions = peer(options.peer)
    theirs = [scored_by_peer(functions, model, one.model(), edit) for one, edit in zip(made, edits)]
    print(f"{len(edits)} edits by rome at layer {options.layer:g}")
    print(f"{'score':16}{'ours':>10}{'EasyEdit':>10}{'largest difference of an edit':>32}")
    for name in ("edit_success", "rephrase", "portability", "locality"):
        pairs = [(ours[name]["after"][i], one[name]) for i, one in enumerate(theirs) if name in one]
        a, b = np.array(pairs).T
        print(f"{name:16}{a.mean():10.4f}{b.mean():10.4f}{np.abs(a - b).max():32.1e}")
    texts = [f"{edit.prompt} {edit.target_new}, and {edit.rephrasings[0]} {edit.target_new}." for edit in edits]
    pairs = [(text_entropy(text), float(functions["compute_n_gram_entropy"](text))) for text in texts]
    a, b = np.array(pairs).T
    print(f"{'entropy, bits':16}{a.mean():10.4f}{b.mean():10.4f}{np.abs(a - b).max():32.1e}")


if __name__ == "__main__":
    main()
