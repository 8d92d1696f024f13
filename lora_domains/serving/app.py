"""The HTTP application: OpenAI's endpoints, labels, health and metrics, on Starlette."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lora_domains.errors import LoraDomainsError
from lora_domains.serving import answers as prompts
from lora_domains.serving import requests as bodies
from lora_domains.serving.requests import (
    ApiError,
    Begun,
    Ended,
    Event,
    Failed,
    Generate,
    Job,
    Label,
    Labelled,
    Piece,
)
from lora_domains.serving.service import Service

T = TypeVar("T")
OPEN = ("/health", "/ready")
"""Endpoints without a key."""


def make_app(service: Service) -> Starlette:
    """The application; its scheduler runs while the application does."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.scheduler.stop)

    def route(path: str, answer: Callable[[_Call], Any], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            return await _Call(service, path, request).respond(answer)

        return Route(path, endpoint, methods=[method])

    app = Starlette(
        routes=[
            route("/v1/chat/completions", _chat, "POST"),
            route("/v1/completions", _completion, "POST"),
            route("/v1/classify", _classify, "POST"),
            route("/v1/models", _models, "GET"),
            route("/v1/models/{name:path}", _model, "GET"),
            route("/v1/adapters/reload", _reload, "POST"),
            route("/health", _health, "GET"),
            route("/ready", _ready, "GET"),
            route("/metrics", _metrics, "GET"),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = {404: "There is no such endpoint.", 405: "This endpoint has another method."}
    headers = dict(getattr(error, "headers", None) or {})
    return _error(ApiError(status, what.get(status, "The request failed."), headers=headers))


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


# ── One request ─────────────────────────────────────────────────────────────────────────────────


class _Call:
    """One request: reads its body, follows its job, counts and logs it."""

    def __init__(self, service: Service, path: str, request: Request) -> None:
        self.service, self.path, self.request = service, path, request
        self.started = time.monotonic()
        self.domain: str | None = ""
        """Of the request, once it is known: only names of adapters enter logs and metrics."""
        self.first: float | None = None
        self.status = 500
        """Of a streamed answer."""
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    async def respond(self, answer: Callable[["_Call"], Any]) -> Response:
        try:
            self._check_key()
            response: Response = await answer(self)
        except ApiError as error:
            response = _error(error)
        except LoraDomainsError as error:
            response = _error(bodies.refused(error))
        except ClientDisconnect:
            response = Response(status_code=499)
        except asyncio.CancelledError:  # the server stops and waits no longer
            response = _error(bodies.stopping())
        except Exception as error:  # one request must not end the others
            bodies.log("A request failed.", error)
            response = _error(bodies.failed(error))
        if not isinstance(response, StreamingResponse):
            self.finish(response.status_code)
        return response

    def finish(self, status: int) -> None:
        """Count and log the request; no text of it."""
        seconds = time.monotonic() - self.started
        service = self.service
        service.scheduler.metrics.add_request(self.path, self.domain, status, seconds, self.first)
        if self.path not in (*OPEN, "/metrics"):
            model = service.base_name if self.domain is None else self.domain
            service.log(f"{status} {self.path} {model} {seconds:.3f} s".replace("  ", " "))

    def _check_key(self) -> None:
        keys = self.service.settings.keys
        if not keys or self.path in OPEN:
            return
        scheme, _, given = self.request.headers.get("authorization", "").partition(" ")
        digest = sha256(given.strip().encode("utf-8", "replace")).digest()
        # All keys are compared, each in constant time.
        known = [hmac.compare_digest(digest, sha256(key.encode()).digest()) for key in keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    async def body(self) -> dict[str, Any]:
        """The JSON object of the request; raises ApiError for a large, slow or broken body."""
        most = self.service.settings.body
        too_large = ApiError(413, f"The body is larger than {most} bytes.", code="body_too_large",
                             headers={"Connection": "close"})  # fmt: skip
        length = self.request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.service.settings.idle):
                async for part in self.request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time.", code="timeout",
                           headers={"Connection": "close"}) from None  # fmt: skip
        return bodies.parsed(b"".join(parts))

    # The job of the request

    def deliver(self) -> Callable[[Event], None]:
        """What the scheduler calls on its thread with each event."""
        loop, put = asyncio.get_running_loop(), self.events.put_nowait

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(put, event)

        return tell

    async def event(self) -> Event:
        """The next event of the job; raises ApiError where it failed or takes too long."""
        left = self.started + self.service.settings.timeout - time.monotonic()
        try:
            async with asyncio.timeout(left):
                event = await self.events.get()
        except TimeoutError:
            raise ApiError(504, "The answer took too long.", kind="server_error",
                           code="timeout") from None  # fmt: skip
        if isinstance(event, Failed):
            if isinstance(event.error, ApiError):
                raise event.error
            if isinstance(event.error, LoraDomainsError):
                raise bodies.refused(event.error)
            raise bodies.failed(event.error)
        if isinstance(event, Piece | Ended | Labelled) and self.first is None:
            self.first = time.monotonic() - self.started
        return event

    async def begun(self) -> int:
        event = await self.event()
        assert isinstance(event, Begun), "the first event of a request that did not fail"
        return event.prompt_tokens

    async def unless_left(self, job: Job, reading: Awaitable[T]) -> T:
        """The result of ``reading``; where it fails or the client leaves, the job is cancelled."""

        async def left() -> None:
            while not await self.request.is_disconnected():
                await asyncio.sleep(0.1)

        finished = False
        read, leaving = asyncio.ensure_future(reading), asyncio.ensure_future(left())
        try:
            await asyncio.wait({read, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                raise ClientDisconnect
            result = read.result()
            finished = True
            return result
        finally:
            if not finished:
                self.service.scheduler.cancel(job)
            read.cancel()
            leaving.cancel()


class _Stream(StreamingResponse):
    """Server-sent events; however they end, the job is cancelled and the request counted."""

    def __init__(self, call: _Call, job: Generate, pieces: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._call, self._job = call, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:  # the server stops and waits no longer
            self._call.status = 503
        finally:
            self._call.service.scheduler.cancel(self._job)
            self._call.finish(self._call.status)


# ── Generated answers ───────────────────────────────────────────────────────────────────────────


async def _chat(call: _Call) -> Response:
    given = bodies.checked(await call.body(), bodies.CHAT, "messages")
    call.domain = call.service.domain(given["model"])
    messages = prompts.messages_in(given["messages"])
    job = _generation(call, given, bodies.most_tokens(given), messages=messages)
    return await _answered(call, given, job, bodies.Shape(given["model"], chat=True))


async def _completion(call: _Call) -> Response:
    given = bodies.checked(await call.body(), bodies.COMPLETION, "prompt")
    call.domain = call.service.domain(given["model"])
    texts = bodies.prompts_of(given["prompt"])
    job = _generation(call, given, given.get("max_tokens"), texts=texts)
    return await _answered(call, given, job, bodies.Shape(given["model"]))


def _generation(
    call: _Call, given: Mapping[str, Any], most: int | None, *,
    messages: Sequence[Mapping[str, Any]] | None = None, texts: Sequence[Any] = (),
) -> Generate:  # fmt: skip
    count, stop = given.get("n", 1), given.get("stop", ())
    if count * max(1, len(texts)) > bodies.MOST_ANSWERS:
        raise ApiError(400, f"At most {bodies.MOST_ANSWERS} answers in one request.", param="n",
                       code="invalid_value")  # fmt: skip
    return Generate(
        call.domain, call.deliver(), messages=messages, texts=texts, max_tokens=most,
        temperature=float(given.get("temperature", 0.0)), top_p=float(given.get("top_p", 1.0)),
        seed=given.get("seed"), stop=(stop,) if isinstance(stop, str) else tuple(stop),
        count=count, stream=given.get("stream", False),
        thinking=next(iter(given.get("chat_template_kwargs", {}).values()), None),
    )  # fmt: skip


async def _answered(
    call: _Call, given: Mapping[str, Any], job: Generate, shape: bodies.Shape
) -> Response:
    answers = job.count * max(1, len(job.texts))
    call.service.scheduler.submit(job)
    if job.stream:
        tokens = await call.unless_left(job, call.begun())
        with_usage = bool(given.get("stream_options", {}).get("include_usage"))
        return _Stream(call, job, _pieces(call, shape, answers, tokens if with_usage else None))

    async def read() -> dict[str, Any]:
        tokens, ended = await call.begun(), dict[int, Ended]()
        while len(ended) < answers:
            event = await call.event()
            if isinstance(event, Ended):
                ended[event.index] = event
        choices = [shape.choice(ended[index]) for index in sorted(ended)]
        usage = bodies.usage(tokens, sum(event.tokens for event in ended.values()))
        return {**shape.body(choices), "usage": usage}

    return JSONResponse(await call.unless_left(job, read()))


async def _pieces(
    call: _Call, shape: bodies.Shape, answers: int, prompt_tokens: int | None
) -> AsyncIterator[str]:
    """The server-sent events of an answer; with ``prompt_tokens`` the last one has the usage."""
    usage: dict[str, Any] = {} if prompt_tokens is None else {"usage": None}
    call.status, ended, tokens = 499, 0, 0  # unless the client stays to the end
    try:
        for index in range(answers if shape.chat else 0):
            yield bodies.sent({**shape.piece(index, "", first=True), **usage})
        while ended < answers:
            event = await call.event()
            if isinstance(event, Piece):
                yield bodies.sent({**shape.piece(event.index, event.text), **usage})
            elif isinstance(event, Ended):
                ended, tokens = ended + 1, tokens + event.tokens
                yield bodies.sent({**shape.piece(event.index, "", event.reason), **usage})
    except ApiError as error:  # the status was sent already
        call.status = error.status
        yield bodies.sent(error.body)
        return
    if prompt_tokens is not None:
        last = {**shape.body([], chunk=True), "usage": bodies.usage(prompt_tokens, tokens)}
        yield bodies.sent(last)
    call.status = 200
    yield "data: [DONE]\n\n"


# ── Labels ──────────────────────────────────────────────────────────────────────────────────────


async def _classify(call: _Call) -> Response:
    given = bodies.checked(await call.body(), bodies.CLASSIFY, "input")
    domain = call.domain = call.service.domain(given["model"])
    if domain is None or not prompts.has_labels(call.service.scheduler.bank, domain):
        raise ApiError(400, f"{given['model']} has no labels. Send it messages "
                       "(/v1/chat/completions).", param="model")  # fmt: skip
    texts = given["input"] if isinstance(given["input"], list) else [given["input"]]
    job = Label(domain, call.deliver(), texts, float(given.get("refer_below", 0.0)))
    call.service.scheduler.submit(job)

    async def read() -> dict[str, Any]:
        tokens, event = await call.begun(), await call.event()
        assert isinstance(event, Labelled), "the event after the first of texts to label"
        data = [{"index": n, **bodies.record(answer)} for n, answer in enumerate(event.answers)]
        return {"object": "list", "model": given["model"], "data": data,
                "usage": bodies.usage(tokens, 0)}  # fmt: skip

    return JSONResponse(await call.unless_left(job, read()))


# ── The server itself ───────────────────────────────────────────────────────────────────────────


async def _models(call: _Call) -> Response:
    data = [call.service.listed(name) for name in call.service.names]
    return JSONResponse({"object": "list", "data": data})


async def _model(call: _Call) -> Response:
    name = call.request.path_params["name"]
    call.domain = call.service.domain(name)
    return JSONResponse(call.service.listed(name))


async def _reload(call: _Call) -> Response:
    service = call.service
    if not service.settings.keys:
        raise ApiError(403, "Reloading needs a key: start the server with one (--api-key), or send "
                       "it SIGHUP.", code="key_required")  # fmt: skip
    if service.folders is None:
        raise ApiError(403, "One replica of several reads no adapter again: deploy the application "
                       "again.", code="one_of_several")  # fmt: skip
    results = await asyncio.to_thread(service.reload)
    failed = any(result["status"] == "failed" for result in results)
    return JSONResponse({"object": "list", "data": results}, 500 if failed else 200)


async def _health(call: _Call) -> Response:
    alive = call.service.scheduler.alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


async def _ready(call: _Call) -> Response:
    scheduler = call.service.scheduler
    full = scheduler.waiting >= scheduler.queue
    status = "ready" if scheduler.alive and not full else "full" if full else "failed"
    body = {"status": status, "models": call.service.names, "waiting": scheduler.waiting}
    return JSONResponse(body, 200 if status == "ready" else 503)


async def _metrics(call: _Call) -> Response:
    text = generate_latest(call.service.scheduler.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
