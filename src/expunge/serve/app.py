"""The endpoint: who may ask, how much, and how answers go out. An ASGI application for uvicorn.

Prompts, answers and rows are never logged: what is guarded would stand in the log.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..errors import ExpungeError
from .api import ApiError, Chat, Completion, Reply, json_object, parsed
from .backends import Answer, Backend
from .metrics import Metrics
from .standing import Guards

LOG = logging.getLogger("expunge.serve")
CLIENTS = 10_000
"""Callers whose rate is remembered."""


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    body: int = 1 << 20
    """Bytes of a body."""
    admin_body: int = 1 << 26
    """Bytes of a request to stand, with its rows."""
    per_minute: int = 600
    """Requests of one caller; 0 is no limit."""
    read_seconds: float = 15.0
    """For a body to arrive."""
    stall_seconds: float = 30.0
    """For a client to take the next piece."""


class Rate:
    """A bucket of tokens for every caller, filled evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self.clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str) -> float:
        """Seconds until this caller may ask again; 0 where it may now, and then has."""
        if not self.per_minute:
            return 0.0
        now = self.clock()
        left, before = self._left.pop(caller, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - before) * self.per_minute / 60)
        allowed = left >= 1
        self._left[caller] = (left - 1 if allowed else left, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


class Server:
    """The routes, and what they share."""

    def __init__(
        self,
        backend: Backend,
        guards: Guards,
        *,
        token: str = "",
        admin_token: str = "",
        limits: Limits | None = None,
    ) -> None:
        """
        Args:
            token: what callers must bring; "" lets everybody in.
            admin_token: what those must bring who change what is guarded; "" lets nobody.
        """
        self.backend = backend
        self.guards = guards
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.metrics.gauges["standing_requests"] = ("Requests that stand.", lambda: len(guards.list()))
        self._tokens = {"caller": token, "admin": admin_token}
        self._rate = Rate(self.limits.per_minute)
        self._created = int(time.time())

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self.backend.close()

        def route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str, who: str) -> Route:
            return Route(path, self._handled(path, handler, who), methods=[method])

        async def lost(request: Request, error: Exception) -> Response:
            status = getattr(error, "status_code", 404)
            return _error(ApiError(status, f"there is no {request.method} {request.url.path}"), _id(request))

        return Starlette(
            routes=[
                route("/v1/chat/completions", self._chat, "POST", "caller"),
                route("/v1/completions", self._completion, "POST", "caller"),
                route("/v1/models", self._models, "GET", "caller"),
                route("/metrics", self._metrics, "GET", "caller"),
                route("/health", self._health, "GET", ""),
                route("/admin/requests", self._standing, "GET", "admin"),
                route("/admin/requests", self._add, "POST", "admin"),
                route("/admin/requests/{name}", self._withdraw, "DELETE", "admin"),
            ],
            exception_handlers={404: lost, 405: lost},
            lifespan=lifespan,
        )

    # --- every route -----------------------------------------------------------------------------------------

    def _handled(
        self, path: str, handler: Callable[[Request], Awaitable[Response]], who: str
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handled(request: Request) -> Response:
            began = time.monotonic()
            name = _id(request)
            try:
                self._admit(request, who)
                response = await handler(request)
            except ApiError as error:
                response = _error(error, name)
            except ExpungeError as error:
                response = _error(ApiError(400, f"error {error.code}: {error}"), name)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                # Without the message: it may hold text that is guarded.
                LOG.error("%s %s failed: %s", name, path, type(error).__name__)
                response = _error(ApiError(500, "something went wrong here", "server_error"), name)
            response.headers["x-request-id"] = name
            self.metrics.requests[path, response.status_code] += 1
            LOG.info("%s %s %d %.0f ms", name, path, response.status_code, (time.monotonic() - began) * 1000)
            return response

        return handled

    def _admit(self, request: Request, who: str) -> None:
        """
        Raises:
            ApiError: 401, 403 or 429.
        """
        if not who:
            return
        wanted = self._tokens[who]
        if who == "admin" and not wanted:
            raise ApiError(403, "this server has no admin token, so nothing can be changed while it runs", "forbidden")
        given = request.headers.get("authorization", "")
        scheme, _, token = given.partition(" ")
        if wanted and not (scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), wanted.encode())):
            error = ApiError(
                401, "the token is missing or wrong; send Authorization: Bearer TOKEN", "authentication_error"
            )
            error.headers["www-authenticate"] = "Bearer"
            raise error
        wait = self._rate.wait(request.client.host if request.client else "")
        if wait:
            error = ApiError(429, f"more than {self.limits.per_minute} requests a minute", "rate_limit_error")
            error.headers["retry-after"] = str(int(wait) + 1)
            raise error

    async def _body(self, request: Request, most: int) -> bytes:
        """
        Raises:
            ApiError: 413 or 408.
        """
        too_large = ApiError(413, f"the body is larger than {most} bytes")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise too_large
        found = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    found += part
                    if len(found) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.limits.read_seconds:g} s") from None
        return bytes(found)

    # --- answers ---------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answered(request, Chat)

    async def _completion(self, request: Request) -> Response:
        return await self._answered(request, Completion)

    async def _answered(self, request: Request, form: type[Chat] | type[Completion]) -> Response:
        asked = parsed(await self._body(request, self.limits.body), form)
        if asked.model != self.backend.name:
            raise ApiError(
                404, f"there is no model {asked.model!r}; this server has {self.backend.name!r}", param="model"
            )
        subject = self.guards.subject
        answer = await self.backend.answer(asked, subject)
        outlet = getattr(subject, "outlet", None)
        out = Out(answer, outlet(asked.question) if outlet else None, asked.stops)
        reply = Reply(asked)
        if asked.stream:
            return Events(self._events(reply, asked, out), self)
        pieces: list[str] = []
        try:
            async with aclosing(self._timed(out)) as timed:
                watch = asyncio.ensure_future(_gone(request))
                collect = asyncio.ensure_future(_collected(timed, pieces))
                await asyncio.wait({watch, collect}, return_when=asyncio.FIRST_COMPLETED)
                watch.cancel()
                if not collect.done():
                    collect.cancel()
                    await asyncio.gather(collect, return_exceptions=True)
                    self.metrics.gone += 1
                    raise ClientDisconnect
                await collect
        finally:
            self._ended(out)
        text = out.refusal if out.withheld else "".join(pieces)
        return JSONResponse(reply.whole(text, out.reason, _usage(answer)))

    async def _timed(self, out: Out) -> AsyncGenerator[str, None]:
        began = time.monotonic()
        self.metrics.open += 1
        first = True
        try:
            async with aclosing(out.pieces()) as pieces:
                async for piece in pieces:
                    if first:
                        self.metrics.first(time.monotonic() - began)
                        first = False
                    yield piece
        finally:
            self.metrics.open -= 1

    def _ended(self, out: Out) -> None:
        self.metrics.withheld += out.withheld
        for name, count in out.answer.usage.items():
            self.metrics.tokens[name.removesuffix("_tokens")] += count

    async def _events(self, reply: Reply, asked: Chat | Completion, out: Out) -> AsyncGenerator[bytes, None]:
        """One answer as server-sent events."""
        try:
            if first := reply.first():
                yield _event(first)
            async with aclosing(self._timed(out)) as pieces:
                async for piece in pieces:
                    yield _event(reply.piece(piece))
            yield _event(reply.last(out.reason))
            if asked.stream_options and asked.stream_options.include_usage:
                yield _event(reply.used(_usage(out.answer)))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        finally:
            self._ended(out)

    # --- the rest --------------------------------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        one = {"id": self.backend.name, "object": "model", "created": self._created, "owned_by": "expunge"}
        return JSONResponse({"object": "list", "data": [one]})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _standing(self, _: Request) -> Response:
        return JSONResponse({"requests": self.guards.list()})

    async def _add(self, request: Request) -> Response:
        body = json_object(await self._body(request, self.limits.admin_body))
        one = await self.backend.change(lambda: self.guards.add(body))
        LOG.info("request %s stands", one.id)
        return JSONResponse(one.about, status_code=201)

    async def _withdraw(self, request: Request) -> Response:
        name = request.path_params["name"]
        if all(one["id"] != name for one in self.guards.list()):
            raise ApiError(404, f"no request {name!r} stands")
        await self.backend.change(lambda: self.guards.withdraw(name))
        LOG.info("request %s is withdrawn", name)
        return JSONResponse({"id": name, "withdrawn": True})


class Out:
    """An answer on its way out: through its guard's outlet, and up to a string that ends it."""

    def __init__(self, answer: Answer, outlet: Any, stops: list[str]) -> None:
        self.answer = answer
        self.outlet = outlet
        self.stops = stops
        self._ended_by_stop = False

    @property
    def withheld(self) -> bool:
        return self.outlet is not None and self.outlet.withheld

    @property
    def refusal(self) -> str:
        return str(self.outlet.refusal)

    @property
    def reason(self) -> str:
        return "content_filter" if self.withheld else "stop" if self._ended_by_stop else self.answer.reason

    async def pieces(self) -> AsyncGenerator[str, None]:
        """What the client may see."""
        async with aclosing(self._stopped()) as stopped:
            async for piece in stopped:
                shown = self.outlet.feed(piece) if self.outlet else piece
                if shown:
                    yield shown
                if self.withheld:
                    return
        if self.outlet:
            # Agents behind it may take their time.
            shown = await asyncio.to_thread(self.outlet.close)
            if shown:
                yield shown

    async def _stopped(self) -> AsyncGenerator[str, None]:
        """The answer up to the first of the strings that end it; what may become one waits."""
        waiting = ""
        longest = max(map(len, self.stops), default=1) - 1
        async with aclosing(self.answer.pieces) as pieces:
            async for piece in pieces:
                waiting += piece
                found = [at for at in map(waiting.find, self.stops) if at >= 0]
                if found:
                    self._ended_by_stop = True
                    yield waiting[: min(found)]
                    return
                cut = len(waiting) - longest
                if cut > 0:
                    yield waiting[:cut]
                    waiting = waiting[cut:]
        if waiting:
            yield waiting


class Events(Response):
    """Server-sent events; ends when the client goes, or takes nothing for too long."""

    def __init__(self, events: AsyncGenerator[bytes, None], server: Server) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.events = events
        self.server = server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self.events:
                async with asyncio.timeout(self.server.limits.stall_seconds):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(write()), asyncio.ensure_future(listen())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done() or tasks[0].exception() is not None:
                self.server.metrics.gone += 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.events.aclose()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collected(pieces: AsyncGenerator[str, None], into: list[str]) -> None:
    async for piece in pieces:
        into.append(piece)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    return {**answer.usage, "total_tokens": sum(answer.usage.values())}


def _error(error: ApiError, name: str) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers={**error.headers, "x-request-id": name})


def _id(request: Request) -> str:
    """The caller's own name of the request where it is one, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
