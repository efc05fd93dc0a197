"""Every bound on what a stranger can make a server read, decode, hold or send: one table, made of the constants and
options that enforce it.

`docs/security.md` shows the table; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from encode_server import errors
from encode_server.api import body, profiles, schemas
from encode_server.delivery import destinations, folder, mooncake
from encode_server.delivery.sglang import endpoints, registrations, sizes
from encode_server.engine import profile_limits
from encode_server.media import patience, web
from encode_server.media.limits import MediaLimits
from encode_server.pipeline import admission
from encode_server.pipeline.shared import cache as shared
from encode_server.prepare import preparers
from encode_server.runtime import bodies
from encode_server.runtime.connections import ConnectionLimits
from encode_server.settings import Settings, option_name
from encode_server.telemetry import history


@dataclass(frozen=True)
class Bound:
    """`name`: what is bounded. `owner`: the module that enforces the bound. `option`: the setting, empty where there is
    none. `metric`: what shows how far it is used. `told`: what the caller gets beyond it."""

    name: str
    owner: str
    value: float | int | str
    unit: str
    told: str
    option: str = ""
    metric: str = ""

    def row(self) -> str:
        """The bound as a row of a Markdown table."""
        value = f"{self.value:g}" if isinstance(self.value, float) else str(self.value)
        cells = (
            self.name,
            f"{value} {self.unit}".strip(),
            f"`{option_name(self.option)}`" if self.option else "",
            f"`{self.metric}`" if self.metric else "",
            self.told,
            f"`{self.owner}`",
        )
        return "| " + " | ".join(cells) + " |"


HEADER = "| bound | value | option | metric | beyond it | enforced by |\n| --- | --- | --- | --- | --- | --- |"


def bounds(settings: Settings) -> list[Bound]:
    """All bounds of a server with these settings."""
    return [
        *_of_connections(settings),
        *_of_requests(settings),
        *_of_media(settings),
        *_of_deliveries(settings),
        *_of_the_history(),
    ]


def table(found: Iterable[Bound]) -> str:
    """The bounds as a Markdown table."""
    return "\n".join((HEADER, *(bound.row() for bound in found)))


def _of_connections(s: Settings) -> Iterable[Bound]:
    limits = ConnectionLimits()
    where = "runtime/connections.py"
    idle = "the connection idle longest is closed; 503 where none is idle"
    yield Bound("open connections", where, s.max_connections, "", idle, "max_connections")
    yield Bound("request line and headers; trailers, chunk sizes", where, limits.head_bytes, "bytes", "431, closed")
    yield Bound("header lines", where, limits.headers, "", "431, closed")
    yield Bound("time of a head, of a TLS handshake", where, limits.head_s, "s", "408, closed")
    yield Bound("requests pipelined behind one", where, limits.pipelined, "", "closed")
    yield Bound("time to take what was written", where, s.send_timeout_s, "s", "closed", "send_timeout_s")
    yield Bound(
        "rate of a body",
        "runtime/bodies.py",
        s.least_rate_kb,
        f"KiB/s after {bodies.GRACE_S:g} s",
        "408",
        "least_rate_kb",
    )
    yield Bound(
        "rate of an answer",
        "api/encode.py",
        s.least_rate_kb,
        f"KiB/s after {bodies.GRACE_S:g} s",
        "closed, `delivery_failed`",
        "least_rate_kb",
    )


def _of_requests(s: Settings) -> Iterable[Bound]:
    where = "pipeline/admission.py"
    progress = "encode_requests_in_progress"
    yield Bound("requests in progress", where, s.max_requests, "", "429", "max_requests", progress)
    yield Bound(
        "bodies, downloads, embeddings of the requests in progress",
        where,
        s.max_inflight_mb,
        "MiB",
        "429; one alone 413",
        "max_inflight_mb",
        "encode_inflight_bytes",
    )
    yield Bound("bytes of a body that are held before they arrive", where, admission.FIRST_BYTES, "bytes", "")
    yield Bound(
        "patches and mel frames in progress",
        where,
        s.max_inflight_tokens,
        "",
        "429",
        "max_inflight_tokens",
        "encode_inflight_tokens",
    )
    yield Bound("share of one client", where, s.client_share, "", "429", "client_share")
    yield Bound("a body", "api/body.py", s.max_body_mb, "MiB", "413", "max_body_mb")
    yield Bound("a text field of a form", "api/body.py", body.FORM_TEXT, "bytes", "400")
    json = body.json_limits(s.max_items)
    yield Bound("a JSON body beside its media", "api/body.py", json.max_bytes, "bytes", "400")
    yield Bound("strings in a larger JSON body", "api/body.py", json.max_strings, "", "400")
    yield Bound("items of a request", "api/body.py", s.max_items, "", "400", "max_items")
    yield Bound("a number in a request", "api/schemas.py", schemas.MAX_INT, "", "400")
    yield Bound("req_id, uuid", "api/schemas.py", schemas.MAX_ID, "characters", "400")
    yield Bound("ports of a request (SGLang)", "api/schemas.py", schemas.MAX_PORTS, "", "400")
    yield Bound("a message about an error", "errors.py", errors.MAX_MESSAGE, "characters", "cut")
    yield Bound("a request's time", "service/life.py", s.max_timeout_s, "s", "504", "max_timeout_s")
    yield Bound("forwards of a profile", "api/profiles.py", profiles.MAX_FORWARDS, "", "400; the profile ends")
    yield Bound("length of a profile", "engine/profiler.py", profile_limits.MAX_SECONDS, "s", "the profile ends")
    yield Bound("events of a profile", "engine/profiler.py", profile_limits.MAX_BYTES >> 20, "MiB", "the profile ends")


def _of_media(s: Settings) -> Iterable[Bound]:
    limits = MediaLimits()
    yield Bound("a media item as sent or downloaded", "media/limits.py", s.max_media_mb, "MiB", "413", "max_media_mb")
    yield Bound("pixels of an image or a frame", "media/limits.py", s.max_pixels, "", "413", "max_pixels")
    yield Bound("reads of an image file, slow formats apart", "media/image.py", limits.image_reads, "", "413")
    yield Bound("frames of a video", "media/limits.py", s.max_frames, "", "413", "max_frames")
    yield Bound("chosen frames of a video, decoded", "media/limits.py", limits.max_decoded_bytes >> 20, "MiB", "413")
    yield Bound("length of a video", "media/limits.py", limits.max_video_seconds, "s", "413")
    yield Bound("length of audio", "media/limits.py", s.max_audio_s, "s", "413", "max_audio_s")
    yield Bound("time of a decode", "media/limits.py", s.decode_s, "s", "413", "decode_s")
    yield Bound("memory of a preparer", "prepare/confine.py", s.preproc_memory_mb, "MiB", "413", "preproc_memory_mb")
    yield Bound(
        "tensors that wait in preparers",
        "prepare/preparers.py",
        preparers.MAX_HELD >> 20,
        "MiB",
        "no item is begun",
        "",
        "encode_queued_preparations",
    )
    yield Bound(
        "patches or mel frames of an item", "pipeline/pipeline.py", s.max_item_tokens, "", "413", "max_item_tokens"
    )
    yield Bound(
        "inputs and embeddings of batches",
        "engine/arena.py",
        s.arena_mb,
        "MiB",
        "waits; one alone 413",
        "arena_mb",
        "encode_arena_used_bytes",
    )
    yield Bound(
        "embeddings kept", "pipeline/cache.py", s.cache_gb, "GiB", "the oldest go", "cache_gb", "encode_cache_bytes"
    )
    where = "pipeline/shared/cache.py"
    yield Bound(
        "an embedding in the shared cache", where, s.shared_cache_max_mb, "MiB", "not shared", "shared_cache_max_mb"
    )
    yield Bound(
        "time of a look-up in the shared cache",
        where,
        s.shared_cache_timeout_ms,
        "ms",
        "encoded here",
        "shared_cache_timeout_ms",
        "encode_shared_cache_seconds",
    )
    yield Bound(
        "embeddings that wait for the shared cache",
        where,
        shared.QUEUED_BYTES >> 20,
        "MiB",
        "not shared",
        "",
        "encode_shared_cache_queued_bytes",
    )
    yield Bound("downloads", "media/web.py", web.MAX_FETCHES, "", "waits")
    yield Bound("downloads of one client", "media/web.py", int(web.MAX_FETCHES * web.CLIENT_SHARE), "", "waits")
    yield Bound("time of a download", "media/web.py", s.fetch_s, "s", "400", "fetch_s")
    yield Bound("redirects of a download", "media/web.py", limits.redirects, "", "400")
    yield Bound("head of a media server's response", "media/patience.py", patience.HEAD_BYTES, "bytes", "400")


def _of_deliveries(s: Settings) -> Iterable[Bound]:
    yield Bound("embeddings of one request", "pipeline/request.py", s.max_answer_mb, "MiB", "413", "max_answer_mb")
    yield Bound(
        "embeddings on their way",
        "delivery/undelivered.py",
        s.undelivered_mb,
        "MiB",
        "429; one alone 413",
        "undelivered_mb",
        "encode_undelivered_bytes",
    )
    yield Bound("time of a push", "delivery/push.py", s.send_timeout_s, "s", "502", "send_timeout_s")
    where = "delivery/outgoing.py"
    yield Bound(
        "embeddings in memory registered with NIXL",
        where,
        s.nixl_pool_mb,
        "MiB",
        "pushed over ZMQ",
        "nixl_pool_mb",
        "encode_nixl_pool_bytes",
    )
    yield Bound(
        "embeddings in memory registered with Mooncake",
        where,
        s.mooncake_pool_mb,
        "MiB",
        "registered by itself",
        "mooncake_pool_mb",
        "encode_mooncake_pool_bytes",
    )
    yield Bound("transfers by Mooncake, begun or waiting", "delivery/mooncake.py", mooncake.MAX_WAITING, "", "502")
    yield Bound(
        "callers that wait for a size (SGLang, Mooncake)", "delivery/sglang/sizes.py", sizes.MAX_WAITING, "", "429"
    )
    yield Bound("names looked up for destinations", "delivery/destinations.py", destinations.LOOK_UPS, "", "waits")
    yield Bound(
        "names looked up for one client",
        "delivery/destinations.py",
        int(destinations.LOOK_UPS * destinations.CLIENT_SHARE),
        "",
        "waits",
    )
    where = "delivery/sglang/registrations.py"
    yield Bound(
        "registrations (SGLang)",
        where,
        registrations.MAX_EARLY,
        "",
        "the client with most loses its oldest",
        "",
        "encode_registrations",
    )
    yield Bound("destinations of a req_id (SGLang)", where, registrations.MAX_OFFERS, "", "429")
    yield Bound("receive_count (SGLang)", "delivery/sglang/endpoints.py", endpoints.MAX_RECEIVERS, "", "400")
    yield Bound(
        "stored embeddings, as the disk has them",
        "delivery/folder.py",
        s.ec_store_gb,
        "GiB",
        "the oldest go; 507",
        "ec_store_gb",
    )
    yield Bound("stored embeddings, their number", "delivery/folder.py", folder.MAX_ENTRIES, "", "the oldest go; 507")


def _of_the_history() -> Iterable[Bound]:
    where = "telemetry/history.py"
    yield Bound("time that `/status` looks back", where, int(history.SLOT_S * history.SLOTS), "s", "the oldest goes")
    yield Bound("slow requests kept", where, history.SLOTS * history.SLOWEST, "", "the fastest go")
    yield Bound("kinds of failures kept, of the server, of callers", where, history.FAILURES, "each", "the oldest go")
    yield Bound("destinations kept", where, history.DESTINATIONS, "", "the one used least recently goes")
    yield Bound("a message, a name that is kept", where, history.MAX_TEXT, "characters", "cut")
