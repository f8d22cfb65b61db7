"""Language models that work for a guard or an attack: they rewrite, rate, paraphrase and ask.

What is to be written is a `Task`: messages for a language model, and beside them the text that is written where there
is none (`offline`), so that everything runs on any machine and gives the same text every time. Who writes is named in
one word or address (`agent`):

    offline                              the tasks' own deterministic texts; the default everywhere
    https://host/v1#model                an OpenAI-compatible endpoint; its key is in EXPUNGE_AGENT_KEY
    subject                              the model that is guarded or attacked itself
    some/model                           a folder or hub id of a causal language model, run here

    writer = agent("offline")
    writer.write([Task((("user", "Ask where Ilva was born."),), templates(["Where was {name} born?"], name="Ilva"))])
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, TypeVar

from .errors import AgentError, ParameterError
from .rows import Message, Row

T = TypeVar("T")

KEY = "EXPUNGE_AGENT_KEY"
TRIES = 4
"""Attempts at one call of an endpoint that is busy or out of reach."""
LONGEST_WAIT = 30.0
"""Seconds between two of them, whatever the endpoint asks for."""


@dataclass(frozen=True)
class Task:
    """One text to be written."""

    messages: tuple[Message, ...]
    """(role, content): the instruction, the last turn is the user's."""
    offline: Callable[[random.Random], str] | None = None
    """The text where no language model writes; it draws from the generator only, whose seed follows from the task."""
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    """Tasks that differ in nothing else get different samples (temperature above 0), or draws offline."""


@dataclass
class Spent:
    """What an agent was asked for so far."""

    calls: int = 0
    prompt_tokens: int = 0
    """0 where nobody counts: offline, and endpoints that do not say."""
    written_tokens: int = 0
    seconds: float = 0.0


class Agent(Protocol):
    """Whoever writes. `name` says who, without secrets, and belongs into content keys."""

    name: str
    spent: Spent

    def write(self, tasks: Sequence[Task]) -> list[str]:
        """A text for each task, in their order; without spaces around it.

        Raises:
            AgentError: it cannot be written.
        """
        ...


def agent(name: str = "offline", *, subject: Any = None, timeout: float = 60.0, parallel: int = 8) -> Agent:
    """The agent of that name (see above).

    Args:
        subject: the LanguageModel (or guard around one) that "subject" stands for.
        timeout: seconds an endpoint may take for one text.
        parallel: calls of an endpoint at once.

    Raises:
        ParameterError: an address without a model, or no subject where one is named.
        SubjectError: no such local model.
    """
    if name == "offline":
        return Offline()
    if re.match(r"https?://", name):
        address, _, model = name.partition("#")
        if not model:
            raise ParameterError(f"agent {name!r} names no model; expected ADDRESS#MODEL, e.g. {address}#gpt-4o-mini")
        return Endpoint(address, model, key=os.environ.get(KEY, ""), timeout=timeout, parallel=parallel)
    if name == "subject":
        if subject is None:
            raise ParameterError("agent 'subject': there is no subject here; name a model or an endpoint")
        return Local(subject)
    from .subjects.language import LanguageModel

    return Local(LanguageModel.load(name))


# --- what is asked ---------------------------------------------------------------------------------------------------


def templates(lines: Sequence[str], **fields: str) -> Callable[[random.Random], str]:
    """An offline text: one of the lines, drawn by the task's seed, with its {fields} filled in."""
    # Not str.format: a value may hold braces itself.
    pattern = re.compile("|".join(re.escape("{" + name + "}") for name in fields) or r"(?!)")

    def write(draw: random.Random) -> str:
        return pattern.sub(lambda found: fields[found[0][1:-1]], draw.choice(list(lines)))

    return write


def parsed(agent: Agent, tasks: Sequence[Task], parse: Callable[[str], T], *, tries: int = 3) -> list[T | None]:
    """What `parse` makes of each text; a text that it refuses is asked for again, with what was wrong.

    Args:
        parse: raises ValueError with a sentence for the agent.
        tries: attempts in all; what no attempt gives is None, and the caller must have an answer to that.
    """
    found: list[T | None] = [None] * len(tasks)
    left = list(enumerate(tasks))
    for _ in range(tries):
        again = []
        for (place, task), text in zip(left, agent.write([task for _, task in left])):
            try:
                found[place] = parse(text)
            except ValueError as error:
                turns = (("assistant", text), ("user", f"That cannot be used: {error}. Answer again."))
                again.append((place, replace(task, messages=(*task.messages, *turns), seed=task.seed + 1)))
        left = again
        if not left:
            break
    return found


def listed(text: str) -> list[str]:
    """The entries of a list as language models write them: JSON, or lines with numbers or bullets before them.

    Raises:
        ValueError: it is no list.
    """
    found = re.search(r"\[.*\]", text, re.DOTALL)
    if found:
        try:
            values = json.loads(found[0])
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, list) and all(isinstance(value, str | int | float) for value in values):
            return [str(value).strip() for value in values]
    lines = re.findall(r"^\s*(?:\d+[.):]|[-*•])\s+(.+?)\s*$", text, re.MULTILINE)
    if not lines:
        raise ValueError("expected a list, as JSON or one entry a line with a number before it")
    return lines


# --- who writes ------------------------------------------------------------------------------------------------------


class Offline:
    """No language model: every task's own text."""

    name = "offline"

    def __init__(self) -> None:
        self.spent = Spent()

    def write(self, tasks: Sequence[Task]) -> list[str]:
        texts = []
        for task in tasks:
            if task.offline is None:
                raise AgentError("this cannot be written offline; name an agent: an endpoint or a model")
            texts.append(task.offline(random.Random(f"{task.seed}/{task.messages}")).strip())
        self.spent.calls += len(tasks)
        return texts


class Local:
    """A causal language model that runs here; without a chat template it reads the messages one below the other."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject
        self.name = f"local {subject.fingerprint}"
        self.spent = Spent()

    def write(self, tasks: Sequence[Task]) -> list[str]:
        began = time.monotonic()
        texts: list[str] = [""] * len(tasks)

        def alike(place: int) -> tuple[int, float, int]:
            return tasks[place].max_tokens, tasks[place].temperature, tasks[place].seed

        for (limit, temperature, seed), group in groupby(sorted(range(len(tasks)), key=alike), alike):
            places = list(group)
            prompts = [((str(place), "agent"), self._prompt(tasks[place])) for place in places]
            made = self.subject.generate(prompts, max_new_tokens=limit, temperature=temperature, seed=seed)
            for place, (key, prompt), written in zip(places, prompts, made.texts):
                texts[place] = written[0].strip()
                self.spent.prompt_tokens += len(self.subject.prompt_ids(prompt, key))
                self.spent.written_tokens += len(self.subject.tokenizer(written[0])["input_ids"])
        self.spent.calls += len(tasks)
        self.spent.seconds += time.monotonic() - began
        return texts

    def _prompt(self, task: Task) -> str:
        last = task.messages[-1][1]
        row = Row("agent", "-", last, task.messages, "chat")
        if not self.subject.chats(row):
            row = Row("agent", "-", "\n\n".join(content for _, content in task.messages) + "\n", (), "completion")
        return str(self.subject.prompt_text(row))


class Endpoint:
    """A chat model behind an OpenAI-compatible address, e.g. https://api.openai.com/v1, vLLM's or `expunge serve`'s."""

    def __init__(self, address: str, model: str, *, key: str = "", timeout: float = 60.0, parallel: int = 8) -> None:
        """
        Args:
            key: sent as a bearer token where it is not empty.
        """
        try:
            import httpx2
        except ImportError:
            raise AgentError("an endpoint as agent needs the extra: pip install 'expunge[agents]'") from None
        self.name = f"{address}#{model}"
        self.model = model
        self.parallel = parallel
        self.spent = Spent()
        self._lock = threading.Lock()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._failures = (httpx2.TransportError,)
        self._client = httpx2.Client(headers=headers, timeout=timeout)
        self._address = address.rstrip("/") + "/chat/completions"

    def write(self, tasks: Sequence[Task]) -> list[str]:
        began = time.monotonic()
        with ThreadPoolExecutor(max(1, min(self.parallel, len(tasks)))) as pool:
            texts = list(pool.map(self._one, tasks))
        self.spent.seconds += time.monotonic() - began
        return texts

    def _one(self, task: Task) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": role, "content": content} for role, content in task.messages],
            "max_tokens": task.max_tokens,
            "temperature": task.temperature,
            "seed": task.seed,
        }
        answer = self._post(body)
        try:
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            if not isinstance(text, str | None):
                raise TypeError
        except (LookupError, TypeError, ValueError, AttributeError):
            raise AgentError(f"{self.name} answered something else than a chat completion") from None
        with self._lock:
            self.spent.calls += 1
            self.spent.prompt_tokens += counts[0]
            self.spent.written_tokens += counts[1]
        return (text or "").strip()

    def _post(self, body: dict[str, Any]) -> Any:
        """The answer as JSON; an endpoint that is busy or out of reach is tried again."""
        why = ""
        for attempt in range(TRIES):
            wait = min(0.5 * 2**attempt, LONGEST_WAIT)
            try:
                response = self._client.post(self._address, json=body)
            except self._failures as error:
                why = f"cannot be reached ({type(error).__name__}: {error})"
            else:
                if response.status_code == 200:
                    try:
                        return response.json()
                    except ValueError:
                        raise AgentError(f"{self.name} answered something that is not JSON") from None
                why = f"answered {response.status_code}: {response.text[:200]}"
                if response.status_code != 429 and response.status_code < 500:
                    break
                asked = response.headers.get("retry-after", "")
                wait = min(float(asked), LONGEST_WAIT) if re.fullmatch(r"\d+(\.\d+)?", asked) else wait
            if attempt + 1 < TRIES:
                time.sleep(wait)
        raise AgentError(f"{self.name} {why}")
