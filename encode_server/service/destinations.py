"""Where a request's embedding goes, from what the request says and what this server's options allow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from encode_server.delivery.base import Delivery, Kept
from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.native import NativePush, Nixl
from encode_server.delivery.push import Pusher
from encode_server.delivery.sglang.deliveries import SGLangDeliveries, SGLangPush
from encode_server.delivery.sglang.registrations import Offer
from encode_server.delivery.store import EmbeddingStore, StoreDelivery
from encode_server.errors import BadRequest, Forbidden
from encode_server.service.caller import Ask
from encode_server.wire.embedding import OutgoingRoom, Recall


@dataclass(frozen=True)
class Destination:
    """A delivery, whether the answer to the caller says nothing about it (SGLang's `null`), and what finds items that
    were delivered there before. `announce`: wants to know the embedding's rows, width and dtype as soon as all items
    are prepared. `room`: where the embedding had best lie."""

    delivery: Delivery
    silent: bool = False
    recall: Recall | None = None
    announce: Callable[[str, int, int, str], None] | None = None
    room: OutgoingRoom | None = None


class Destinations:
    """Makes the deliveries of one server. `sglang` and `store` are None where the options did not ask for them."""

    def __init__(
        self,
        policy: DestinationPolicy,
        pusher: Pusher,
        pool: Executor,
        sglang: SGLangDeliveries | None,
        store: EmbeddingStore | None,
        *,
        keyed: bool,
        nixl: Nixl | None = None,
    ) -> None:
        """`keyed`: clients are told apart by their API keys, not by their addresses."""
        self.policy = policy
        self._keyed, self._nixl = keyed, nixl
        self._pusher, self._pool, self._sglang, self._store = pusher, pool, sglang, store

    async def resolve(self, ask: Ask, req_id: str, client: str, held: contextlib.ExitStack) -> Destination | None:
        """Where the embedding goes; None when it goes back in the answer. `held` is left when the request ends.
        `client`: who asks.

        Raises BadRequest, Forbidden, DeliveryFailed.
        """
        to_engine = self._sglang is not None and ask.frames != "native" and ask.prefill_host is not None
        if ask.pool is not None and (ask.stored or to_engine):
            raise BadRequest(f"pool is {ask.pool.value!r}, but an engine takes an item's rows, not one vector")
        if ask.cached:
            if ask.prefill_host is not None or ask.embedding_port is not None:
                raise BadRequest("delivery is 'cache', which goes without prefill_host and embedding_port")
            return Destination(Kept())
        if ask.stored:
            store = self._to_store(ask)
            return Destination(store, recall=store.recall)
        if ask.frames == "sglang" and self._sglang is None:
            raise BadRequest("frames is 'sglang', which only a server with --protocol sglang pushes")
        if self._sglang is not None and ask.frames != "native" and ask.prefill_host is not None:
            to_sglang = await self._to_sglang(self._sglang, ask, ask.prefill_host, client, held)
            return Destination(to_sglang, silent=True, announce=to_sglang.announce, room=to_sglang.room)
        if (ask.prefill_host is None) != (ask.embedding_port is None):
            raise BadRequest("prefill_host and embedding_port go together: one is missing")
        if ask.prefill_host is None or ask.embedding_port is None:
            return None
        if isinstance(ask.embedding_port, list):
            raise BadRequest("embedding_port is a list, which SGLang's frames alone go to")
        endpoint = await self.policy.endpoint(ask.prefill_host, ask.embedding_port, client=client)
        nixl = self._nixl if ask.readable else None
        push = NativePush(self._pusher, endpoint, self._pool, nixl)
        return Destination(push, room=nixl.room if nixl is not None else None)

    async def _to_sglang(
        self, sglang: SGLangDeliveries, ask: Ask, host: str, client: str, held: contextlib.ExitStack
    ) -> SGLangPush:
        if ask.embedding_port is None:
            if ask.req_id is None:
                raise BadRequest("prefill_host without embedding_port waits for registrations, which need a req_id")
            # Whoever knows a req_id may register for it: only destinations at the prefill's host get the embedding.
            at_host = frozenset(await self.policy.addresses(host, client=client))
            return held.enter_context(
                sglang.to_registered(ask.req_id, lambda offer: offer.address in at_host or self._trusted(offer, client))
            )
        ports = ask.embedding_port if isinstance(ask.embedding_port, list) else [ask.embedding_port]
        return sglang.to_endpoints(await self.policy.endpoints(host, ports, client=client))

    def _trusted(self, offer: Offer, client: str) -> bool:
        """Whether a rank on another host than the prefill's may have the embedding: its registration came with the API
        key of the request itself, or the operator allowed its network by name."""
        return (self._keyed and offer.client == client) or self.policy.named(offer.address)

    def _to_store(self, ask: Ask) -> StoreDelivery:
        if ask.prefill_host is not None or ask.embedding_port is not None:
            raise BadRequest("delivery is 'ec_store', which goes without prefill_host and embedding_port")
        if self._store is None:
            raise Forbidden("delivery is 'ec_store', but this server has no store: it was started without --ec-store")
        return self._store.delivery([item.uuid for item in ask.items])
