"""Editing from the outside: a request names model, edits and editor; deltas and a scorecard come out.

    model: models/original
    edits: edits.jsonl
    method: {name: rome, layer: 0.2}
    mode: sequence
    corpus: corpus.jsonl

The folder of a run:

    request.json       the request with every setting resolved
    deltas/0001 ...    what each edit (of a batch: all) changed; any of them stacked are a model with those edits
    delta/             all of them in one (not of mode `one`, where every edit is a model of its own)
    method.json        what the editor says of its run
    scorecard.json, scorecard.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from . import registry
from .edits import read_edits
from .environment import environment
from .errors import OutputError, ParameterError, RequestError, suggest
from .evidence import Scorecard
from .files import write_text
from .request import DataSource, Place, Seed, TemplateSettings, parse, place
from .rows import Source, read_rows, shown

if TYPE_CHECKING:
    from .methods.edit.operations import Edited
    from .subjects.language import LanguageModel

Progress = Callable[[str, int, int], None]
"""(phase, done, total)"""


class EditRequest(BaseModel):
    """Which facts a model is to state differently, and how."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    name: str = Field("", description="Of the run; the file's name by default.")
    model: Place = Field(description="The model: folder or hub id.")
    edits: Place | DataSource = Field(description="Edit rows (docs/editing.md).")
    method: str | dict[str, Any] = Field("rome", description="Name, or {name: ..., parameter: value ...}.")
    mode: Literal["one", "batch", "sequence"] = Field(
        "sequence",
        description="one: each edit over the base by itself; batch: all in one; sequence: one after another.",
    )
    corpus: Place | DataSource | None = Field(None, description="Texts that key statistics are taken of.")
    prefixes: list[str] | None = Field(
        None, description="Texts put before prompts while values are worked out; by default the model writes its own."
    )
    fluency: Annotated[int, Field(ge=0)] = Field(100, description="Tokens of the sampled continuation; 0 is none.")
    bootstrap: Annotated[int, Field(ge=0)] = Field(1000, description="Resamples of subjects.")
    seed: Seed = Field(0, description="Draws everything random.")
    template: TemplateSettings | None = Field(None, description="How question and answer become text (kind: qa).")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 ...; the best there is by default.")
    dtype: str | None = Field(None, description="float32, bfloat16 ...; the stored one by default.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    out: str | None = Field(None, description="Folder of the run; runs/<name> by default.")

    @property
    def method_name(self) -> str:
        return self.method if isinstance(self.method, str) else str(self.method.get("name", ""))

    @property
    def method_settings(self) -> dict[str, Any]:
        return {} if isinstance(self.method, str) else {k: v for k, v in self.method.items() if k != "name"}


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
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part not in ("DataSource", "constrained-str", "str"))
        if first["type"] == "extra_forbidden":
            raise RequestError(
                f"{path}: there is no field {field!r}. {suggest(field, EditRequest.model_fields)}"
            ) from None
        if first["type"] == "missing":
            raise RequestError(f"{path}: field {field} is missing") from None
        raise RequestError(f"{path}: field {field} is {shown(first['input'])}: {first['msg']}") from None
    if not request.method_name:
        raise RequestError(f"{path}: method is a mapping without a name; expected {{name: rome, layer: 0.2}}")

    def beside(source: str | DataSource | None) -> DataSource | None:
        if source is None:
            return None
        found = DataSource(path=source) if isinstance(source, str) else source
        return found.model_copy(update={"path": place(found.path, path.parent)})

    changes = {"edits": beside(request.edits), "corpus": beside(request.corpus), "name": request.name or path.stem}
    changes["model"] = place(request.model, path.parent)
    if request.out:
        changes["out"] = str((path.parent / Path(request.out).expanduser()).absolute())
    return request.model_copy(update=changes)


def edit(
    request: EditRequest | str | Path,
    *,
    out: str | Path | None = None,
    method: str | None = None,
    settings: dict[str, Any] | None = None,
    mode: str | None = None,
    progress: Progress | None = None,
) -> Scorecard:
    """Make the edits, measure them, write deltas and scorecard.

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
    if part.card.kind != "edit":
        raise ParameterError(f"method {name} is of kind {part.card.kind}, expected an editor such as rome or ft_m")
    chosen = part.resolve(request.method_settings)
    edits = read_edits(_source(request.edits))
    corpus = [] if request.corpus is None else read_rows(_source(request.corpus), "corpus")
    folder = Path(out or request.out or Path("runs") / request.name)
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty; choose another --out")

    from .methods.edit.case import EditCase
    from .methods.edit.operations import carry_out
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
    case.progress = progress
    case = replace(case, edits=case.facts())
    began = time.monotonic()
    tell = None if progress is None else lambda done, total: progress(f"edit: {name}", done, total)
    made = carry_out(part, case, chosen, request.mode, tell)
    seconds = round(time.monotonic() - began, 3)
    _write(folder, request, made, {"name": name, "settings": chosen, "seconds": seconds, "edits": len(edits)})
    card = measured(subject, made, request, progress)
    warnings = [text for one in made for step in one.steps for text in step.warnings]
    card = replace(
        card,
        benchmark="edit",
        paper=part.card.paper,
        summary=f"{len(edits)} edits by {name}, mode {request.mode}.",
        notes=[*card.notes, *warnings],
        settings=chosen,
        environment=environment(str(subject.device), str(subject.dtype)),
        cost={"edit": {"seconds": seconds, "seconds per edit": round(seconds / len(edits), 4)}},
    )
    from .report import scorecard

    scorecard.write(card, folder)
    return card


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


def _source(source: str | DataSource) -> Source:
    return Source(source) if isinstance(source, str) else Source(**source.model_dump())


def _write(folder: Path, request: EditRequest, made: list[Edited], method: dict[str, Any]) -> None:
    steps = [step for found in made for step in found.steps]
    write_text(folder / "request.json", json.dumps(request.model_dump(), indent=1, ensure_ascii=False) + "\n")
    for number, step in enumerate(steps, start=1):
        lineage = {"method": method["name"], "settings": method["settings"], "edits": [one.id for one in step.edits]}
        replace(step.delta, lineage=lineage).save(folder / "deltas" / f"{number:04}")
    if len(made) == 1 and made[0].delta is not None:
        lineage = {"method": method["name"], "settings": method["settings"], "edits": [e.id for e in made[0].edits]}
        replace(made[0].delta, lineage=lineage, result=made[0].model().fingerprint).save(folder / "delta")
    about = {**method, "steps": [{"edits": [one.id for one in step.edits], **step.summary} for step in steps]}
    write_text(folder / "method.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
