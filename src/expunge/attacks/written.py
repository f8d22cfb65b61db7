"""What agents wrote for attacks: each text once, for all models that are attacked and for every later run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..agents import Task, agent, parsed
from ..files import write_text
from ..tables.passes import Store
from ..tables.store import content_key


class Written:
    """A store of texts by who was asked for what; a run from it calls nobody."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store(None)
        self.kept: dict[str, list[Any]] = {}

    def lists(self, name: str, tasks: Sequence[Task], parse: Callable[[str], list[Any]]) -> list[list[Any]]:
        """What `parse` makes of each task's text; an empty list where nobody writes it, or nothing usable.

        Args:
            name: of the agent; offline, tasks without a text of their own are not written.
            parse: gives plain JSON values; raises ValueError with a sentence for the agent.

        Raises:
            AgentError, ParameterError, SubjectError: as `agent` and its `write`.
        """
        keys = [f"agent-{content_key(name, t.messages, t.max_tokens, t.temperature, t.seed)}.json" for t in tasks]
        for key in dict.fromkeys(keys):
            path = None if key in self.kept else self.store.find(key)
            if path is not None:
                self.kept[key] = json.loads(path.read_text(encoding="utf-8"))
        missing = {key: task for key, task in zip(keys, tasks) if key not in self.kept}
        if name == "offline":
            missing = {key: task for key, task in missing.items() if task.offline is not None}
        if missing:
            for key, values in zip(missing, parsed(agent(name), list(missing.values()), parse)):
                self.kept[key] = values or []
                text = json.dumps(self.kept[key], ensure_ascii=False)
                self.store.keep(key, partial(_save, text))
        return [self.kept.get(key, []) for key in keys]


def _save(text: str, path: Path) -> None:
    write_text(path, text)
