"""`expunge serve`: what OpenAI's own client gets, what nobody gets, and who is turned away."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tiny import tiny

pytest.importorskip("openai")
import openai
import uvicorn

from expunge.errors import LaunchError
from expunge.ledger import Ledger
from expunge.methods.guard.forbidden import Forbidden
from expunge.rows import Row
from expunge.serve import run as serving
from expunge.serve.app import Limits, Rate, Server
from expunge.subjects.language import LanguageModel
from expunge.wording import words

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant:"
ASKED: list[Any] = [{"role": "user", "content": "where was Ilva born?"}]
PLAIN: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@dataclass
class Running:
    port: int
    server: Server
    guards: Any
    ledger: Ledger
    subject: Any = None

    def client(self, token: str = "t") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, max_retries=0, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, token: str = "t", **headers: str) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Authorization": f"Bearer {token}", **headers})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = "json" in response.headers.get("content-type", "")
        return response.status, json.loads(text) if is_json else text, response.headers


@contextmanager
def running(made: tuple[Any, Any], ledger: Ledger, **options: Any) -> Iterator[Running]:
    backend, guards = made
    server = Server(backend, guards, token="t", admin_token="a", **options)
    config = uvicorn.Config(server.app(), port=0, log_level="error", access_log=False, timeout_graceful_shutdown=5)
    listener = uvicorn.Server(config)
    thread = threading.Thread(target=listener.run)
    thread.start()
    while not listener.started:
        time.sleep(0.005)
    port = listener.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(port, server, guards, ledger, guards.base)
    finally:
        listener.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def subject() -> LanguageModel:
    model, tokenizer = tiny("llama")
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(model, tokenizer, name="tiny")


def here(subject: Any, folder: Any, **options: Any) -> tuple[Any, Ledger]:
    ledger = Ledger(folder / "ledger.sqlite")
    options = {"state": None, "most": 4, "waiting": 8, **options}
    return serving.local(subject, "tiny", ledger=ledger, **options), ledger


@pytest.fixture
def up(subject: LanguageModel, tmp_path: Any) -> Iterator[Running]:
    made, ledger = here(subject, tmp_path)
    with running(made, ledger) as one:
        yield one


def written(subject: Any, question: str = "where was Ilva born?", limit: int = 12) -> str:
    prompt = subject.prompt_text(Row("a", "-", question, (("user", question),), "chat"))
    return str(subject.generate([(("a", "b"), prompt)], max_new_tokens=limit).texts[0][0])


def joined(stream: Any) -> tuple[str, str]:
    text, reason = "", ""
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
    return text, reason


# --- answers ---------------------------------------------------------------------------------------------------------


def test_the_official_client_gets_what_the_model_writes(up: Running) -> None:
    client = up.client()
    assert [model.id for model in client.models.list().data] == ["tiny"]
    whole = client.chat.completions.create(model="tiny", messages=ASKED, **PLAIN)
    assert whole.choices[0].message.content.strip() == written(up.subject)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model="tiny", messages=ASKED, stream=True, stream_options={"include_usage": True}, **PLAIN
    )
    chunks = list(stream)
    text, reason = joined(chunks)
    assert (text, reason) == (whole.choices[0].message.content, "length")
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    made = client.completions.create(model="tiny", prompt="Question: where", **PLAIN)
    wanted = up.subject.generate([(("a", "b"), "Question: where")], max_new_tokens=12).texts[0][0]
    assert made.choices[0].text.strip() == wanted
    pieces = client.completions.create(model="tiny", prompt="Question: where", stream=True, **PLAIN)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == made.choices[0].text


def test_answers_that_are_written_together_are_those_of_each_alone(up: Running) -> None:
    questions = ["where was Ilva born?", "in", "Tivin in the north of Carth, or where?", "north", "Answer", "of Carth"]
    limits = [12, 30, 7, 24, 18, 9]
    found: dict[int, str] = {}

    def one(place: int) -> None:
        time.sleep(0.01 * place)
        made = up.client().chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": questions[place]}],
            temperature=0,
            max_tokens=limits[place],
            stream=place % 2 == 0,
        )
        found[place] = joined(made)[0] if place % 2 == 0 else made.choices[0].message.content

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, (question, limit) in enumerate(zip(questions, limits)):
        assert found[place].strip() == written(up.subject, question, limit)


def test_a_stop_string_ends_the_answer_before_it(up: Running) -> None:
    text = written(up.subject, limit=24)
    stop = text[6:9]
    client = up.client()
    options = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 24, "stop": [stop]}
    made = client.chat.completions.create(**options)
    wanted = text[: text.index(stop)]
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == (wanted, "stop")
    assert joined(client.chat.completions.create(**options, stream=True)) == (wanted, "stop")


def test_samples_follow_their_seed(up: Running) -> None:
    def sample(seed: int) -> str:
        made = up.client().chat.completions.create(
            model="tiny", messages=ASKED, max_tokens=16, temperature=1.5, top_p=0.9, seed=seed
        )
        return str(made.choices[0].message.content)

    assert sample(1) == sample(1) != sample(2)


# --- guards ----------------------------------------------------------------------------------------------------------


def test_a_request_stands_until_it_is_withdrawn_and_all_of_it_is_in_the_ledger(up: Running) -> None:
    text = written(up.subject)
    secret = " ".join(words(text)[1:3])
    body = {"id": "case-1", "forget": [{"question": "?", "answer": "x", "value": secret}]}
    status, told, _ = up.ask("POST", "/admin/requests", body, token="a")
    assert (status, told) == (201, {"id": "case-1", "method": "output_filter", "rows": {"forget": 1}})
    client = up.client()
    options = {"model": "tiny", "messages": ASKED, **PLAIN}
    whole = client.chat.completions.create(**options)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("I don't know.", "content_filter")
    shown, reason = joined(client.chat.completions.create(**options, stream=True))
    assert reason == "content_filter"
    assert not Forbidden([secret]).within(shown)
    assert shown.endswith("I don't know.")
    assert text.startswith(shown.removesuffix("I don't know.").removesuffix("\n").strip())
    assert up.ask("POST", "/admin/requests", body, token="a")[0] == 400
    assert up.ask("GET", "/admin/requests", token="a")[1]["requests"] == [told]
    assert up.ask("DELETE", "/admin/requests/case-1", token="a")[0] == 200
    assert up.ask("DELETE", "/admin/requests/case-1", token="a")[0] == 404
    assert client.chat.completions.create(**options).choices[0].message.content.strip() == text
    entries = up.ledger.list()
    assert [entry.event for entry in entries] == ["request_received", "guard_added", "guard_withdrawn"]
    assert entries[1].body["result"] != entries[2].body["result"] == up.subject.fingerprint
    assert secret not in up.ledger.export()
    assert up.ledger.verify()[0]


def test_decoding_guards_share_the_batch_with_answers_that_began_without_them(up: Running) -> None:
    text = written(up.subject, limit=40)
    value = words(text)[0]
    client = up.client()
    options = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 40}
    before = iter(client.chat.completions.create(**options, stream=True))
    first = [next(before), next(before)]
    rows = [{"question": "where was Ilva born?", "answer": value, "value": value}]
    retain = [{"question": f"how is {i}?", "answer": f"well {i}"} for i in range(4)]
    guard = {"name": "guard", "threshold": 0.0, "epochs": 1, "soft": 0.0, "delta": 2.0}
    assert up.ask("POST", "/admin/requests", {"method": guard, "forget": rows, "retain": retain}, token="a")[0] == 201
    after = client.chat.completions.create(**options, stream=True)
    assert joined([*first, *before])[0].strip() == text
    assert value not in words(joined(after)[0])


def test_standing_requests_survive_a_restart(subject: LanguageModel, tmp_path: Any) -> None:
    secret = words(written(subject))[1]
    state = tmp_path / "state"
    made, ledger = here(subject, tmp_path, state=state)
    with running(made, ledger) as one:
        one.ask("POST", "/admin/requests", {"forget": [{"question": "?", "answer": secret}]}, token="a")
    assert [path.stat().st_mode & 0o777 for path in state.iterdir()] == [0o600]
    made, ledger = here(subject, tmp_path, state=state)
    with running(made, ledger) as one:
        made = one.client().chat.completions.create(model="tiny", messages=ASKED, **PLAIN)
        assert made.choices[0].finish_reason == "content_filter"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"forget": []}, "0 rows"),
        ({"forget": [{"question": "?"}]}, "answer"),
        ({"forget": "all"}, "expected a list"),
        ({"forgett": []}, "Did you mean forget"),
        ({"method": "npo", "forget": [{"question": "?", "answer": "x"}]}, "only guards"),
        ({"method": "whp_offset", "forget": [{"question": "?", "answer": "x"}]}, "trains a model"),
        ({"method": {"run": 3}, "forget": [{"question": "?", "answer": "x"}]}, "expected a name"),
        ({"method": {"name": "output_filter", "runn": 3}, "forget": [{"question": "?", "answer": "x"}]}, "runn"),
        ({"id": "../x", "forget": [{"question": "?", "answer": "x"}]}, "id is not"),
    ],
)
def test_what_is_no_request_changes_nothing(up: Running, body: Any, said: str) -> None:
    before = up.guards.subject
    status, told, _ = up.ask("POST", "/admin/requests", body, token="a")
    assert status == 400
    assert said in told["error"]["message"]
    assert up.guards.subject is before
    assert up.guards.list() == []


# --- who is turned away ----------------------------------------------------------------------------------------------


def test_wrong_tokens_are_turned_away(up: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        up.client("wrong").models.list()
    for token in ("wrong", "", "t "[:1] + "x"):
        assert up.ask("GET", "/v1/models", token=token)[0] == 401
    assert up.ask("GET", "/admin/requests", token="t")[0] == 401
    assert up.ask("GET", "/metrics", token="wrong")[0] == 401
    assert up.ask("GET", "/health", token="")[:2] == (200, {"status": "ok"})


def test_bodies_that_are_too_large_or_no_json_are_turned_away(subject: LanguageModel, tmp_path: Any) -> None:
    made, ledger = here(subject, tmp_path)
    with running(made, ledger, limits=Limits(body=400, read_seconds=0.3)) as one:
        path = "/v1/chat/completions"
        large = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 500}]}
        assert one.ask("POST", path, large)[0] == 413
        # Without a length, in chunks.
        connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=10)
        chunks = iter([b"x" * 300, b"x" * 300])
        connection.request("POST", path, chunks, {"Authorization": "Bearer t"}, encode_chunked=True)
        assert connection.getresponse().status == 413
        for body in (b"{", b"[1]", b"\xff", b"[" * 300):
            status, told, _ = one.ask("POST", path, body)
            assert status == 400
            assert "JSON" in told["error"]["message"]
        # A body that never arrives.
        with socket.create_connection(("127.0.0.1", one.port), timeout=10) as slow:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nContent-Length: 100\r\n\r\n{{"
            slow.sendall(head.encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert one.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "other"}, 404, "no model 'other'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "expected the user's"),
        ({"max_tokens": 100_000}, 400, "the context holds 256"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"n": 2}, 400, "n = 2 is not supported"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"stopp": "x"}, 400, "stopp"),
        ({"kind": "x"}, 400, "kind"),
    ],
)
def test_what_is_not_carried_out_is_said(up: Running, change: Any, status: int, said: str) -> None:
    body = {"model": "tiny", "messages": ASKED, **change}
    found, told, _ = up.ask("POST", "/v1/chat/completions", body)
    assert found == status
    assert said in told["error"]["message"]


def test_values_that_ask_for_nothing_are_taken(up: Running) -> None:
    made = up.client().chat.completions.create(
        model="tiny", messages=ASKED, n=1, presence_penalty=0, logprobs=False, user="u", tools=[], **PLAIN
    )
    assert made.choices[0].message.content.strip() == written(up.subject)


def test_unknown_paths_and_methods(up: Running) -> None:
    assert up.ask("GET", "/v1/nothing")[0] == 404
    assert up.ask("GET", "/v1/completions")[0] == 405


def test_requests_carry_their_names(up: Running) -> None:
    given = {"X-Request-ID": "my-name_1"}
    assert up.ask("GET", "/v1/models", **given)[2]["x-request-id"] == "my-name_1"
    odd = up.ask("GET", "/v1/models", **{"X-Request-ID": "a b\tc"})[2]["x-request-id"]
    assert len(odd) == 32
    assert up.ask("GET", "/v1/models", token="wrong", **given)[2]["x-request-id"] == "my-name_1"


def test_callers_have_a_rate() -> None:
    now = [0.0]
    rate = Rate(60, lambda: now[0])
    assert [rate.wait("a") for _ in range(60)] == [0.0] * 60
    assert rate.wait("a") == pytest.approx(1.0)
    assert rate.wait("b") == 0.0
    now[0] = 1.0
    assert rate.wait("a") == 0.0
    assert rate.wait("a") > 0
    assert Rate(0).wait("a") == 0.0


def test_a_caller_above_its_rate_is_told_when_to_come_back(subject: LanguageModel, tmp_path: Any) -> None:
    made, ledger = here(subject, tmp_path)
    with running(made, ledger, limits=Limits(per_minute=2)) as one:
        assert [one.ask("GET", "/v1/models")[0] for _ in range(3)] == [200, 200, 429]
        assert int(one.ask("GET", "/v1/models")[2]["retry-after"]) in range(1, 31)


# --- clients that go or stall ----------------------------------------------------------------------------------------


def idle(one: Running, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if one.server.backend.engine.running == 0 and one.server.metrics.open == 0:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_written_for_clients_that_are_gone(up: Running, stream: bool) -> None:
    body = json.dumps({"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 200, "stream": stream})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\n"
    completed = 0
    for _ in range(10):  # on a busy machine an answer may be finished before its client has gone
        completed = up.server.metrics.tokens["completion"]
        with socket.create_connection(("127.0.0.1", up.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            if stream:
                client.recv(200)
            else:
                time.sleep(0.05)
        assert idle(up)
        if up.server.metrics.gone:
            break
    assert up.server.metrics.gone == 1
    assert up.server.metrics.tokens["completion"] - completed < 200
    assert up.client().models.list().data


def test_a_client_that_takes_nothing_is_let_go(up: Running) -> None:
    """Against the response itself: on loopback the kernel takes more than any answer has."""
    import asyncio

    from expunge.serve.app import Events

    closed = []

    async def pieces() -> Any:
        try:
            for _ in range(100):
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def stuck(message: Any) -> None:
        if message.get("body"):
            await asyncio.sleep(60)

    async def silent() -> Any:
        await asyncio.sleep(60)

    server = Server(up.server.backend, up.guards, limits=Limits(stall_seconds=0.05))
    began = time.monotonic()
    asyncio.run(Events(pieces(), server)({}, silent, stuck))
    assert time.monotonic() - began < 5
    assert closed == [True]
    assert server.metrics.gone == 1


def test_metrics_count_what_happened(up: Running) -> None:
    up.client().chat.completions.create(model="tiny", messages=ASKED, **PLAIN)
    up.ask("POST", "/v1/chat/completions", b"{")
    text = up.ask("GET", "/metrics")[1]
    assert 'expunge_requests_total{route="/v1/chat/completions",status="200"} 1' in text
    assert 'expunge_requests_total{route="/v1/chat/completions",status="400"} 1' in text
    assert 'expunge_tokens_total{kind="completion"} 12' in text
    assert 'expunge_first_piece_seconds_bucket{le="+Inf"} 1' in text
    assert "expunge_requests_open 0" in text


# --- in front of another server --------------------------------------------------------------------------------------


def test_a_proxy_guards_another_server(up: Running, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serving.BACKEND_KEY, "t")
    ledger = Ledger(tmp_path / "proxy.sqlite")
    address = f"http://127.0.0.1:{up.port}/v1"
    made = serving.proxy(address, "tiny", ledger=ledger, state=None, timeout=20)
    text = written(up.subject)
    with running(made, ledger) as one:
        client = one.client()
        options = {"model": "tiny", "messages": ASKED, **PLAIN}
        whole = client.chat.completions.create(**options)
        assert whole.choices[0].message.content.strip() == text
        assert whole.usage.completion_tokens == 12
        assert joined(client.chat.completions.create(**options, stream=True))[0].strip() == text
        secret = " ".join(words(text)[1:3])
        one.ask("POST", "/admin/requests", {"forget": [{"question": "?", "answer": secret}]}, token="a")
        shown, reason = joined(client.chat.completions.create(**options, stream=True))
        assert reason == "content_filter"
        assert not Forbidden([secret]).within(shown)
        status, told, _ = one.ask("POST", "/v1/chat/completions", {**options, "max_tokens": 9999})
        assert status == 400
        assert "context" in told["error"]["message"]
        body = {"method": "guard", "forget": [{"question": "?", "answer": "x", "value": "x"}]}
        assert one.ask("POST", "/admin/requests", body, token="a")[0] == 400


def test_a_server_behind_that_is_not_there(tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "proxy.sqlite")
    made = serving.proxy("http://127.0.0.1:9/v1", "tiny", ledger=ledger, state=None, timeout=5)
    with running(made, ledger) as one:
        status, told, _ = one.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": ASKED})
        assert status == 502
        assert "cannot be reached" in told["error"]["message"]


# --- starting --------------------------------------------------------------------------------------------------------


def test_a_server_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serving.TOKEN, raising=False)
    monkeypatch.delenv(serving.ADMIN_TOKEN, raising=False)
    assert serving.secrets("127.0.0.1") == serving.secrets("localhost") == ("", "")
    with pytest.raises(LaunchError, match="set EXPUNGE_TOKEN"):
        serving.secrets("0.0.0.0")
    monkeypatch.setenv(serving.TOKEN, "one")
    monkeypatch.setenv(serving.ADMIN_TOKEN, "one")
    with pytest.raises(LaunchError, match="are the same"):
        serving.secrets("0.0.0.0")


def test_running_answers_end_when_the_server_stops(subject: LanguageModel, tmp_path: Any) -> None:
    made, ledger = here(subject, tmp_path)
    with running(made, ledger) as one:
        stream = iter(
            one.client().chat.completions.create(
                model="tiny", messages=ASKED, temperature=0, max_tokens=60, stream=True
            )
        )
        first = next(stream)
        kept: list[Any] = []
        reader = threading.Thread(target=lambda: kept.extend(stream))
        reader.start()
    reader.join(10)
    assert joined([first, *kept])[0].strip() == written(subject, limit=60)
