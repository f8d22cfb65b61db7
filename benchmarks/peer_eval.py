"""The TOFU evaluator of a locuslab/open-unlearning checkout on the model and rows of `tofu_eval.py`.

Nothing of the peer is copied: its evaluator, metrics, data sets and collator are imported from the checkout, and its
own configuration files say what is measured and how. Replaced is as little as its pinned versions make necessary:
`omegaconf` and `hydra` (plain dictionaries and a composer of these files), packages whose `__init__` imports what is
not installed, and the hub, for which a folder of TOFU's files stands in.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peer_steps import _stub

SUITES: dict[str, tuple[str, ...]] = {
    "tofu": ("forget_Truth_Ratio", "forget_quality", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility"),
}
SUITES["all"] = (
    *SUITES["tofu"],
    "mia_min_k",
    "privleak",
    "extraction_strength",
    "exact_memorization",
    "mia_min_k_plus_plus",
    "mia_loss",
    "mia_zlib",
    "mia_reference",
    "mia_gradnorm",
)
"""Names of the peer's configuration files: all that its tofu.yaml lists but the classifier of gibberish."""


class Settings(dict[str, Any]):
    """A dictionary whose entries are attributes too, as the peer reads them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def merged(first: Any, second: Any) -> Any:
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return second
    return Settings({**first, **{k: merged(first[k], v) if k in first else v for k, v in second.items()}})


def composed(file: Path, values: dict[str, str]) -> tuple[str, Settings]:
    """(the package its header names, settings) of a configuration file and the defaults it lists."""
    import yaml

    text = file.read_text(encoding="utf-8")
    package = text.partition("@package ")[2].partition("\n")[0].strip() if "@package" in text else ""
    for name, value in values.items():
        text = text.replace("${eval.tofu." + name + "}", value)
    own = json.loads(json.dumps(yaml.safe_load(text)), object_hook=Settings)
    found = Settings()
    for entry in own.pop("defaults", []):
        ((where, name),) = entry.items() if isinstance(entry, dict) else ((".", entry),)
        folder, _, place = where.partition("@")
        inner = composed((file.parent / folder / f"{name}.yaml").resolve(), values)[1]
        for key in reversed(place.split(".") if place else []):
            inner = Settings({key: inner})
        found = merged(found, inner)
    return package.rpartition(".")[2], merged(found, own)


def load(checkout: Path, folder: Path) -> Any:
    """The evaluator class, with `folder` in place of the hub."""
    import datasets

    source = checkout / "src"
    to_container = staticmethod(lambda settings, resolve=True: dict(settings))
    _stub("omegaconf", DictConfig=Settings, OmegaConf=type("OmegaConf", (), {"to_container": to_container}))
    _stub("evals", source / "evals")
    sys.path.insert(0, str(source))

    def local(path: str, name: str, split: str) -> Any:
        return datasets.load_dataset("json", data_files=str(folder / f"{name}.json"), split=split)

    vars(importlib.import_module("data.qa"))["load_hf_dataset"] = local
    return importlib.import_module("evals.tofu").TOFUEvaluator


def run(case: Any, checkout: Path) -> dict[str, Any]:
    import torch
    from tofu_eval import PREFIX, TAGS, clock, timed
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(case.folder)
    evaluator_class = load(checkout, folder / "rows")
    values = {
        "forget_split": "forget10",
        "holdout_split": "holdout10",
        "question_key": "question",
        "batch_size": str(case.batch),
        "retain_logs_path": str(folder / "gold.json"),
    }
    metrics = Settings()
    for name in SUITES[case.suite]:
        key, settings = composed(checkout / "configs/eval/tofu_metrics" / f"{name}.yaml", values)
        metrics[key] = settings
    if "mia_reference" in metrics:
        metrics["mia_reference"]["reference_model_path"] = str(folder / "gold")
    model = AutoModelForCausalLM.from_pretrained(folder / "full", dtype=getattr(torch, case.dtype)).to(case.device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "full")
    template = {"apply_chat_template": False, "system_prompt_with_special_tokens": PREFIX, **TAGS}
    out = folder / f"peer-{case.suite}-{time.time_ns()}"
    configuration = SimpleNamespace(metrics=metrics, output_dir=str(out), overwrite=True)
    evaluator = evaluator_class(configuration)
    spent: dict[str, float] = {}
    evaluator.metrics = {name: timed(spent, name, call) for name, call in evaluator.metrics.items()}
    marks = [clock()]
    summary = evaluator.evaluate(model=model, tokenizer=tokenizer, template_args=template)
    marks.append(clock())
    logs = json.loads((out / "TOFU_EVAL.json").read_text())
    return {
        "wall": marks[1][0] - marks[0][0],
        "cpu": marks[1][1] - marks[0][1],
        "spent": spent,
        "values": {name: float(value) for name, value in summary.items()},
        "parts": {name: float(logs[name]["agg_value"]) for name in logs if logs[name].get("agg_value") is not None},
    }
