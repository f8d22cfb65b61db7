"""The requests that stand: which guards are around the served subject, added and withdrawn while it answers.

Requests with one method and the same settings share one guard over all their rows, so that what an answer costs does
not grow with the number of requests. Every change is in the ledger before it holds; what is kept of a request (its
rows, which a guard needs) lies in the state folder, if there is one, and stands again after a restart.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import registry
from ..cards import MethodCard
from ..errors import ParameterError, RequestError, suggest
from ..files import write_text
from ..ledger import Ledger
from ..methods.guard.case import GuardCase
from ..rows import Row, fingerprint, rows_of
from ..tables.store import content_key

FIELDS = ("id", "method", "forget", "retain")


@dataclass(frozen=True)
class Standing:
    """One request that stands."""

    id: str
    method: str
    settings: Mapping[str, Any]
    rows: Mapping[str, list[Row]]
    body: Mapping[str, Any]
    """As it was sent."""

    @property
    def about(self) -> dict[str, Any]:
        """What may be told of it: nothing that its rows say."""
        return {"id": self.id, "method": self.method, "rows": {name: len(rows) for name, rows in self.rows.items()}}


class Guards:
    """A subject, and the guards around it."""

    def __init__(self, base: Any, ledger: Ledger, state: Path | None = None) -> None:
        """
        Args:
            base: a LanguageModel, or `proxy.Remote`.
            state: folder where requests are kept; None: they end with the process.
        """
        self.base = base
        self.subject = base
        """The base with all guards around it. It is replaced, never changed: an answer keeps the one it began with."""
        self.ledger = ledger
        self.state = state
        self._standing: dict[str, Standing] = {}
        if state is not None:
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(state.glob("*.json")):
                one = read(json.loads(path.read_text(encoding="utf-8")), str(path))
                self._standing[one.id] = one
            self.subject = self._around(self._standing)

    def list(self) -> list[dict[str, Any]]:
        return [one.about for one in self._standing.values()]

    def add(self, body: Any, where: str = "request") -> Standing:
        """Let a request stand from now on.

        Raises:
            ExpungeError: it is not one, or its guard cannot be put around this subject; nothing has changed then.
        """
        one = read(body, where)
        if one.id in self._standing:
            raise RequestError(f"{where}: a request with id {one.id!r} stands already; withdraw it first")
        salt = self.ledger.salt
        about = {"run": content_key(salt, one.id), "request": content_key(salt, one.body), "kind": "serve"}
        self.ledger.append(
            "request_received",
            **about,
            rows={name: len(rows) for name, rows in one.rows.items()},
            fingerprints={name: fingerprint(rows, salt) for name, rows in one.rows.items()},
            model=self.base.fingerprint,
            method=one.method,
            settings=dict(one.settings),
        )
        standing = {**self._standing, one.id: one}
        try:
            subject = self._around(standing)
            if self.state is not None:
                path = self._path(one.id)
                write_text(path, json.dumps({**one.body, "id": one.id}, ensure_ascii=False))
                os.chmod(path, 0o600)
        except Exception as error:
            self.ledger.append("failed", **about, error=getattr(error, "code", type(error).__name__))
            raise
        self.ledger.append("guard_added", **about, model=self.base.fingerprint, result=subject.fingerprint)
        self._standing, self.subject = standing, subject
        return one

    def withdraw(self, name: str) -> None:
        """Let a request stand no longer.

        Raises:
            RequestError: there is none of that id.
        """
        if name not in self._standing:
            raise RequestError(f"no request {name!r} stands. {suggest(name, self._standing)}")
        one = self._standing[name]
        standing = {other: what for other, what in self._standing.items() if other != name}
        subject = self._around(standing)
        salt = self.ledger.salt
        about = {"run": content_key(salt, one.id), "request": content_key(salt, one.body), "kind": "serve"}
        self.ledger.append("guard_withdrawn", **about, model=self.base.fingerprint, result=subject.fingerprint)
        if self.state is not None:
            self._path(name).unlink(missing_ok=True)
        self._standing, self.subject = standing, subject

    def _path(self, name: str) -> Path:
        assert self.state is not None
        return self.state / f"{name}.json"

    def _around(self, standing: Mapping[str, Standing]) -> Any:
        """The base with the guards of these requests around it."""
        alike: dict[str, list[Standing]] = {}
        for one in standing.values():
            alike.setdefault(content_key(one.method, dict(one.settings)), []).append(one)
        # Guards that decode stand next to the model, those that look at texts around them.
        inward = sorted(alike.values(), key=lambda several: "weights" not in _card(several[0].method).requires)
        subject = self.base
        for several in inward:
            rows: dict[str, list[Row]] = {"forget": [], "retain": []}
            for one in several:
                for name, own in one.rows.items():
                    rows[name] += [replace(row, id=f"{one.id}/{row.id}") for row in own]
            part = registry.get("methods", several[0].method)
            subject = part.function(GuardCase(subject, rows), **several[0].settings)
        return subject


def read(body: Any, where: str) -> Standing:
    """A request as it is sent: {"method": name or {"name": ..., settings}, "forget": [rows], "retain": [rows], "id"}.

    Raises:
        RequestError, RowError, ParameterError, UnknownNameError: it is not one.
    """
    if not isinstance(body, dict):
        raise RequestError(f"{where}: found {type(body).__name__}, expected an object with method and forget")
    unknown = [name for name in body if name not in FIELDS]
    if unknown:
        raise RequestError(f"{where}: there is no field {unknown[0]!r}. {suggest(unknown[0], FIELDS)}")
    name = body.get("id", uuid.uuid4().hex[:12])
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,80}", name) or not name.strip("."):
        raise RequestError(f"{where}: id is not 1 to 80 letters, digits, '.', '_' and '-'")
    given = body.get("method", "output_filter")
    settings = {} if isinstance(given, str) else dict(given) if isinstance(given, dict) else None
    method = given if isinstance(given, str) else settings.pop("name", None) if settings else None
    if not isinstance(method, str) or settings is None:
        raise RequestError(f"{where}: method: expected a name, or an object with name and settings")
    card = _card(method)
    if "gradients" in card.requires:
        raise ParameterError(f"{where}: {method} trains a model; run it with `expunge run` and serve the result")
    if settings.get("agent") == "subject":
        raise ParameterError(f"{where}: a served model cannot be its own agent; name an endpoint or leave it offline")
    rows = {}
    for part in ("forget", "retain"):
        found = body.get(part, [])
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise RequestError(f"{where}: {part}: expected a list of rows, each an object")
        if found or part == "forget":
            rows[part] = rows_of(((f"{where}: {part}[{i}]", row) for i, row in enumerate(found)), part, where)
    return Standing(name, method, registry.get("methods", method).resolve(settings), rows, body)


def _card(method: str) -> MethodCard:
    card = registry.get("methods", method).card
    assert isinstance(card, MethodCard)
    if card.kind != "guard":
        raise ParameterError(
            f"{method} is a method of kind {card.kind}; only guards are put around a model while it is served"
        )
    return card
