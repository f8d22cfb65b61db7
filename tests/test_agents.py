"""Agents: who writes for guards and attacks."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tiny import tiny

import expunge.agents as agents
from expunge.agents import Task, agent, listed, parsed, templates
from expunge.errors import AgentError, ParameterError
from expunge.subjects.language import LanguageModel

ASKED = (("user", "Where?"),)


class Backend(ThreadingHTTPServer):
    """A chat endpoint that answers what it is told to, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, dict[str, str], str]] = []
        self.seen: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def agent_name(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1#small"


class _Handler(BaseHTTPRequestHandler):
    server: Backend

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.seen.append({**body, "path": self.path, "key": self.headers.get("authorization")})
            said = f"about {body['messages'][-1]['content']}"
            usage = {"prompt_tokens": 3, "completion_tokens": 2}
            good = json.dumps({"choices": [{"message": {"content": f" {said} "}}], "usage": usage})
            status, headers, text = self.server.answers.pop(0) if self.server.answers else (200, {}, good)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def backend() -> Iterator[Backend]:
    server = Backend()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_offline_texts_are_drawn_by_the_task_and_nothing_else() -> None:
    choice = templates(["{who} in {where}", "{where}: {who}"], who="{where}", where="Tivin")
    tasks = [Task(ASKED, choice, seed=seed) for seed in range(20)]
    made = agent().write(tasks)
    assert made == [*agent().write(tasks[:10]), *agent().write(tasks[10:])]
    assert set(made) == {"{where} in Tivin", "Tivin: {where}"}  # a value is not filled in again


def test_a_task_without_an_offline_text_is_refused_offline() -> None:
    with pytest.raises(AgentError, match="name an agent"):
        agent("offline").write([Task(ASKED)])


def test_an_endpoint_gets_every_task_and_answers_in_order(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(agents.KEY, "secret")
    writer = agent(backend.agent_name)
    tasks = [Task((("system", "s"), ("user", str(i))), max_tokens=7, temperature=0.5, seed=i) for i in range(12)]
    assert writer.write(tasks) == [f"about {i}" for i in range(12)]
    first = min(backend.seen, key=lambda one: one["seed"])
    assert first == {
        "model": "small",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "0"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 0,
        "path": "/v1/chat/completions",
        "key": "Bearer secret",
    }
    assert (writer.spent.calls, writer.spent.prompt_tokens, writer.spent.written_tokens) == (12, 36, 24)
    assert "secret" not in writer.name


def test_a_busy_endpoint_is_tried_again_and_as_late_as_it_asks(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(agents.time, "sleep", waits.append)
    backend.answers = [(503, {}, "down"), (429, {"retry-after": "7"}, "slow"), (429, {"retry-after": "9999"}, "slow")]
    assert agent(backend.agent_name).write([Task(ASKED)]) == ["about Where?"]
    assert waits == [0.5, 7.0, agents.LONGEST_WAIT]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {}, "wrong key"), "401: wrong key"),
        ((200, {}, "no json"), "not JSON"),
        ((200, {}, '{"choices": []}'), "something else"),
        ((200, {}, '{"choices": [{"message": {"content": 5}}]}'), "something else"),
    ],
)
def test_what_an_endpoint_does_wrong_is_said_and_not_tried_again(
    backend: Backend, answer: tuple[int, dict[str, str], str], said: str
) -> None:
    backend.answers = [answer]
    with pytest.raises(AgentError, match=said):
        agent(backend.agent_name).write([Task(ASKED)])
    assert len(backend.seen) == 1


def test_nobody_there_is_an_error_of_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents.time, "sleep", lambda _: None)
    with pytest.raises(AgentError, match="cannot be reached"):
        agent("http://127.0.0.1:9/v1#small").write([Task(ASKED)])


def test_names_that_are_no_agent() -> None:
    with pytest.raises(ParameterError, match="names no model"):
        agent("http://127.0.0.1:9/v1")
    with pytest.raises(ParameterError, match="no subject"):
        agent("subject")


def test_a_local_model_writes_what_it_generates() -> None:
    subject = LanguageModel(*tiny("llama"), name="tiny")
    writer = agent("subject", subject=subject)
    tasks = [Task((("user", text),), max_tokens=limit) for text, limit in (("Ilva", 4), ("Carth in", 6), ("Tivin", 4))]
    wanted = [
        subject.generate([(("a", "b"), f"{task.messages[0][1]}\n")], max_new_tokens=task.max_tokens).texts[0][0]
        for task in tasks
    ]
    assert writer.write(tasks) == wanted
    assert writer.spent.calls == 3
    assert writer.spent.prompt_tokens > 0
    sampled = [Task(ASKED, max_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    first, again, other = writer.write(sampled)
    assert first == again != other


def test_what_cannot_be_parsed_is_asked_for_again_with_the_reason() -> None:
    asked: list[tuple[tuple[str, str], ...]] = []

    class Stubborn:
        name = "stubborn"
        spent = agents.Spent()

        def write(self, tasks: Any) -> list[str]:
            asked.extend(task.messages for task in tasks)
            return ["4" if len(task.messages) > 1 and task.messages[0][1] == "Where?" else "four" for task in tasks]

    def number(text: str) -> int:
        if not text.isdigit():
            raise ValueError("expected a number")
        return int(text)

    found = parsed(Stubborn(), [Task(ASKED), Task((("user", "Never"),))], number, tries=3)
    assert found == [4, None]
    assert len(asked) == 2 + 2 + 1
    assert asked[2][1:] == (("assistant", "four"), ("user", "That cannot be used: expected a number. Answer again."))


@pytest.mark.parametrize(
    "text", ['Here: ["a b", 3]', "1. a b\n2) 3", "Sure.\n- a b\n- 3\n", " * a b\n * 3", '```json\n["a b",\n "3"]\n```']
)
def test_lists_as_models_write_them(text: str) -> None:
    assert listed(text) == ["a b", "3"]


def test_prose_is_no_list() -> None:
    with pytest.raises(ValueError, match="expected a list"):
        listed("None of them, but 3. is close")


def test_the_seed_of_a_task_is_the_seed_of_its_draws() -> None:
    drawn = agent().write([Task(ASKED, lambda draw: str(draw.random()), seed=4)])
    assert drawn == [str(random.Random(f"4/{ASKED}").random())]
