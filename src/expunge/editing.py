"""Editing from the outside: a request names model, edits and editor; deltas and a scorecard come out.

    model: models/original
    edits: edits.jsonl
    method: {name: rome, layer: 0.2}
    mode: sequence
    corpus: corpus.jsonl

The folder of a run:

    request.json       the request with every setting resolved
    run.json           whose folder it is, and how far it is
    deltas/0001 ...    what each edit (of a batch: all) changed; any of them stacked are a model with those edits
    steps/0001 ...     what is needed beside them to go on
    delta/             all of them in one (not of mode `one`, where every edit is a model of its own)
    method.json        what the editor says of its run
    scorecard.json, scorecard.html
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field, PrivateAttr

from . import registry
from .edits import EditRow, given_edits, read_edits
from .environment import environment
from .errors import OutputError, ParameterError, RequestError
from .evidence import Scorecard
from .files import alone, save_tensors, write_text
from .ledger import Ledger
from .request import Common, DataSource, Place, Seed, parse, place, sentence
from .rows import Source, fingerprint, read_rows
from .tables.store import content_key

if TYPE_CHECKING:
    from .methods.edit.case import EditCase
    from .methods.edit.operations import Edited, Step
    from .subjects.language import LanguageModel

VERSION = 1
"""Raised when the same request would give other edits."""
Progress = Callable[[str, int, int], None]
"""(phase, done, total)"""
EditRows = Place | DataSource | list[Any]
"""Where edit rows are, or the rows themselves."""


class EditRequest(Common):
    """Which facts a model is to state differently, and how."""

    edits: EditRows = Field(description="Edit rows: where they are, or a list of them (docs/editing.md).")
    method: str | dict[str, Any] = Field("rome", description="Name, or {name: ..., parameter: value ...}.")
    mode: Literal["one", "batch", "sequence"] = Field(
        "sequence",
        description="one: each edit over the base by itself; batch: all in one; sequence: one after another.",
    )
    corpus: Place | DataSource | None = Field(None, description="Texts that key statistics are taken of.")
    demonstrations: EditRows | None = Field(
        None, description="Edit rows of other facts, to be shown in the context (ike) or trained on (serac, mend)."
    )
    prefixes: list[str] | None = Field(
        None, description="Texts put before prompts while values are worked out; by default the model writes its own."
    )
    fluency: Annotated[int, Field(ge=0)] = Field(100, description="Tokens of the sampled continuation; 0 is none.")
    bootstrap: Annotated[int, Field(ge=0)] = Field(1000, description="Resamples of subjects.")
    seed: Seed = Field(0, description="Draws everything random.")
    _file: str = PrivateAttr("request")


def load(path: str | Path) -> EditRequest:
    """Read an edit request; paths in it are relative to it.

    Raises:
        RequestError: the file is missing or malformed; names field, what was found and what is expected.
    """
    path = Path(path)
    values = parse(path)
    try:
        request = EditRequest.model_validate(values)
    except pydantic.ValidationError as error:
        raise RequestError(f"{path}: {sentence(error, EditRequest)}") from None
    if not request.method_name:
        raise RequestError(f"{path}: method is a mapping without a name; expected {{name: rome, layer: 0.2}}")

    def beside(source: EditRows | None) -> DataSource | list[Any] | None:
        if source is None or isinstance(source, list):
            return source
        found = DataSource(path=source) if isinstance(source, str) else source
        return found.model_copy(update={"path": place(found.path, path.parent)})

    changes: dict[str, Any] = {name: beside(getattr(request, name)) for name in ("edits", "corpus", "demonstrations")}
    changes["name"] = request.name or path.stem
    changes["model"] = place(request.model, path.parent)
    if request.out:
        changes["out"] = str((path.parent / Path(request.out).expanduser()).absolute())
    request = request.model_copy(update=changes)
    request._file = str(path)
    return request


def edit(
    request: EditRequest | str | Path,
    *,
    out: str | Path | None = None,
    method: str | None = None,
    settings: dict[str, Any] | None = None,
    mode: str | None = None,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> Scorecard:
    """Make the edits, measure them, write deltas and scorecard.

    The request is entered in the ledger before work starts. Every edit is kept as soon as it is made: a run that was
    stopped goes on behind the last one, to the same weights bit for bit, and one that is finished gives its scorecard.

    Raises:
        ExpungeError: input that cannot be used, an output folder that holds something else.
    """
    if not isinstance(request, EditRequest):
        request = load(request)
    name = method or request.method_name
    own = request.method_settings if name == request.method_name else {}
    update = {"method": {"name": name, **own, **(settings or {})}, "mode": mode or request.mode}
    request = request.model_copy(update=update)
    part = registry.get("methods", name)
    if not part.makes_edits:
        raise ParameterError(f"method {name} is of kind {part.card.kind}, expected an editor such as rome or ft_m")
    chosen = part.resolve(request.method_settings)
    edits, shown = _edits(request, "edits"), _edits(request, "demonstrations")
    # Rows in the request are kept as they were read: what else stood in them need not fit JSON.
    given = {"edits": edits, "demonstrations": shown}.items()
    own = {name: [one.record() for one in rows] for name, rows in given if isinstance(getattr(request, name), list)}
    request = request.model_copy(update=own)
    corpus = [] if request.corpus is None else read_rows(_source(request.corpus), "corpus")
    folder = Path(out or request.out or Path("runs") / request.name)

    from .methods.edit.case import EditCase
    from .methods.optimise.loop import Training
    from .subjects.language import LanguageModel, Template

    template = Template(**request.template.model_dump()) if request.template else None
    subject = LanguageModel.load(
        request.model,
        template=template,
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )
    case = EditCase(subject, {}, Training(seed=request.seed), edits=edits, corpus=corpus, prefixes=request.prefixes)
    case = replace(case, edits=case.facts(), demonstrations=shown, progress=progress)
    with alone(folder):
        return _Run(request, part, chosen, case, folder, ledger or Ledger()).carry_out()


class _Run:
    """One request in one folder."""

    def __init__(
        self,
        request: EditRequest,
        part: registry.Part,
        settings: dict[str, Any],
        case: EditCase,
        folder: Path,
        ledger: Ledger,
    ) -> None:
        self.request, self.part, self.settings, self.case = request, part, settings, case
        self.folder, self.ledger = folder, ledger
        places = {"name", "model", "edits", "corpus", "demonstrations", "out", "device"}
        self.key = content_key(
            VERSION,
            request.model_dump(exclude=places),
            settings,
            case.subject.fingerprint,
            [[one.record() for one in rows] for rows in (case.edits, case.demonstrations)],
            [asdict(replace(row, source="")) for row in case.corpus],
        )

    def carry_out(self) -> Scorecard:
        """All that is not done yet."""
        status = self._status()
        if status == "finished":
            return Scorecard.load(self.folder / "scorecard.json")
        # Salted: the key is a hash of the rows, and a guessed row could be confirmed against it.
        salt = self.ledger.salt
        about = {"run": content_key(salt, self.key), "kind": "edit"}
        if not status:
            rows = [one.row() for one in self.case.edits]
            self.ledger.append(
                "request_received",
                **about,
                rows={"edits": len(rows)},
                fingerprints={"edits": fingerprint(rows, salt)},
                model=self.case.subject.fingerprint,
                method=self.part.name,
                settings={**self.settings, "mode": self.request.mode},
                seed=self.request.seed,
            )
            self._write("request.json", self.request.model_dump())
        self.ledger.append("resumed" if status else "started", **about)
        self._mark("running")
        try:
            made, card = self._make()
        except KeyboardInterrupt:
            self.ledger.append("interrupted", **about)
            raise
        except Exception as error:
            self.ledger.append("failed", **about, error=getattr(error, "code", type(error).__name__))
            self._mark("failed")
            raise
        from .report import scorecard

        scorecard.write(card, self.folder)
        result = {"result": made[0].model().fingerprint} if len(made) == 1 else {}
        evidence = hashlib.sha256((self.folder / "scorecard.json").read_bytes()).hexdigest()
        self.ledger.append("finished", **about, **result, evidence=evidence)
        self._mark("finished")
        return card

    def _status(self) -> str:
        """What an earlier call left; "" in an empty folder.

        Raises:
            OutputError: the folder holds something else.
        """
        path = self.folder / "run.json"
        if not path.is_file():
            strangers = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")]
            if strangers:
                raise OutputError(
                    f"{self.folder} is not empty and holds no edits ({strangers[0]}); choose another --out"
                )
            return ""
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            key, status = state["key"], str(state["status"])
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{path} is damaged; choose another --out, or delete the folder to start again") from None
        if key != self.key and status == "failed" and not (self.folder / "steps").exists():
            return ""  # a run that failed before it made anything gives way to the corrected request
        if key != self.key:
            raise OutputError(f"{self.folder} holds other edits: model, rows or settings differ. Choose another --out.")
        return status

    def _mark(self, status: str) -> None:
        self._write("run.json", {"key": self.key, "status": status})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _make(self) -> tuple[list[Edited], Scorecard]:
        from .methods.edit.operations import carry_out

        case, name, progress = self.case, self.part.name, self.case.progress
        done = self._done()
        seconds = sum(found for _, found in done)
        began = time.monotonic()

        def keep(step: Step) -> None:
            nonlocal seconds, began
            took, began = time.monotonic() - began, time.monotonic()
            seconds += took
            self._keep(len(done) + len(kept) + 1, step, took)
            kept.append(step)

        kept: list[Step] = []
        made = carry_out(
            self.part,
            case,
            self.settings,
            self.request.mode,
            None if progress is None else lambda n, total: progress(f"edit: {name}", n, total),
            done=[step for step, _ in done],
            keep=keep,
        )
        steps = [step for found in made for step in found.steps]
        count = len(case.edits)
        about = {"name": name, "settings": self.settings, "seconds": round(seconds, 3), "edits": count}
        if len(made) == 1 and made[0].delta is not None:
            lineage = {**self._lineage(made[0].edits), **made[0].delta.lineage}
            replace(made[0].delta, lineage=lineage, result=made[0].model().fingerprint).save(self.folder / "delta")
        each = [{"edits": [one.id for one in step.edits], **step.summary} for step in steps]
        self._write("method.json", {**about, "steps": each})
        card = measured(case.subject, made, self.request, progress)
        return made, replace(
            card,
            benchmark="edit",
            paper=self.part.card.paper,
            summary=f"{count} edits by {name}, mode {self.request.mode}.",
            notes=[*card.notes, *(text for step in steps for text in step.warnings)],
            settings=self.settings,
            environment=environment(str(case.subject.device), str(case.subject.dtype)),
            cost={"edit": {"seconds": round(seconds, 3), "seconds per edit": round(seconds / count, 4)}},
        )

    def _lineage(self, edits: Sequence[EditRow]) -> dict[str, Any]:
        return {"method": self.part.name, "settings": self.settings, "edits": [one.id for one in edits]}

    def _keep(self, number: int, step: Step, seconds: float) -> None:
        """A step's delta is written last: where it is, all of the step is."""
        place = self.folder / "steps" / f"{number:04}"
        place.mkdir(parents=True, exist_ok=True)
        save_tensors({str(layer): keys for layer, keys in step.keys.items()}, place / "keys.safetensors")
        about = {"summary": step.summary, "warnings": list(step.warnings), "seconds": seconds}
        write_text(place / "step.json", json.dumps(about, ensure_ascii=False) + "\n")
        delta = replace(step.delta, lineage=self._lineage(step.edits))
        delta.save(self.folder / "deltas" / f"{number:04}")

    def _done(self) -> list[tuple[Step, float]]:
        """Steps that an earlier call kept, with their seconds."""
        from safetensors.torch import load_file

        from .deltas import Delta
        from .methods.edit.operations import Step

        by_name = {one.id: one for one in self.case.edits}
        found: list[tuple[Step, float]] = []
        while (place := self.folder / "deltas" / f"{len(found) + 1:04}" / "delta.json").is_file():
            delta = Delta.load(place.parent)
            beside = self.folder / "steps" / place.parent.name
            about = json.loads((beside / "step.json").read_text(encoding="utf-8"))
            keys = {int(layer): tensor for layer, tensor in load_file(beside / "keys.safetensors").items()}
            edits = tuple(by_name[name] for name in delta.lineage["edits"])
            step = Step(edits, delta, about["summary"], tuple(about["warnings"]), keys)
            found.append((step, float(about["seconds"])))
        return found


def measured(
    subject: LanguageModel, made: list[Edited], request: EditRequest, progress: Progress | None = None
) -> Scorecard:
    """Scores before and after; in a sequence after the last edit, so that what later edits undid shows."""
    from .edit_scores import compared, scores

    edits, asked, answers = compared(
        subject,
        made,
        fluency=min(request.fluency, subject.context_length // 2),
        seed=request.seed,
        progress=None if progress is None else lambda done, total: progress("measure", done, total),
    )
    models = [{"role": "before", "name": subject.name, "fingerprint": subject.fingerprint}]
    if len(made) == 1:
        models.append({"role": "after", "name": subject.name, "fingerprint": made[0].model().fingerprint})
    return scores(
        edits,
        asked,
        answers,
        models=models,
        bootstrap=request.bootstrap,
        seed=request.seed,
    )


def _edits(request: EditRequest, name: Literal["edits", "demonstrations"]) -> list[EditRow]:
    rows = getattr(request, name)
    if rows is None:
        return []
    if isinstance(rows, list):
        return given_edits(rows, f"{request._file}: {name}", name)
    return read_edits(_source(rows), name)


def _source(source: str | DataSource) -> Source:
    return Source(source) if isinstance(source, str) else Source(**source.model_dump())
