"""Every option of the server, once: its name, its default, its help and its `ENCODE_SERVER_*` variable.

`encode-server serve` takes each field as `--kebab-case`, `uvicorn encode_server.app:app` reads the variables, and both
read the TOML file of `--config` or `ENCODE_SERVER_CONFIG`. All go through `load_settings`, so a wrong value gives the
same sentence whichever way it came.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from encode_server.errors import StartupError
from encode_server.runtime.options_file import read_config, suggestion

log = logging.getLogger(__name__)

ENV_PREFIX = "ENCODE_SERVER_"

RENAMED = {"engine": "protocol"}
"""Options by the names that earlier versions gave them, and their present names. Both are taken."""

# What Kubernetes puts into every pod for a Service called encode-server.
OF_A_SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)$")

CommaList = Annotated[tuple[str, ...], NoDecode]
MODULE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"


class Settings(BaseSettings):
    """The options; sizes are in MiB (`_mb`), times in seconds (`_s`)."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, env_ignore_empty=True, extra="forbid")

    # What is served, and on what.
    model: str = Field("demo", description="checkpoint: a directory, a hub id, or `demo` (small, random weights)")
    served_model_name: CommaList = Field(
        (),
        description="names by which requests may call the model; answers have the first; none: what `--model` says",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    tp: int = Field(1, ge=1, le=64, description="tensor-parallel ranks, one device each")
    dp: int = Field(1, ge=1, le=64, description="groups of --tp ranks side by side, each with the whole encoder")
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="where the ranks run; auto: on GPUs when there are some (cuda: ROCm's, too)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's on CUDA, float32 on a CPU without fast bfloat16"
    )
    flash_attention: Literal["2", "3"] = Field(
        "2", description="version of FlashAttention on a GPU; 3: a Hopper GPU with the package flash_attn_3 installed"
    )
    tf32: bool = Field(
        False,
        description="on a GPU, multiply float32 matrices in TF32, several times faster and less exact",
    )

    # HTTP.
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(30000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    max_connections: int = Field(
        4096, ge=1, description="open connections; beyond it the one idle longest is closed for a new one"
    )
    max_body_mb: int = Field(128, ge=1, description="largest request body")
    max_items: int = Field(256, ge=1, description="most media items in one request")
    least_rate_kb: int = Field(
        64,
        ge=0,
        description="KiB a second at which a client must send its body and take its answer, on average after 5 s; "
        "0: any rate",
    )
    api_keys: CommaList = Field(
        (),
        description="keys of which all but probes, metrics and docs want one as `Authorization: Bearer`; better set by "
        "the variable",
    )
    page: Literal["on", "off"] = Field(
        "on", description="the page at `/`; what it shows, `/status`, wants an API key, if there are any"
    )
    ssl_certfile: str | None = Field(None, description="certificate chain in PEM: serve HTTPS")
    ssl_keyfile: str | None = Field(None, description="its private key in PEM")

    # Pools, batches, memory.
    preproc_workers: int = Field(8, ge=1, le=256, description="threads that decode and preprocess media, in all")
    preproc_processes: int = Field(
        0, ge=0, le=64, description="processes that these threads are spread over; 0: one for every two cores"
    )
    preproc_memory_mb: int = Field(
        6144, ge=512, description="memory that such a process may take for decoding; an item that needs more is refused"
    )
    preproc_device: str = Field(
        "cpu",
        description="where images and videos are resized and normalised, as far as the checkpoint's processors can: "
        "cpu, cuda (the GPUs in turns, one for each such process), or cuda:N",
    )
    send_workers: int = Field(4, ge=1, le=256, description="threads that prepare answers and deliveries")
    rank_threads: int = Field(0, ge=0, description="CPU threads of each rank; 0: the cores shared among the ranks")
    image_batch_tokens: int = Field(16384, ge=1, description="patches of images in one batch; a larger item goes alone")
    video_batch_tokens: int = Field(32768, ge=1, description="patches of video in one batch; a larger item goes alone")
    audio_batch_tokens: int = Field(
        48000, ge=1, description="mel frames of audio in one batch; a larger item goes alone"
    )
    cache_gb: float = Field(1.0, ge=0, description="GiB of embeddings kept for media seen again; 0: none")
    shared_cache: str | None = Field(
        None,
        description="second level of the cache, shared by replicas: redis://[[user]:password@]host[:port][/number], "
        "or rediss:// for TLS (best set by the variable where it holds a password); mooncake://master:port[/MiB lent]",
    )
    shared_cache_password_file: str | None = Field(
        None, description="file that holds its password, read at each connection"
    )
    shared_cache_timeout_ms: float = Field(100.0, gt=0, le=10_000, description="longest time of a look-up in it")
    shared_cache_ttl_s: int = Field(86_400, ge=1, le=10**9, description="an embedding in it goes after so long")
    shared_cache_max_mb: int = Field(16, ge=1, le=500, description="largest embedding that goes into it")
    trust_content_hash: bool = Field(
        False,
        description="a caller who names an item's content_hash gets the embedding known for it, and the media are not "
        "looked at; where none is known they are, and are verified",
    )
    arena_mb: int = Field(
        2048,
        ge=16,
        description="shared memory for inputs and embeddings in progress (used as needed; on a GPU, pinned as a whole)",
    )

    # Time.
    timeout_s: float = Field(60.0, gt=0, description="a request's deadline when it names none; with sglang, 170")
    max_timeout_s: float = Field(600.0, gt=0, description="the longest deadline a request may ask for")
    stall_s: float = Field(
        60.0,
        gt=0,
        description="older forwards mean that the ranks hang; what a forward should take, once learnt, gives "
        "a limit of its own",
    )
    load_timeout_s: float = Field(900.0, gt=0, description="longest time the ranks may take to load")
    grace_s: float = Field(20.0, ge=0, description="after SIGTERM: time for accepted work to finish")
    drain_s: float = Field(
        0.0, ge=0, description="after SIGTERM, before that: time in which requests are still taken and /readyz says 503"
    )

    # Faults.
    max_restarts: int = Field(
        10, ge=0, description="restarts within ten minutes of ranks that got no work done, before the server ends"
    )

    # Limits.
    max_requests: int = Field(1024, ge=1, description="requests in progress; beyond it 429")
    max_inflight_mb: int = Field(
        4096, ge=1, description="bodies, downloads and embeddings of the requests in progress; beyond it 429"
    )
    max_inflight_tokens: int = Field(
        4_000_000, ge=1, description="patches and mel frames of the requests in progress; beyond it 429"
    )
    client_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="largest share of each of these three that one client (API key, address) may hold while others "
        "are active; of --undelivered-mb, always",
    )
    max_item_tokens: int = Field(
        131_072, ge=1, description="patches or mel frames of one item, as preprocessed; beyond it 413"
    )

    # Media.
    media_allow: CommaList = Field(
        (),
        description="hosts media URLs may name; empty: the public internet. Names, *.names, networks, host:port, or "
        "`off`; `public` keeps the public internet beside them",
    )
    media_roots: CommaList = Field((), description="directories below which file:// media is read; empty: none")
    image_alpha: Literal["drop", "white"] = Field(
        "drop", description="transparent images: drop the alpha channel (transformers, SGLang), or lay on white (vLLM)"
    )
    media_formats: Literal["common", "all"] = Field(
        "common", description="image formats that are decoded; all: also those that are slow or rare"
    )
    max_media_mb: int = Field(64, ge=1, description="largest media item as sent or downloaded")
    max_pixels: int = Field(64_000_000, ge=1, description="most pixels of an image or a video frame, before decoding")
    max_frames: int = Field(36_000, ge=1, description="most frames in one video, before sampling")
    video_fps: float | None = Field(
        None,
        gt=0,
        description="frames per second taken from a video whose request does not say; none: the checkpoint's",
    )
    max_audio_s: float = Field(1800.0, gt=0, description="longest audio")
    decode_s: float = Field(30.0, gt=0, description="longest time for decoding one item")
    fetch_s: float = Field(20.0, gt=0, description="longest time for downloading one item")

    # Delivery.
    protocol: Literal["native", "sglang"] = Field(
        "native",
        description="what a pushed embedding looks like; sglang: SGLang's frames, and the endpoints that its prefill "
        "servers ask for beside /encode",
    )
    destination_allow: CommaList = Field(
        (), description="networks or hosts beside private and loopback ones that embeddings may be pushed to"
    )
    send_timeout_s: float = Field(30.0, gt=0, description="longest time a destination may take to accept a part")
    nixl_pool_mb: int = Field(
        0,
        ge=0,
        description="memory, registered once, that destinations may read embeddings from by NIXL, where a request asks "
        "for that; an embedding that finds no room there is pushed over ZMQ; 0: all are",
    )
    undelivered_mb: int = Field(
        4096, ge=1, description="embeddings waiting for their destinations, on the heap; beyond it 429, one alone 413"
    )
    max_answer_mb: int = Field(1024, ge=1, description="embeddings of one request; beyond it 413")
    sglang_receiver_module: str = Field(
        "sglang.srt.disaggregation.encoder.receiver",
        pattern=MODULE,
        description="module of SGLang's EmbeddingData; older releases: sglang.srt.disaggregation.encode_receiver",
    )
    sglang_modality_module: str = Field(
        "sglang.srt.multimodal.modality",
        pattern=MODULE,
        description="module of SGLang's Modality; older releases: sglang.srt.managers.schedule_batch",
    )
    mooncake_host: str | None = Field(
        None,
        description="this host's address, for SGLang's transfer backend `mooncake`: prefill servers offer memory, and "
        "embeddings are written there; none: not offered",
    )
    mooncake_pool_mb: int = Field(
        512,
        ge=0,
        description="memory, registered once, that embeddings are written to prefills from (used as needed; with rdma, "
        "pinned as a whole); an embedding that finds no room there is registered for its transfer; 0: all are",
    )
    mooncake_protocol: Literal["tcp", "rdma"] = Field("tcp", description="what Mooncake transfers by")
    mooncake_device: str = Field("", description="RDMA devices that Mooncake uses; empty: its choice")
    register_url: CommaList = Field(
        (), description="SGLang bootstrap servers to register with while ready, e.g. http://10.0.0.7:8997"
    )
    advertise_host: str | None = Field(
        None, description="host to register; none: --host, or this host's address towards the bootstrap"
    )
    advertise_port: int | None = Field(
        None, ge=1, le=65535, description="port to register; none: --port (give it under uvicorn's own command)"
    )
    ec_store: str | None = Field(
        None, description="directory for delivery `ec_store`, read by vLLM's encoder-cache connector; created if absent"
    )
    ec_store_gb: float = Field(50.0, gt=0, description="GiB of stored embeddings; beyond it the oldest go")
    ec_store_age_s: float = Field(3600.0, ge=120, description="a stored embedding goes when it was written so long ago")

    # Profiling and logging.
    profile_dir: str | None = Field(
        None, description="directory for the traces of /start_profile and /stop_profile; none: refused"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")
    log_format: Literal["text", "json"] = Field(
        "text",
        description="how the log is written; json: one object per line, with the ids of request and trace",
    )
    tracing: Literal["off", "otlp"] = Field(
        "off", description="spans of requests and their stages; otlp: sent as OpenTelemetry's OTEL_* variables say"
    )

    @field_validator("preproc_device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", value):
            raise PydanticCustomError("device", "cpu, cuda or cuda:N, e.g. cuda:0")
        return value

    @field_validator(
        *("media_allow", "media_roots", "destination_allow", "api_keys", "served_model_name", "register_url"),
        mode="before",
    )
    @classmethod
    def _split_commas(cls, value: Any, field: ValidationInfo) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            return value
        parts = tuple(part.strip() for part in parts if part.strip())
        if field.field_name == "api_keys" and not parts:
            # A secret that was not set must not open the server.
            raise PydanticCustomError("no_key", "at least one key; leave it out to serve everybody")
        return parts


SECRET = frozenset({"api_keys", "shared_cache"})
"""Options whose values are never quoted."""

PRELOAD = "encode_server.models.preload:preload"
"""What the forkserver calls before its first fork."""


def preload_argument(settings: Settings) -> bytes:
    """The argument of `PRELOAD`."""
    return json.dumps({"model": settings.model, "revision": settings.revision}).encode()


def load_settings(options: Mapping[str, Any] | None = None) -> Settings:
    """The settings from `options` (by field name, as text or typed), else the environment, else the file that `config`
    among them or `ENCODE_SERVER_CONFIG` names, else the defaults.

    Raises StartupError naming the option, what it got and what it takes.
    """
    given = _by_present_names(options or {})
    path = given.pop("config", None) or os.environ.get(variable_name("config"))
    if "api_keys" not in given and os.environ.get(variable_name("api_keys"), "unset").strip() == "":
        # Empty variables count as absent, but a secret that was not set must not open the server.
        raise StartupError(f"{variable_name('api_keys')} is empty: give a key, or unset it to serve everybody")
    from_file = _below_the_environment(read_config(path, Settings.model_fields)) if path else {}
    try:
        return Settings(**(from_file | given))
    except ValidationError as error:
        places = dict.fromkeys(from_file, str(path)) | dict.fromkeys(given, "")
        raise StartupError("; ".join(_complaint(e, places) for e in error.errors())) from None


def unknown_variables() -> list[str]:
    """One sentence for each `ENCODE_SERVER_*` variable that is no option. Those that Kubernetes sets for a Service
    called encode-server are passed over."""
    known = {name.upper() for name in ("config", *Settings.model_fields, *RENAMED)}
    given = {name: name.upper().removeprefix(ENV_PREFIX) for name in sorted(os.environ)}
    return [
        f"the variable {name} is no option{suggestion(rest, known, ENV_PREFIX)}"
        for name, rest in given.items()
        if rest != name.upper() and rest not in known and not OF_A_SERVICE.search(name)
    ]


def redacted(settings: Settings) -> dict[str, Any]:
    """The settings for other eyes: of keys only how many, of URLs neither credentials nor queries."""
    shown = settings.model_dump(mode="json")
    shown["api_keys"] = len(settings.api_keys)
    shown["shared_cache"] = settings.shared_cache and _bare(settings.shared_cache)
    shown["register_url"] = [_bare(url) for url in settings.register_url]
    return shown


def option_name(field: str) -> str:
    """`preproc_workers` → `--preproc-workers`."""
    return "--" + field.replace("_", "-")


def variable_name(field: str) -> str:
    """`preproc_workers` → `ENCODE_SERVER_PREPROC_WORKERS`."""
    return ENV_PREFIX + field.upper()


def _by_present_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, what was given by a former name now under the present one, also from the environment."""
    given = dict(options)
    for old, new in RENAMED.items():
        variable = os.environ.get(variable_name(old))
        if old in given:
            log.warning("%s is called %s now; the old name still works", option_name(old), option_name(new))
            given.setdefault(new, given.pop(old))
        elif variable and new not in given and variable_name(new) not in os.environ:
            log.warning("%s is called %s now; the old name still works", variable_name(old), variable_name(new))
            given[new] = variable
    return given


def _below_the_environment(from_file: dict[str, Any]) -> dict[str, Any]:
    """What no variable overrides; an empty variable counts as absent."""
    present = {name.upper() for name, value in os.environ.items() if value}
    return {field: value for field, value in from_file.items() if variable_name(field) not in present}


def _bare(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _complaint(error: Any, places: Mapping[str, str]) -> str:
    """`places`: the file that each field came from, empty for an option; a field that is not there is a variable's."""
    field = str(error["loc"][0])
    where = variable_name(field)
    if (place := places.get(field)) is not None:
        where = f"{place}: {field}" if place else option_name(field)
    kind = str(error["type"]).removesuffix("_parsing").removesuffix("_type")
    plain = {"int": "an integer", "float": "a number", "string": "text"}
    takes = plain.get(kind, error["msg"].removeprefix("Input should be "))
    of_kubernetes = str(error["input"]).startswith("tcp://") and field not in places
    hint = " (Kubernetes sets it for a Service; enableServiceLinks: false stops that)" if of_kubernetes else ""
    got = "something else" if field in SECRET and error["input"] else repr(error["input"])
    return f"{where}: got {got}, takes {takes}{hint}"
