"""Ray Serve's request router of the encoders: by content, and by seconds of work."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from encode_server.cluster.balance import Replica, least_loaded, ranked


class ContentRouter(RequestRouter):  # type: ignore[misc]
    """The key of a request is Ray Serve's session id, which the door sets to the content's hash. What a replica says
    of its work comes with Ray Serve's routing statistics (`EncoderReplica.record_routing_stats`)."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`: replicas of the first group are tried first."""
        if pending_request is None:
            return least_loaded(candidate_replicas, self._load)
        pending_request.routing_context.should_backoff = True
        key = pending_request.metadata.session_id
        if not key:
            return least_loaded(candidate_replicas, self._load)
        return ranked(key, candidate_replicas, self._load)

    def _load(self, replica: RunningReplica) -> Replica:
        backlog_s = float((replica.routing_stats or {}).get("backlog_s", 0.0))
        requests = self._replica_queue_len_cache.get(replica.replica_id)
        return Replica(replica.replica_id.unique_id, backlog_s, requests or 0)
