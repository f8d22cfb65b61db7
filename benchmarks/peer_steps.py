"""The trainer classes and the collator of a locuslab/open-unlearning checkout on the model and rows of `steps.py`.

Nothing of the peer is copied: its files are imported from the checkout. What its pinned versions would bring and ours
do not is replaced by as little as it takes: packages without their `__init__` (which import hydra and bitsandbytes), an
empty `deepspeed`, an argument that `compute_loss` gained since. AdamW is the Trainer's default (fused), faster than the
paged one of the peer's own settings, which needs CUDA.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steps import Case

RMU_NOTE = (
    "definitions differ: the peer reads where answer tokens are fed, we where they are predicted; its mean is over "
    "rows of row means, ours over tokens"
)


def _stub(name: str, path: Path | None = None, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    if path is not None:
        module.__path__ = [str(path)]
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module


def load(checkout: Path, job: str) -> tuple[type, type]:
    """(trainer class, collator class)"""
    source = checkout / "src"
    _stub("trainer", source / "trainer")
    _stub("data", source / "data")
    if "deepspeed" not in sys.modules:
        _stub("deepspeed", DeepSpeedEngine=type("DeepSpeedEngine", (), {}))
    where, name = {
        "train": ("trainer.base", "FinetuneTrainer"),
        "grad_diff": ("trainer.unlearn.grad_diff", "GradDiff"),
        "npo": ("trainer.unlearn.npo", "NPO"),
        "rmu": ("trainer.unlearn.rmu", "RMU"),
        "rmu3": ("trainer.unlearn.rmu", "RMU"),
    }[job]
    collator = importlib.import_module("data.collators").DataCollatorForSupervisedDataset
    return getattr(importlib.import_module(where), name), collator


def settings(job: str, layer: int, steering: float) -> dict[str, Any]:
    """The peer's own configuration of each method; RMU at our layer and coefficient."""
    retain = {"gamma": 1.0, "alpha": 1.0, "retain_loss_type": "NLL"}
    if job == "train":
        return {}
    if job == "grad_diff":
        return retain
    if job == "npo":
        return {**retain, "beta": 0.1}
    below = "|".join(map(str, range(layer + 1)))
    return {
        **retain,
        "retain_loss_type": "EMBED_DIFF",
        "steering_coeff": steering,
        "module_regex": rf"model\.layers\.{layer}",
        "trainable_params_regex": [".*" if job == "rmu" else rf"model\.layers\.({below})\.mlp\.down_proj\.weight"],
    }


def run(case: Case, checkout: Path) -> dict[str, Any]:
    import torch
    from steps import READ, STEERING, Stamps, decided, setting, warm
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    trainer_class, collator_class = load(checkout, case.job)
    subject, data, training = setting(case)
    setup = decided(case, subject, data, training)
    drawn, given, model = setup.drawn, setup.case.given, subject.model

    def tensors(side: str, index: int) -> dict[str, torch.Tensor]:
        row = drawn.rows[side][index]
        return {
            "input_ids": torch.tensor(row.ids),
            "labels": torch.tensor([-100] * row.start + list(row.ids[row.start :])),
        }

    rows: list[Any] = []
    for step in drawn.steps:
        sides = {side: [tensors(side, i) for i in places] for side, places in step.items()}
        rows += sides["retain"] if len(sides) == 1 else [dict(zip(sides, pair)) for pair in zip(*sides.values())]

    class Adapted(trainer_class):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **(more if case.job == "train" else {}))
            losses.append(loss.detach())  # the Trainer's own log rounds to four digits
            return loss

        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(rows)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            stamps.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.mark()

    losses: list[torch.Tensor] = []
    batch = len(rows) // len(drawn.steps)
    warm(case)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=len(drawn.steps),
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=case.dtype == "bf16",
            logging_steps=5,
            logging_first_step=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=case.device == "cpu",
            dataloader_pin_memory=case.device == "cuda",
            seed=0,
        )
        stamps = Stamps(case.device)
        trainer = Adapted(
            **settings(case.job, READ, STEERING),
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator_class(SimpleNamespace(pad_token_id=0)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Watch())
        if "targets" in given:
            trainer.control_vec = given["targets"][None].cpu()
        trainer.train()
    first = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    return {
        **stamps.result(),
        "loss": float(losses[0]),
        "norm": first["grad_norm"],
        "note": RMU_NOTE if case.job.startswith("rmu") else "",
    }
