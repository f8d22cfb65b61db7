"""The main job: a request goes in; a changed model and its evidence come out.

Killed anywhere, the same command goes on. Several processes of one launch all come through here: passes and training
are shared out below, the first process alone holds the folder and the ledger.

The folder of a run:

    run.json        what this run is (its key) and how far it got
    request.json    the request with every setting resolved
    checkpoint/     the optimiser's state while a method runs
    delta/          what the method changed
    method.json     what the method says of its run
    tables/         what the models said, as arrow files
    evidence.json, report.html, report.md
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import processes, registry
from .cards import MethodCard, card_dict
from .environment import environment, versions
from .errors import LaunchError, OutputError, RequestError
from .evidence import Evidence
from .files import alone, write_text
from .inference import Rule
from .ledger import Ledger
from .request import Request, check, load, named, read_data
from .rows import Row
from .tables.store import content_key
from .tables.view import candidates

if TYPE_CHECKING:
    from .subjects.language import LanguageModel

Progress = Callable[[str, int, int], None]
"""(phase, done, total)"""

VERSION = 2
"""Raised when the same request would give another result than before; runs of another version are not resumed."""


def forget(
    request: str | Path,
    *,
    out: str | Path | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    scope: str | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Carry out the request file; see `expunge.forget`."""
    made = load(request, overrides)
    return run(made, out=out, method=method, settings=settings, scope=scope, progress=progress)


def run(
    request: Request,
    *,
    out: str | Path | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    scope: str | Mapping[str, Any] | None = None,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Change the model, attack the result, judge it, write the report.

    Nothing is written before the request, its rows, the model and the scope have been found usable together; then the
    request is entered in the ledger, and only then does work start.

    Raises:
        ExpungeError: input that cannot be used, an output folder that holds another run.
    """
    processes.start()
    request = with_method(request, method, settings, scope)
    check(request)
    data = read_data(request)
    subject = load_subject(request)
    check_fit(request, data, subject)
    folder = Path(out or request.out or Path("runs") / request.name)
    job = _Job(request, data, subject, folder, ledger or Ledger(), progress)
    with alone(folder):
        return job.carry_out(change=True)


def audit_model(
    model: str | Path | LanguageModel,
    *,
    request: Request | str | Path,
    gold: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    out: str | Path | None = None,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Attack and judge a model that is said to have forgotten; see `expunge.audit`."""
    processes.start()
    if not isinstance(request, Request):
        request = load(request)
    changes: dict[str, Any] = {}
    if gold is not None:
        changes["gold"] = [str(path) for path in gold]
    if original is not None:
        changes["model"] = str(original)
    request = request.model_copy(update=changes)
    check(request)
    data = read_data(request)
    before = load_subject(request)
    _serves(request, before)
    _encode(data, before)
    after = _suspect(model, request, before)
    folder = Path(out or Path("runs") / f"{request.name}-audit")
    job = _Job(request, data, before, folder, ledger or Ledger(), progress, after=after)
    with alone(folder):
        return job.carry_out(change=False)


# --- pieces ----------------------------------------------------------------------------------------------------------


def with_method(
    request: Request,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    scope: str | Mapping[str, Any] | None = None,
) -> Request:
    """The request with another method, parameters or scope; parameters of another method are not carried over."""
    name = method or request.method_name
    own = request.method_settings if name == request.method_name else {}
    changes: dict[str, Any] = {"method": {"name": name, **own, **(settings or {})}}
    if scope is not None:
        changes["scope"] = dict(scope) if isinstance(scope, Mapping) else scope
    return request.model_copy(update=changes)


def check_fit(request: Request, data: Mapping[str, list[Row]], subject: LanguageModel) -> None:
    """Whether model, rows, method and scope fit one another: what would stop the run later, found without computing.

    Raises:
        RowError: a row does not fit the model.
        RequestError: rows the method needs are missing; method, an attack or a metric is for models of another kind.
        ScopeError: the scope matches nothing that can move.
    """
    _serves(request, subject)
    _encode(data, subject)
    part = registry.get("methods", request.method_name)
    registry.check_serves(part, subject)
    settings = part.resolve(request.method_settings)
    if isinstance(part.card, MethodCard) and "training_checkpoints" in part.card.requires:
        raise RequestError(
            f"{part.name} owns training, so a request cannot carry it out: `expunge exact train` lays the rows out and "
            "trains, `expunge exact delete` deletes (docs/exact.md)"
        )
    if part.card.kind == "edit":
        from .methods.optimise.scope import resolve

        resolve("all" if request.scope is None else request.scope, subject.model)
        # An edit that begins with an objective needs what the objective needs.
        objective = settings.get("objective")
        if objective is None:
            return
        name, settings = (objective, {}) if isinstance(objective, str) else next(iter(objective.items()))
        part = registry.get("methods", name)
    if part.card.kind == "optimise":
        from .methods.optimise.unlearn import set_up

        set_up(subject, part, settings, scope=request.scope, data=data, training=request.training.made(), dry=True)


def _serves(request: Request, subject: Any) -> None:
    """
    Raises:
        RequestError: an attack or metric of the request is for models of another kind.
    """
    for room, asked in (("attacks", request.audit.attacks), ("metrics", request.audit.metrics)):
        for name, _ in named(asked) or []:
            registry.check_serves(registry.get(room, name), subject)


def _encode(data: Mapping[str, list[Row]], subject: LanguageModel) -> None:
    """Tokenise everything that will be trained on or scored, for the errors' sake."""
    for rows in data.values():
        for row in rows:
            for text in candidates(row).values():
                subject.encode(row, answer=text)


def load_subject(request: Request, path: str | None = None) -> Any:
    """The request's model, or another one of the same kind, under the same template, device and type."""
    from .subjects.language import Template
    from .subjects.opening import kind_of, open_subject

    template = Template(**request.template.model_dump()) if request.template else None
    if processes.count() > 1 and ":" in (request.device or ""):
        raise LaunchError(f"device: {request.device} names one device for {processes.count()} processes; leave it out")
    return open_subject(
        path or request.model,
        kind=request.subject or kind_of(request.model),
        device=request.device,
        dtype=request.dtype,
        template=template,
        trust_remote_code=request.trust_remote_code,
    )


def _suspect(model: str | Path | LanguageModel, request: Request, before: LanguageModel) -> Any:
    """The model under suspicion: a loaded one, a model folder, or the folder of a run."""
    if not isinstance(model, str | Path):
        return model
    folder = Path(model)
    if (folder / "delta" / "delta.json").is_file():
        from .deltas import Delta
        from .methods.edit.operations import changed

        return changed(Delta.load(folder / "delta"), before, read_data(request))
    return load_subject(request, str(model))


class _Job:
    """One request in one folder."""

    def __init__(
        self,
        request: Request,
        data: dict[str, list[Row]],
        subject: LanguageModel,
        folder: Path,
        ledger: Ledger,
        progress: Progress | None,
        after: Any = None,
    ) -> None:
        self.request = request
        self.data = data
        self.subject = subject
        self.folder = folder
        self.ledger = ledger
        self.progress = progress
        self.after = after
        self.golds = [load_subject(request, path) for path in request.gold]
        from .audit import comparable

        comparable(subject, self.golds)
        settings = request.model_dump(exclude={"name", "reason", "model", "subject", "gold", "data", "out", "device"})
        self.key = content_key(
            VERSION,
            settings,
            subject.fingerprint,
            [gold.fingerprint for gold in self.golds],
            after.fingerprint if after is not None else None,
            {name: [row.content() for row in rows] for name, rows in data.items()},
        )
        processes.same("models, rows or settings", self.key)

    def carry_out(self, *, change: bool) -> Evidence:
        """All phases that are not done yet."""
        state = processes.once(self._state)
        if state.get("status") == "finished" and (self.folder / "evidence.json").is_file():
            return Evidence.load(self.folder / "evidence.json")
        from .request import warnings
        from .rows import fingerprint

        salt = processes.once(lambda: self.ledger.salt)
        prints = {name: fingerprint(rows, salt) for name, rows in self.data.items()}
        # Salted as well: the key is a hash of the rows, and a guessed row could be confirmed against it.
        about = {
            "run": content_key(salt, self.key),
            "request": content_key(salt, self.request.model_dump()),
            "kind": _kind(change),
        }
        if not state:
            self._enter(
                "request_received",
                **about,
                rows={name: len(rows) for name, rows in self.data.items()},
                fingerprints=prints,
                model=self.subject.fingerprint,
                gold=[gold.fingerprint for gold in self.golds],
                method=self.request.method_name if change else None,
                settings=self.request.method_settings if change else None,
                scope=self.request.scope if change else None,
                proof=self.request.proof,
            )
            self._write("request.json", self.request.model_dump())
        self._enter("resumed" if state else "started", **about, versions=versions())
        self._write("run.json", {"key": self.key, "status": "running", "method": self.request.method_name})
        try:
            method = self._change() if change else {"name": "audit of a given model", "settings": {}}
            evidence = self._audit(method, prints, warnings(self.data))
        except KeyboardInterrupt:
            self._enter("interrupted", **about)
            raise
        except Exception as error:
            self._write("run.json", {"key": self.key, "status": "failed", "method": self.request.method_name})
            self._enter("failed", **about, error=getattr(error, "code", type(error).__name__))
            raise
        if not processes.first():
            return evidence
        from . import report

        evidence.save(self.folder / "evidence.json")
        report.write(evidence, self.folder)
        self._enter(
            "finished",
            **about,
            result=self.after.fingerprint,
            verdict=evidence.verdict.verdict,
            flags=evidence.verdict.flags,
            evidence=hashlib.sha256((self.folder / "evidence.json").read_bytes()).hexdigest(),
        )
        self._write("run.json", {"key": self.key, "status": "finished", "method": self.request.method_name})
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return evidence

    def _state(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        if not path.is_file():
            strangers = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")]
            if strangers:
                raise OutputError(f"{self.folder} is not empty and holds no run ({strangers[0]}); choose another --out")
            return {}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            key = state["key"]
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{path} is damaged; choose another --out, or delete the folder to start again") from None
        if key != self.key and state.get("status") == "failed" and not (self.folder / "delta").exists():
            return {}  # a run that failed before it made anything gives way to the corrected request
        if key != self.key:
            raise OutputError(
                f"{self.folder} holds another run (method {state.get('method')}): request, model, rows or settings "
                "differ. Choose another --out."
            )
        return dict(state)

    def _enter(self, event: str, **fields: Any) -> None:
        """An entry in the ledger."""
        if processes.first():
            self.ledger.append(event, **fields)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if processes.first():
            write_text(self.folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _tell(self, phase: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(phase, done, total)

    def _change(self) -> dict[str, Any]:
        """Run the method, or read what it left before; afterwards `self.after` is the changed subject."""
        from .deltas import Delta
        from .methods.edit.operations import changed

        done = self.folder / "method.json"
        if processes.once(lambda: done.is_file() and (self.folder / "delta" / "delta.json").is_file()):
            self.after = changed(Delta.load(self.folder / "delta"), self.subject, self.data)
            return dict(json.loads(done.read_text(encoding="utf-8")))
        part = registry.get("methods", self.request.method_name)
        settings = part.resolve(self.request.method_settings)
        method: dict[str, Any] = {"name": part.name, "card": card_dict(part.card), "settings": settings}
        began = time.monotonic()
        outcome: Any = None
        if part.card.kind == "optimise":
            from .methods.optimise.unlearn import unlearn

            outcome = unlearn(
                self.subject,
                part,
                settings,
                scope=self.request.scope,
                data=self.data,
                training=self.request.training.made(),
                folder=self.folder,
                progress=self._tell(f"change: {part.name}"),
            )
            delta, method = outcome.delta, {**method, **outcome.summary}
        elif part.card.kind in ("edit", "exact"):
            from .methods.edit.case import EditCase

            case = EditCase(
                self.subject,
                self.data,
                self.request.training.made(),
                self.request.scope,
                self.folder / "checkpoint",
                self.progress,
            )
            delta = part.function(case, **settings)
            method |= {"phases": case.summary, "warnings": case.warnings, "scope": self.request.scope or "all"}
            method["tokens"] = sum(phase.get("tokens", 0) for phase in case.summary.values())
        elif part.card.kind == "guard":
            delta = Delta(self.subject.fingerprint, config={"name": part.name, "settings": settings})
            method["scope"] = "none"
        else:
            raise RequestError(f"method {part.name} is of kind {part.card.kind}, which runs cannot carry out yet")
        cost = {"seconds": round(time.monotonic() - began, 3), "tokens": method.get("tokens", 0)}
        if outcome is not None:
            reached = _speed(self.subject, outcome, self.request.training.made())
            method["log"]["flop_per_second"] = reached.pop("steps", {})
            method["warnings"] += reached.pop("warnings", [])
            cost |= reached
        if processes.first() or delta.config is not None:
            self.after = changed(delta, self.subject, self.data)

        def keep() -> dict[str, Any]:
            replace(delta, result=self.after.fingerprint).save(self.folder / "delta")
            self._write("method.json", {**method, "cost": {**cost, "peak_memory_bytes": _peak_memory()}})
            return dict(json.loads(done.read_text(encoding="utf-8")))

        method = processes.once(keep)
        if self.after is None:  # the delta is the truth: other processes take the weights that the first one wrote
            self.after = changed(Delta.load(self.folder / "delta"), self.subject, self.data)
        return method

    def _audit(self, method: dict[str, Any], prints: dict[str, str], warnings: list[str]) -> Evidence:
        from .audit import audit

        request = self.request
        own = [f"The method: {text}." for text in method.get("warnings", [])]
        if method.get("stopped"):
            own.append(f"The stopping rule ended the run {method['stopped']}.")
        if method.get("stopped_by_guard"):
            own.append(
                f"The utility guard stopped the run after {method['steps']} of {method['steps_planned']} steps and "
                f"stepped back to step {method['stepped_back_to']}."
            )
        return audit(
            self.after,
            before=self.subject,
            golds=self.golds,
            data=self.data,
            folder=self.folder,
            method=method,
            request={
                "name": request.name,
                "reason": request.reason,
                "proof": request.proof,
                "access": request.access,
                "fingerprints": prints,
                "run": self.key,
            },
            attacks=named(request.audit.attacks),
            metrics=named(request.audit.metrics),
            rules_of_inference=[Rule(rule.implies, tuple(rule.by)) for rule in request.rules],
            gold_kind=request.gold_kind,
            access=request.access,
            proof=request.proof,
            seed=request.audit.seed,
            bootstrap=request.audit.bootstrap,
            max_new_tokens=request.audit.max_new_tokens,
            self_test=request.audit.self_test,
            shared=self.folder.parent / ".expunge-tables",
            environment=environment(str(self.subject.device), str(self.subject.dtype)),
            cost={"change": method["cost"]} if "cost" in method else {},
            warnings=[*warnings, *own],
            progress=self.progress,
        )


def _kind(change: bool) -> str:
    return "change" if change else "audit"


def _speed(subject: Any, outcome: Any, training: Any) -> dict[str, Any]:
    """What the steps reached; a model that it cannot be counted for ends no run."""
    from .arithmetic import achieved

    try:
        return achieved(subject, outcome, training)
    except Exception as error:
        return {"warnings": [f"its arithmetic could not be counted: {error}"]}


def _peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
