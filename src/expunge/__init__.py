"""expunge removes knowledge from trained models and proves that it is gone.

    evidence = expunge.forget("request.yaml")
    print(evidence.verdict.verdict)

Importing the package is cheap: every function imports what it needs when it is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evidence import Evidence, Scorecard
    from .subjects.language import LanguageModel

    __version__: str

# Large tensors on huge pages where Linux gives them on request: most of what a large operation waits for on a CPU is
# fresh memory. PyTorch reads this when it allocates for the first time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["__version__", "audit", "bench", "forget", "load"]


def forget(
    request: str | Path,
    *,
    out: str | Path | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    scope: str | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Evidence:
    """Carry out a request: change the model, attack the result, write the report. Resumes what was interrupted.

    Args:
        request: the request file (YAML or JSON).
        out: folder for the delta, the tables and the report; the request's own `out` by default.
        method: another method than the request's.
        settings: parameters of the method, e.g. `{"beta": 0.2}`.
        scope: another scope than the request's, e.g. `"role:mlp_out@5-7"`.
        overrides: other fields of the request by dotted name, e.g. `{"training.epochs": 3}`.

    Raises:
        ExpungeError: the request, the rows or the model are not what they must be; the message says what to mend.
    """
    from .run import forget as run_forget

    return run_forget(request, out=out, method=method, settings=settings, scope=scope, overrides=overrides)


def audit(
    model: str | Path | LanguageModel,
    *,
    request: str | Path,
    gold: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    out: str | Path | None = None,
) -> Evidence:
    """Attack and judge a model that is said to have forgotten; nothing is changed.

    Args:
        model: the model under suspicion: a folder, a hub id or a loaded model.
        request: the request file that names what should be gone.
        gold: models retrained without the forget rows; the request's own by default.
        original: the model before; the request's `model` by default.
        out: folder for tables and report.
    """
    from .run import audit_model

    return audit_model(model, request=request, gold=gold, original=original, out=out)


def bench(
    name: str,
    model: str | Path | LanguageModel,
    *,
    original: str | Path | LanguageModel | None = None,
    gold: Sequence[str | Path | LanguageModel] = (),
    data: str = "",
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> Scorecard:
    """Run a benchmark on a model.

    Args:
        name: the benchmark, e.g. "tofu"; `expunge list benchmarks` shows all.
        model: a folder, a hub id, the folder of a run, or a loaded model.
        original: the model before unlearning; a run's folder knows its own.
        gold: models retrained without the forget rows.
        data: folder with the published files, or a hub id; empty takes the mini version.
        settings: parameters of the benchmark.
        out: folder for tables and scorecard; runs/bench/NAME by default.
    """
    from .bench import bench as run_bench

    return run_bench(name, model, original=original, gold=gold, data=data, settings=settings, out=out)


def load(path: str | Path, **options: Any) -> LanguageModel:
    """Load a Hugging Face model folder or hub id, with the options of `LanguageModel.load`."""
    from .subjects.language import LanguageModel

    return LanguageModel.load(path, **options)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("expunge")
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `expunge.audit` the function when the module of that name is imported, which would take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
