"""The health probe: a real encode of tiny media when a group of ranks is idle, the group's progress when it is busy."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from encode_server.engine.groups import RankGroups
from encode_server.engine.supervisor import Supervisor
from encode_server.errors import EncodeError
from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.group_work import GroupWork
from encode_server.pipeline.pipeline import Pipeline, Route
from encode_server.pipeline.request import EncodeRequest, MediaItem
from encode_server.prepare.preparers import Preparers
from encode_server.wire.embedding import Encoded
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)

ANSWER_S = 1.5  # probers give up after 2 s
RECENT_S = 5.0  # an encode this long ago still shows that the ranks work: a starved machine is slow, not dead


@dataclass
class Verdict:
    """Healthy or not; `document` is the answer's body and says why."""

    healthy: bool
    document: dict[str, object]


@dataclass
class _Outcome:
    """How the last probe of one modality ended: `at` is wall-clock time, `reason` is empty on success."""

    at: float
    seconds: float
    reason: str


class HealthProbe:
    """Answers within `ANSWER_S`, whatever the engine does. The server is healthy while at least one group encodes."""

    def __init__(
        self,
        pipeline: Pipeline,
        engine: RankGroups,
        preparers: Preparers,
        batcher: Batcher,
        media: Mapping[Modality, bytes],
        stall_s: float,
    ) -> None:
        self._engine, self._preparers, self._batcher = engine, preparers, batcher
        several = len(engine.groups) > 1
        self._probes = [
            GroupProbe(
                pipeline,
                Route(cache=None, metrics=None, express=True, group=index if several else None),
                group,
                preparers,
                batcher.works[index],
                media,
                stall_s,
            )
            for index, group in enumerate(engine.groups)
        ]

    async def check(self) -> Verdict:
        """Judge every group, and by the groups the server."""
        if len(self._probes) == 1:
            verdicts = [await self._probes[0].check()]
        else:
            verdicts = await asyncio.gather(*(probe.check() for probe in self._probes))
        best = next((verdict for verdict in verdicts if verdict.healthy), verdicts[0])
        document: dict[str, object] = best.document | {
            "engine": self._engine.state,
            "restarts": self._engine.restarts,
            "preparers": dict(enumerate(self._preparers.states)),
            "preparer_restarts": self._preparers.restarts,
            "queue": self._batcher.queued,
            "batches_in_flight": self._batcher.in_flight,
        }
        if len(verdicts) > 1:
            document["ranks"] = {
                f"{index}.{rank}": state
                for index, group in enumerate(self._engine.groups)
                for rank, state in enumerate(group.rank_states)
            }
            document["groups"] = {index: verdict.document for index, verdict in enumerate(verdicts)}
        return Verdict(best.healthy, document)

    async def prove(self, index: int) -> str:
        """Encode each modality on that group: what is wrong with the results, or nothing."""
        return await self._probes[index].encode_all()

    async def close(self) -> None:
        """End the probes that are under way."""
        for probe in self._probes:
            await probe.close()


class GroupProbe:
    """Judges one group of ranks. Simultaneous probes share one encode."""

    def __init__(
        self,
        pipeline: Pipeline,
        route: Route,
        group: Supervisor,
        preparers: Preparers,
        work: GroupWork,
        media: Mapping[Modality, bytes],
        stall_s: float,
    ) -> None:
        self._pipeline, self._route, self._group, self._preparers = pipeline, route, group, preparers
        self._work, self._media, self._stall_s = work, media, stall_s
        self._outcomes: dict[Modality, _Outcome] = {}
        self._last_success: float | None = None
        self._probe: asyncio.Task[str] | None = None

    async def check(self) -> Verdict:
        """Judge by progress when a forward is in flight, else encode each modality the model has."""
        if not self._group.ready:
            return self._verdict(self._group.reason)
        if self._probe is None:
            if self._group.forward_age_s() is not None:
                return self._by_progress()
            self._probe = asyncio.create_task(self.encode_all())
            self._probe.add_done_callback(self._forget)
        probe = self._probe
        # Shared with other probers, so one that leaves or gives up does not end it.
        await asyncio.wait((probe,), timeout=ANSWER_S)
        if probe.done():
            return self._verdict("the server is stopping" if probe.cancelled() else probe.result())
        if self._work.traffic:
            return self._by_progress()
        if (preparing := self._preparers.oldest_s()) is not None:
            return self._verdict("", busy=f"preparing for {preparing:.1f} s")
        if self._last_success is not None and time.time() - self._last_success < ANSWER_S + RECENT_S:
            return self._verdict("")
        return self._verdict(f"a probe's encode on an idle engine did not end within {ANSWER_S} s")

    async def close(self) -> None:
        """End a probe that is under way."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    def _forget(self, probe: asyncio.Task[str]) -> None:
        self._probe = None

    async def encode_all(self) -> str:
        """Encode every modality; the first reason why one did not work, or nothing."""
        reasons = await asyncio.gather(*(self._encode(modality, media) for modality, media in self._media.items()))
        return next((reason for reason in reasons if reason), "")

    async def _encode(self, modality: Modality, media: bytes) -> str:
        started = time.perf_counter()
        deadline = time.monotonic() + self._stall_s
        request = EncodeRequest(f"health-{uuid.uuid4().hex}", modality, [MediaItem(media)], deadline)
        reason = ""
        try:
            async with asyncio.timeout(self._stall_s):
                reason = _flaw(await self._pipeline.encode(request, self._route))
        except EncodeError as error:
            reason = error.message
        except TimeoutError:
            reason = f"no embedding after {self._stall_s:g} s"
        except Exception as error:
            log.exception("the probe of %s failed", modality)
            reason = f"the probe failed: {type(error).__name__}"
        self._outcomes[modality] = _Outcome(time.time(), time.perf_counter() - started, reason)
        if not reason:
            self._last_success = time.time()
        return f"{modality}: {reason}" if reason else ""

    def _by_progress(self) -> Verdict:
        age, limit = self._group.forward_age_s() or 0.0, self._group.limit_s()
        if age < limit:
            return self._verdict("", busy="encoding")
        return self._verdict(f"a forward has been in flight for {age:.1f} s, expected within {limit:.1f} s")

    def _verdict(self, reason: str, busy: str = "") -> Verdict:
        document: dict[str, object] = {
            "status": "unhealthy" if reason else "healthy",
            "reason": reason or busy or "encoded",
            "engine": self._group.state,
            "ranks": dict(enumerate(self._group.rank_states)),
            "restarts": self._group.restarts,
            "batches_in_flight": len(self._work.running),
            "oldest_forward_s": self._group.forward_age_s(),
            "last_success": self._last_success,
            "modalities": {
                modality: {
                    "ok": not outcome.reason,
                    "at": outcome.at,
                    "seconds": outcome.seconds,
                    "reason": outcome.reason,
                }
                for modality, outcome in self._outcomes.items()
            },
        }
        return Verdict(not reason, document)


def _flaw(encoded: Encoded) -> str:
    """What is wrong with the embedding, or nothing: its shape, its size, a value that is not finite."""
    data = encoded.contiguous()
    if encoded.shape[0] < 1 or data.nbytes != encoded.nbytes:
        return f"{data.nbytes} bytes for an embedding of shape {encoded.shape}"
    if encoded.dtype == "bfloat16":  # numpy has none: the upper half of a float32
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, np.dtype(encoded.dtype))
    return "" if np.isfinite(values).all() else "values that are not finite"
