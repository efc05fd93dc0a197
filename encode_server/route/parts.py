"""A part on its way to an encoder: to the one that knows its media, and to another when that one fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from encode_server.client.encoders import Encoder, Encoders
from encode_server.client.errors import ClientError, ServerUnreachable
from encode_server.client.http import Answer
from encode_server.delivery.sglang.registrations import Accepts, Destinations, Registrations
from encode_server.errors import DeadlineExceeded, DeliveryFailed
from encode_server.telemetry.logs import quoted
from encode_server.wire.headers import ERRORS_HEADER, QUIET, TIMEOUT_HEADER

log = logging.getLogger(__name__)

ELSEWHERE = frozenset({429, 502, 503, 504})
BUSY_S = 0.5  # the pause after a refusal that names none
SAME_S = 0.05  # the pause before a part is tried again where it failed: nobody else is well
REGISTER_S = 5.0  # longest time an encoder may take to note a registration
ANSWER_MARGIN_S = 2.0  # for the encoder's own answer to a missed deadline


@dataclass(frozen=True)
class PartRequest:
    """One `POST /encode` of SGLang. `key`: of its media. `items`: how many. `registers`: prefill ranks say where they
    receive, in requests of their own. `deadline`: of `time.monotonic()`. `accepts`: which registrations count."""

    req_id: str
    body: bytes | memoryview
    key: bytes
    items: int
    registers: bool
    deadline: float
    accepts: Accepts = lambda offer: True


@dataclass
class Journey:
    """Where a part went, for the log line. `failures`: attempts that came to nothing."""

    encoder: str = "-"
    failures: int = 0
    reasons: list[str] = field(default_factory=list)


class PartRelay:
    """Sends parts to encoders until each has been delivered once.

    A part whose encoder fails before its answer is sent to another. Only an encoder that dies between its push and its
    answer makes the prefill receive a part twice, which SGLang ignores for a request of one part. Registrations are
    kept here and given to the encoder at work, all of a part together: the time in which an encoder has pushed to some
    ranks only is short.
    """

    def __init__(
        self, encoders: Encoders, registrations: Registrations, attempts: int, on_failure: Callable[[str], None]
    ) -> None:
        """`attempts`: how often a part may fail before its error is passed on; refusals of encoders that are full or
        restarting, and connections that never were, do not count."""
        self._encoders, self._registrations = encoders, registrations
        self._attempts, self._on_failure = attempts, on_failure

    async def deliver(self, part: PartRequest, journey: Journey) -> Answer:
        """The answer of the encoder that delivered the part, or the last that refused it. Raises DeadlineExceeded,
        DeliveryFailed."""
        counted, failed, last = 0, set[Encoder](), ""
        with self._registrations.use(part.req_id, part.accepts) as destinations:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + part.deadline - time.monotonic()):
                    while True:
                        encoder = await self._encoders.choose(part.key, failed)
                        journey.encoder = encoder.url
                        if encoder in failed:
                            await asyncio.sleep(SAME_S)
                        answer: Answer | None = None
                        began = True
                        try:
                            with encoder.working(part.items):
                                answer = await self._attempt(encoder, part, destinations)
                            if answer.status not in ELSEWHERE:
                                return answer
                            last = f"{encoder.url} answered {answer.status}: {_message(answer)}"
                        except ServerUnreachable as error:
                            last, began = str(error), error.connected
                        journey.failures += 1
                        journey.reasons.append(last)
                        log.warning("part %s failed, trying on: %s", quoted(part.req_id), last)
                        failed.add(encoder)
                        counted += self._judge(encoder, answer, began)
                        if counted < self._attempts:
                            continue
                        if answer is not None:
                            return answer
                        raise DeliveryFailed(f"{counted} encoders failed; {last}")
            except TimeoutError:
                why = f"the last failure was: {last}" if last else "no encoder was well"
                raise DeadlineExceeded(f"the part was not delivered in time; {why}") from None

    def _judge(self, encoder: Encoder, answer: Answer | None, began: bool) -> int:
        """Learn from a failure; 1 if it counts as one of the part's attempts: an item that ends encoders must not go
        round until its time is up."""
        self._on_failure("unreachable" if answer is None else str(answer.status))
        if answer is None:
            self._encoders.suspect(encoder)
            return int(began)
        if answer.status in (429, 503):
            self._encoders.busy(encoder, _retry_after(answer))
            return 0
        return 1

    async def _attempt(self, encoder: Encoder, part: PartRequest, destinations: Destinations) -> Answer:
        """One attempt at one encoder. Raises ServerUnreachable, also when the encoder answers no probes any more."""
        post = asyncio.create_task(self._post(encoder, part))
        lost = asyncio.create_task(encoder.lost.wait())
        register = asyncio.create_task(self._register(encoder, part, destinations)) if part.registers else None
        try:
            await asyncio.wait((post, lost), return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise ServerUnreachable(f"{encoder.url} does not answer any more")
            return post.result()
        finally:
            tasks = [task for task in (post, lost, register) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _post(self, encoder: Encoder, part: PartRequest) -> Answer:
        left_s = max(0.001, part.deadline - time.monotonic())
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(part.body)),
            TIMEOUT_HEADER: f"{left_s:.3f}",
            ERRORS_HEADER: QUIET,
        }
        return await encoder.client.exchange("POST", "/encode", left_s + ANSWER_MARGIN_S, [part.body], headers)

    async def _register(self, encoder: Encoder, part: PartRequest, destinations: Destinations) -> None:
        """Tell the encoder where the ranks receive, once all have said so."""
        endpoints = [endpoint async for endpoint in destinations.arrivals()]
        for endpoint in endpoints:
            document = {"req_id": part.req_id, "receive_url": endpoint, "receive_count": len(endpoints)}
            body = msgspec.json.encode(document)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            with contextlib.suppress(ClientError, TimeoutError):  # the encode's own answer says what is wrong
                answer = await encoder.client.exchange("POST", "/scheduler_receive_url", REGISTER_S, [body], headers)
                if answer.status != 200:
                    log.warning(
                        "%s refused a registration for %s: %s", encoder.url, quoted(part.req_id), _message(answer)
                    )


def _retry_after(answer: Answer) -> float:
    try:
        return min(30.0, max(0.0, float(answer.headers.get("Retry-After", BUSY_S))))
    except ValueError:
        return BUSY_S


def _message(answer: Answer) -> str:
    return bytes(answer.body[:300]).decode(errors="replace")
