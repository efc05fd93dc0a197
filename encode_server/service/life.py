"""The life of one request, from the door to its outcome, whatever the transport."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

from encode_server.delivery.base import Part
from encode_server.errors import BadRequest, DeadlineExceeded, EncodeError, NotReady
from encode_server.pipeline.admission import Ticket
from encode_server.pipeline.request import EncodeRequest
from encode_server.runtime.caller import CallerGone
from encode_server.runtime.tracebacks import let_go
from encode_server.service.caller import Ask, Caller
from encode_server.service.destinations import Destination
from encode_server.service.record import Record, new_req_id, note_end
from encode_server.service.server import Server
from encode_server.telemetry.logs import quoted
from encode_server.telemetry.tracing import describe_request, join_trace
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)


async def serve_encode(server: Server, caller: Caller) -> None:
    """Answer one request; returns when the caller has its answer or is gone.

    The request holds its place from before its body is read until the last byte of its answer has been taken, and its
    outcome is what happened to that answer.
    """
    record, started, outcome = Record(), time.perf_counter(), "ok"
    try:
        arrived = time.monotonic()
        async with _admitted(server, caller) as ticket:
            ask = await _read(server, caller, ticket, arrived)
            join_trace(ask.traceparent)
            req_id = ask.req_id or new_req_id()
            record.req_id, record.modality, record.items = req_id, ask.modality, len(ask.items)
            record.destination, record.target = ask.destination, ask.target
            caller.stages = record.stages
            describe_request(req_id=req_id, modality=ask.modality, items=len(ask.items), destination=ask.destination)
            deadline = arrived + server.timeout_s(ask.timeout_s or caller.asked_timeout_s)
            most = server.settings.max_answer_mb << 20
            request = EncodeRequest(req_id, ask.modality, ask.items, deadline, ticket, record.stages, most)
            await _encode_and_deliver(server, caller, ask, request, record)
    except CallerGone as gone:
        outcome = "gone"
        describe_request(outcome=outcome)
        let_go(gone)
    except EncodeError as error:
        outcome = error.code
        record.fail(error)
        describe_request(outcome=outcome)
        if error.bound is not None:
            server.metrics.refusals[error.bound].inc()
        with contextlib.suppress(CallerGone):
            await caller.refuse(error, record.req_id)
        let_go(error)
    record.stages["total"] = time.perf_counter() - started
    note_end(server.metrics, server.history, record, outcome)


@contextlib.asynccontextmanager
async def _admitted(server: Server, caller: Caller) -> AsyncIterator[Ticket]:
    """A place in the server, before the body is read: refusing must cost less than taking. A caller that an error
    answer would end (SGLang's prefill) waits at the door instead."""
    if not server.patient:
        if reason := server.not_ready():
            raise NotReady(reason, headers={"Retry-After": "2"})
        with server.admission.admit(caller.client, caller.declared_bytes) as ticket:
            yield ticket
        return
    # Nothing watches whether a caller at the door has gone: a look at its connection would take in its body.
    wait_s = server.timeout_s(caller.asked_timeout_s)
    started = time.monotonic()
    await server.until_open(wait_s)
    left_s = max(0.0, wait_s - (time.monotonic() - started))
    async with server.admission.admit_patiently(caller.client, caller.declared_bytes, left_s) as ticket:
        yield ticket


async def _read(server: Server, caller: Caller, ticket: Ticket, arrived: float) -> Ask:
    """The body. Its time is never longer than by default: a body that trickles in holds a place, and room. A patient
    caller may have to wait for room while its body arrives."""
    limit_s = server.timeout_s(None) if server.patient else server.settings.timeout_s
    asked = caller.asked_timeout_s
    try:
        async with asyncio.timeout(max(0.0, arrived + min(asked or limit_s, limit_s) - time.monotonic())):
            ask = await caller.read(server.body_turns.charging(caller.client, ticket.grow))
    except TimeoutError:
        raise DeadlineExceeded("the request's time was up before its body had arrived") from None
    if ask.part_idx >= ask.num_parts:
        raise BadRequest(f"part_idx is {ask.part_idx}, expected less than num_parts, {ask.num_parts}")
    server.check_model(ask.model)
    ticket.settle(sum(item.nbytes for item in ask.items))
    fps = server.settings.video_fps
    if ask.modality is Modality.VIDEO and fps is not None:
        ask = replace(ask, items=[item.with_fps(fps) for item in ask.items])
    if ask.pool is not None:
        ask = replace(ask, items=[item.with_pool(ask.pool) for item in ask.items])
    return ask


async def _encode_and_deliver(server: Server, caller: Caller, ask: Ask, request: EncodeRequest, record: Record) -> None:
    part = Part(request.req_id, ask.part_idx, ask.num_parts, request.modality, server.model_name)
    destination: Destination | None = None
    with contextlib.ExitStack() as held:
        if ask.prefill_host is not None:
            held.enter_context(server.active.hold(part.req_id, part.part_idx, ask.prefill_host))
        try:
            async with caller.until_gone(), _until(request.deadline):
                destination = await server.destinations.resolve(ask, request.req_id, request.client, held)
                if destination is not None:
                    request.recall, request.outgoing = destination.recall, destination.room
                    if destination.announce is not None:
                        request.on_rows = partial(_announce, server, request, destination.announce)
                encoded = await server.encode(request)
                record.tokens = encoded.shape[0]
                describe_request(tokens=record.tokens)
                caller.item_tokens = request.encoded_tokens // len(request.items)
                began = time.perf_counter()
                if destination is None:
                    async with server.undelivered.hold(caller.answer_bytes(encoded), request.client, patient=False):
                        await caller.answer(request.req_id, encoded, server.settings.send_timeout_s)
                else:
                    async with server.undelivered.hold(encoded.nbytes, request.client, patient=server.patient):
                        await destination.delivery.deliver(part, encoded)
                spent = time.perf_counter() - began
                request.spent("deliver", spent)
                if server.tracing is not None:
                    server.tracing.stage("deliver", spent)
                server.metrics.stage[request.modality]["deliver"].observe(spent)
            if destination is not None:
                await caller.confirm(request.req_id, encoded, silent=destination.silent)
        except CallerGone:
            raise
        except Exception as error:
            known = _known(error, request.req_id)
            if caller.quiet:
                raise known from None
            if destination is not None:
                await destination.delivery.fail(part, known)
            if server.patient and ask.prefill_host is not None:
                # The error ends the prefill's other requests, too: let what is on its way arrive there first.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(request.remaining_s):
                        await server.active.others_ended(part.req_id, part.part_idx, ask.prefill_host)
            raise known from None
    server.metrics.items[request.modality].inc(len(encoded.items))
    server.metrics.tokens[request.modality].inc(record.tokens)


def _announce(
    server: Server, request: EncodeRequest, announce: Callable[[str, int, int, str], None], rows: int
) -> None:
    if server.encoding is not None and (info := server.encoding.engine.info) is not None:
        announce(request.req_id, rows, info.dims[request.modality], info.dtype)


@contextlib.asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request's time was up before its embedding was delivered") from None


def _known(error: Exception, req_id: str) -> EncodeError:
    if isinstance(error, EncodeError):
        return error
    log.error("request %s failed", quoted(req_id), exc_info=error)
    return EncodeError("an internal error, see the server's log")
