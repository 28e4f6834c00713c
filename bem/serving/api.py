"""The HTTP face: what stands at which address."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

import bem
from bem.engine.request import Result
from bem.errors import BemError, Refused
from bem.serving.answers import ChatFace, CompletionFace, Face, Receipt
from bem.serving.explaining import ExplainRequest, explained
from bem.serving.feedback import FeedbackRequest
from bem.serving.gate import Gate, refusal_response
from bem.serving.generation import Answers, Stream, error_body
from bem.serving.guarding import Admission
from bem.serving.naming import Name, parse_name, unknown_model
from bem.serving.pictures import check_sees
from bem.serving.prompts import Prepared
from bem.serving.resident import Lease, Resident
from bem.serving.schemas import Asked, ChatRequest, CompletionRequest
from bem.serving.state import Serving

T = TypeVar("T")
GONE = 499
"""nginx's word for a client that did not wait: nobody reads it."""


def build_app(serving: Serving) -> FastAPI:
    """The application of a server; its engines start and stop with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with serving:
            yield

    app = FastAPI(
        title="BEM", version=bem.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.serving = serving
    app.add_middleware(Gate, serving=serving)
    _tell_errors(app, serving)
    _add_state(app, serving)
    _add_models(app, serving)
    _add_answers(app, serving)
    _add_dashboard(app, serving)
    return app


def _add_answers(app: FastAPI, serving: Serving) -> None:
    completion, chat = CompletionFace(serving.tokenizer), ChatFace(serving.tokenizer)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Go on with a prompt."""
        return await Answer(serving, completion, asked, request).respond()

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await Answer(serving, chat, asked, request).respond()

    @app.post("/v1/feedback")
    async def feedback(said: FeedbackRequest, request: Request) -> dict[str, Any]:
        """Say something of an answer; what is acknowledged is on disk."""
        if serving.feedback is None:
            why = "This server keeps no feedback: start it with --feedback PATH."
            raise Refused(501, why, None, "no_feedback")
        said = await serving.guard.feedback(said, request.state.owner)
        receipt = await serving.feedback.add(said, request.state.owner)
        return {"object": "feedback", "sequence": receipt.sequence, "new": receipt.new}

    @app.post("/v1/bem/explain")
    async def explain(asked: ExplainRequest) -> dict[str, Any]:
        """What the router did with a conversation, and why."""
        name = parse_name(asked.model)
        lease = await serving.residents.lease(name, "", asked.model)
        try:
            return await explained(serving.driver, lease.resident, asked, serving.tokenizer)
        finally:
            lease.end()


def _add_models(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What can be asked for as `model`."""
        names = await serving.names()
        return {"object": "list", "data": [_model(name, about) for name, about in names.items()]}

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> dict[str, Any]:
        """One of them."""
        parse_name(model)
        names = await serving.names()
        if model not in names:
            raise unknown_model(model, "See GET /v1/models.")
        return _model(model, names[model])


def _model(name: str, about: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "bem", "bem": about}


def _add_state(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200: the engines' thread runs."""
        return JSONResponse({"status": "ok"} if serving.driver.alive else {"status": "failed"},
                            200 if serving.driver.alive else 503)  # fmt: skip

    @app.get("/ready")
    async def ready() -> Response:
        """200: send requests here; 503: it starts, stops or failed."""
        return JSONResponse(serving.state(), 200 if serving.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await serving.metrics_text(), media_type="text/plain; version=0.0.4")


def _add_dashboard(app: FastAPI, serving: Serving) -> None:
    page = (Path(__file__).parent / "dashboard" / "page.html").read_bytes()
    allowed = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> Response:
        """The live page: one file, nothing from elsewhere."""
        return Response(page, media_type="text/html", headers={"content-security-policy": allowed})

    @app.get("/dashboard/data")
    async def data() -> dict[str, Any]:
        """What the page shows."""
        return {
            **serving.state(),
            "versions": serving.versions(),
            "history": serving.history.shown(),
            "guard": serving.guard.shown(),
        }

    @app.get("/dashboard/online")
    async def online() -> dict[str, Any]:
        """What the page shows of learning, and the newest moves of the version store."""
        return await asyncio.to_thread(serving.learning.read)


def _tell_errors(app: FastAPI, serving: Serving) -> None:
    def told(error: Refused) -> JSONResponse:
        serving.metrics.refuse(error.status)
        return refusal_response(error)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return told(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return told(invalid_request(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = told(Refused(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(BemError)
    async def ours(request: Request, error: BemError) -> Response:
        return told(Refused(400, str(error)))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        serving.metrics.refuse(500)
        return JSONResponse(error_body(error), 500)


def invalid_request(error: RequestValidationError) -> Refused:
    """What is wrong with a body, in one line: its first problem."""
    problems = error.errors()
    first = problems[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    kinds = ("list[", "dict[", "constrained-", "function-")  # which form of a field was tried
    fields = [part for part in place if part != "str" and not part.startswith(kinds)]
    named = ".".join(fields) or None
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = (
            f"Unknown field {place[-1]!r:.100}: this server does not ignore what it does not know"
        )
    elif first["type"] == "json_invalid":
        message, named = f"The body is no JSON: {first.get('ctx', {}).get('error', '')}", None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Refused(
        400, f"{named + ': ' if named else ''}{message}{more}.", named, "invalid_request"
    )


class Answer:
    """One request for an answer, from its body to the response."""

    def __init__(self, serving: Serving, face: Face, asked: Asked, request: Request):
        self.serving, self.face, self.asked, self.request = serving, face, asked, request
        self.id = f"{face.prefix}{uuid.uuid4().hex}"

    async def respond(self) -> Response:
        """The response; headers are sent when the first token is there, so that its status is true."""
        serving, asked = self.serving, self.asked
        serving.check_open()
        name = parse_name(asked.model)
        lease = await serving.residents.lease(name, conversation_of(asked), asked.model)
        try:
            expert = expert_of(name, asked.model, lease.resident)
            check_strength(asked, lease.resident)
            owner = self.request.state.owner
            admission = await serving.guard.admit(asked, self.id, owner)
            self.asked = admission.asked
            prepared = await serving.prepare(self.asked, owner, expert)
            check_sees(lease.resident, prepared)
            return await self._generate(lease, prepared, admission)
        except BaseException:
            lease.end()
            raise

    async def _generate(self, lease: Lease, prepared: Prepared, admission: Admission) -> Response:
        streams, resident = bool(self.asked.stream), lease.resident
        requests = [replace(request, version=resident.acting) for request in prepared.requests]
        submit = self.serving.driver, resident.host, requests, streams
        owner, kappa = self.request.state.owner, admission.kappa
        answering = self.serving.guard.answering(admission, prepared, submit, self.id, owner)
        receipt = Receipt(self.id, int(time.time()), self.asked.model, resident.version, kappa)
        wanted = answering.next() if streams else answering.results()
        found: Any = None
        try:
            found = await while_connected(self.request, wanted)
        except Refused as error:
            if error.code == "queue_full":
                error.retry_after_s = self.serving.metrics.usual_s
            raise
        finally:
            if found is None or not streams:
                answering.give_up()
                lease.end()
        if found is None:
            return Response(status_code=GONE)
        if streams:
            return self._stream(lease, answering, receipt, prepared, found)
        cached = sum(result.cached_tokens for result in found)
        await self._keep(lease, receipt, prepared, found)
        self.serving.note(receipt, self.request.state.owner, prepared, found)
        body = self.face.whole(receipt, found, prepared)
        return JSONResponse(body, headers=receipt.headers(cached))

    async def _keep(
        self, lease: Lease, receipt: Receipt, prepared: Prepared, results: list[Result]
    ) -> None:
        """Record the answers for feedback, if there is to be any."""
        ledger, owner = self.serving.feedback, self.request.state.owner
        if ledger is not None and prepared.vision is None:  # pictures are not kept
            await ledger.keep(receipt, self.asked, prepared, results, owner, lease.coin)

    def _stream(
        self,
        lease: Lease,
        answering: Answers,
        receipt: Receipt,
        prepared: Prepared,
        first: Any,
    ) -> Response:
        options = self.asked.stream_options
        with_usage = bool(options and options.include_usage)

        async def keep(results: list[Result]) -> None:
            await self._keep(lease, receipt, prepared, results)

        stream = Stream(answering, self.face, receipt, prepared, with_usage, keep)

        def end() -> None:
            answering.give_up()
            lease.end()
            self.serving.note(receipt, self.request.state.owner, prepared, stream.results)

        headers = {**receipt.headers(first[1].cached_tokens), "cache-control": "no-cache"}
        return Events(stream.events(first), end, headers)


class Events(StreamingResponse):
    """Server-sent events; whatever becomes of the client, `end` is called."""

    def __init__(
        self, events: AsyncIterator[str], end: Callable[[], None], headers: dict[str, str]
    ):
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


async def while_connected(request: Request, wanted: Coroutine[Any, Any, T]) -> T | None:
    """What is waited for; None: the client went away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(wanted), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        left.cancel()


def expert_of(name: Name, asked: str, resident: Resident) -> str | None:
    """The expert that a model's name asks for.

    Raises:
        Refused: 404, that version has none of the name.
    """
    if name.bare or name.expert is None:
        return None
    if name.expert in resident.experts or (name.expert == "base" and resident.experts):
        return name.expert
    known = ", ".join(f"bem:{e}" for e in resident.experts) or "none"
    raise unknown_model(asked, f"Experts of version {resident.short}: {known}.")


def check_strength(asked: Asked, resident: Resident) -> None:
    """Refuse a strength where there is nothing that could be stronger.

    Raises:
        Refused: that version has no experts.
    """
    if asked.bem.strength not in (None, 1) and not resident.experts:
        why = f"bem.strength scales what a router's experts do, and version {resident.short} has none."
        raise Refused(400, why, "bem.strength", "unsupported_value")


def conversation_of(asked: Asked) -> str:
    """What stays the same from turn to turn of one conversation."""
    said = [asked.bem.conversation, getattr(asked, "prompt_cache_key", None), asked.user]
    if known := next((each for each in said if each), None):
        return known
    if isinstance(asked, ChatRequest):
        before = [m.role for m in asked.messages].index("user") if _has_user(asked) else 0
        return "\n".join(message.text for message in asked.messages[: before + 1])
    assert isinstance(asked, CompletionRequest)
    return str(asked.prompt)[:1024]


def _has_user(asked: ChatRequest) -> bool:
    return any(message.role == "user" for message in asked.messages)
