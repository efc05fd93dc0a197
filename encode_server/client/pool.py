"""`EncoderPool`: one request over several encoders, whichever of them are well."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from encode_server.client.affinity import item_key
from encode_server.client.embedding import Embedding, in_order
from encode_server.client.encoders import Choice, Encoder, Encoders
from encode_server.client.errors import EncodeServerError, ServerUnreachable
from encode_server.client.http import EncodeClient, Transport
from encode_server.client.media import Item, Media
from encode_server.client.receiver import EmbeddingReceiver
from encode_server.errors import first_of
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool

T = TypeVar("T")

BUSY_S = 0.5  # the pause after a 429 that names none
ARRIVAL_S = 10.0  # an embedding the server has handed over comes sooner, or was lost
SAME_NAME_S = 0.05
ELSEWHERE = frozenset({429, 502, 503, 504})


@dataclass(frozen=True)
class EncoderState:
    """What the pool knows of an encoder: `in_flight` counts the items it was given and has not answered, `work_s` is
    how many seconds it will be busy with what it has."""

    url: str
    healthy: bool
    in_flight: int
    work_s: float = 0.0


@dataclass(frozen=True)
class _Attempt:
    """One part at one encoder. `name` is its `req_id` there."""

    client: EncodeClient
    media: list[Media]
    name: str
    timeout_s: float


@dataclass(frozen=True)
class _Part(Generic[T]):
    indices: list[int]
    result: T


_Send = Callable[[_Attempt], Awaitable[T]]


class EncoderPool:
    """Encoders of one model behind one `encode`; an async context manager, for any number of concurrent calls.

    `urls`: the encoders. `choice`: `content` sends the same media to the same encoder, whose cache then knows it,
    unless another could begin much earlier; `least_loaded` to the encoder that could begin first. `receiver`,
    `advertise`: have embeddings pushed to this open receiver under this address (its own by default) instead of
    answered. `attempts`: how often a part may fail
    before its error is raised; being told to come later (429) and finding nobody listening don't count.
    `attempt_timeout`: seconds one encoder may take, None for as long as the call. `timeout`: seconds of a call that
    names none. `probe_s`: seconds between health probes of each encoder.

    A call raises `EncodeServerError` when an encoder refuses the request itself (400, 403, 413, 415, …) or fails too
    often, `ServerUnreachable` when they die too often, `TimeoutError` when the time is up, also when no encoder was
    well. Cancelling it cancels its parts at the encoders. Whatever the exit, nothing of it is left here.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        choice: Choice = "content",
        receiver: EmbeddingReceiver | None = None,
        advertise: str | None = None,
        api_key: str | None = None,
        attempts: int = 4,
        attempt_timeout: float | None = None,
        timeout: float = 120.0,
        probe_s: float = 5.0,
    ) -> None:
        if isinstance(urls, str):
            raise ValueError("urls is a list of encoders' URLs")

        def client(url: str) -> EncodeClient:
            return EncodeClient(url, api_key=api_key, timeout=timeout)

        self._encoders = Encoders(urls, client, choice, probe_s)
        self._receiver, self._advertise = receiver, advertise
        self._attempts, self._attempt_timeout, self._timeout = attempts, attempt_timeout, timeout
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._watcher = asyncio.create_task(self._encoders.watch(), name="encoder-pool")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops the probes and closes the connections. A second call does nothing."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        await self._encoders.aclose()

    @property
    def encoders(self) -> tuple[EncoderState, ...]:
        """The encoders as they are now."""
        return tuple(EncoderState(e.url, e.healthy, e.in_flight, e.work.seconds) for e in self._encoders.all)

    @property
    def members(self) -> Encoders:
        """The encoders, for those who add and remove some."""
        return self._encoders

    async def encode(
        self,
        media: Sequence[Media],
        modality: Modality | str,
        *,
        req_id: str | None = None,
        pool: Pool | str | None = None,
        timeout: float | None = None,
    ) -> Embedding:
        """The embedding of `media`, its rows in their order, whichever encoders made them.

        `pool`: one vector for each item, see `EncodeClient.encode`.
        """
        req_id = req_id or uuid.uuid4().hex

        async def answered(attempt: _Attempt) -> Embedding:
            return await attempt.client.encode(
                attempt.media, modality, req_id=attempt.name, pool=pool, timeout_s=attempt.timeout_s
            )

        async def pushed(attempt: _Attempt) -> Embedding:
            return await self._pushed(attempt, modality, pool)

        parts = await self._spread(media, req_id, timeout, answered if self._receiver is None else pushed)
        return await in_order(req_id, [(part.indices, part.result) for part in parts])

    async def store(
        self,
        media: Sequence[Item],
        modality: Modality | str,
        *,
        req_id: str | None = None,
        timeout: float | None = None,
    ) -> tuple[ItemInfo, ...]:
        """Have each item's embedding stored under its `uuid` (see `EncodeClient.store`); returns when all are."""

        async def stored(attempt: _Attempt) -> tuple[ItemInfo, ...]:
            receipt = await attempt.client.store(
                attempt.media, modality, req_id=attempt.name, timeout_s=attempt.timeout_s
            )
            return receipt.items

        return _item_infos(len(media), await self._spread(media, req_id or uuid.uuid4().hex, timeout, stored))

    async def warm(
        self,
        media: Sequence[Media],
        modality: Modality | str,
        *,
        req_id: str | None = None,
        pool: Pool | str | None = None,
        timeout: float | None = None,
    ) -> tuple[ItemInfo, ...]:
        """Have the items encoded into the cache of the encoder that a request for the same items will be sent to later
        (see `EncodeClient.warm`): all of them into one, the encoder of the first item, as SGLang asks for them."""

        async def warmed(attempt: _Attempt) -> tuple[ItemInfo, ...]:
            receipt = await attempt.client.warm(
                attempt.media, modality, req_id=attempt.name, pool=pool, timeout_s=attempt.timeout_s
            )
            return receipt.items

        return _item_infos(
            len(media), await self._spread(media, req_id or uuid.uuid4().hex, timeout, warmed, together=True)
        )

    async def hand_over(
        self,
        media: Sequence[Item],
        modality: Modality | str,
        *,
        prefill_host: str,
        embedding_port: int,
        timeout: float | None = None,
        transport: Transport = "zmq",
    ) -> tuple[ItemInfo, ...]:
        """Have each item's embedding pushed to `tcp://prefill_host:embedding_port`, a part of its own whose `req_id` is
        the item's `uuid`: for a receiver that looks embeddings up by name, such as `encode_server.vllm`'s. It may get
        one twice. `transport`: as for `EncodeClient.push`."""

        async def pushed(attempt: _Attempt) -> tuple[ItemInfo, ...]:
            (item,) = attempt.media
            assert isinstance(item, Item) and item.uuid is not None
            while True:
                try:
                    receipt = await attempt.client.push(
                        [item],
                        modality,
                        prefill_host=prefill_host,
                        embedding_port=embedding_port,
                        req_id=item.uuid,
                        timeout_s=attempt.timeout_s,
                        transport=transport,
                    )
                    return receipt.items
                except EncodeServerError as error:
                    if error.status != 409:
                        raise
                    await asyncio.sleep(SAME_NAME_S)  # another request has the same item pushed at this moment

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._spread([item], item.uuid or "", timeout, pushed)) for item in media]
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        return tuple(info for task in tasks for part in task.result() for info in part.result)

    async def _spread(
        self, media: Sequence[Media], req_id: str, timeout: float | None, send: _Send[T], *, together: bool = False
    ) -> list[_Part[T]]:
        """Send the items to their encoders, in parts, until each part came back once. `together`: in one part."""
        limit = self._timeout if timeout is None else timeout
        keys = [item_key(item) for item in media]
        last: list[Exception] = []
        deadline = time.monotonic() + limit
        tasks: list[asyncio.Task[_Part[T]]] = []
        try:
            async with asyncio.timeout(limit), asyncio.TaskGroup() as group:
                plan = [list(range(len(media)))] if together else self._encoders.plan(keys)
                for number, indices in enumerate(plan):
                    one = self._until_done(f"{req_id}/{number}", media, keys, indices, deadline, send, last)
                    tasks.append(group.create_task(one))
        except TimeoutError:
            why = f"the last failure was: {last[-1]}" if last else self._nobody_well()
            raise TimeoutError(f"not encoded within {limit:g} s; {why}") from None
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        return [task.result() for task in tasks]

    async def _until_done(
        self,
        name: str,
        media: Sequence[Media],
        keys: Sequence[bytes],
        indices: list[int],
        deadline: float,
        send: _Send[T],
        last: list[Exception],
    ) -> _Part[T]:
        failures, failed, number = 0, set[Encoder](), 0
        while True:
            encoder = await self._encoders.choose(keys[indices[0]], failed)
            remaining = max(0.001, deadline - time.monotonic())
            attempt = _Attempt(
                encoder.client,
                [media[i] for i in indices],
                f"{name}.{number}",
                min(remaining, self._attempt_timeout or remaining),
            )
            number += 1
            try:
                with encoder.working(len(indices)):
                    return _Part(indices, await send(attempt))
            except (EncodeServerError, ServerUnreachable, TimeoutError) as error:
                last[:] = [error]
                if isinstance(error, EncodeServerError) and error.status not in ELSEWHERE:
                    raise
                if self._note(encoder, error):
                    failures += 1
                    failed.add(encoder)
                if failures >= self._attempts:
                    raise

    def _note(self, encoder: Encoder, error: Exception) -> bool:
        """Learn from a failure; whether it counts as one of the part's attempts."""
        if isinstance(error, EncodeServerError):
            if error.status in (429, 503):
                self._encoders.busy(encoder, BUSY_S if error.retry_after is None else max(0.0, error.retry_after))
            if error.status == 503:
                self._encoders.suspect(encoder)
            return error.status != 429
        self._encoders.suspect(encoder)
        return not isinstance(error, ServerUnreachable) or error.connected

    async def _pushed(self, attempt: _Attempt, modality: Modality | str, pool: Pool | str | None) -> Embedding:
        receiver = self._receiver
        assert receiver is not None
        arrival = asyncio.create_task(receiver.receive(attempt.name, timeout=attempt.timeout_s + ARRIVAL_S))
        try:
            try:
                await attempt.client.push(
                    attempt.media,
                    modality,
                    prefill_host=self._advertise or receiver.host,
                    embedding_port=receiver.port,
                    req_id=attempt.name,
                    pool=pool,
                    timeout_s=attempt.timeout_s,
                )
            except ServerUnreachable:
                if not arrival.done() or arrival.exception() is not None:
                    raise
            async with asyncio.timeout(ARRIVAL_S):
                return await arrival
        except BaseException:
            # Its name is never used again, and what may still come is nobody's.
            receiver.forget(attempt.name)
            raise
        finally:
            arrival.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(arrival, return_exceptions=True)

    def _nobody_well(self) -> str:
        sick = [encoder.url for encoder in self._encoders.all if not encoder.healthy]
        return f"{len(sick)} of {len(self._encoders.all)} encoders are sick" + (f": {', '.join(sick)}" if sick else "")


def _item_infos(count: int, parts: list[_Part[tuple[ItemInfo, ...]]]) -> tuple[ItemInfo, ...]:
    """What is known of each item, in the order of the items."""
    by_index = {i: info for part in parts for i, info in zip(part.indices, part.result, strict=True)}
    return tuple(by_index[i] for i in range(count))
