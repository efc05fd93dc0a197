"""The application that `serve run` and a Ray Serve config file name: `encode_server.cluster.application:build`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from encode_server.client.encoders import Choice
from encode_server.cluster.door import Door, DoorOptions
from encode_server.cluster.encoder import EncoderReplica
from encode_server.cluster.router import ContentRouter
from encode_server.cluster.scaling import ByBacklog
from encode_server.errors import StartupError
from encode_server.settings import load_settings

HEALTH_PERIOD_S = 5.0
STATS_PERIOD_S = 1.0
OF_THE_ADDRESS = {"host", "port", "ssl_certfile", "ssl_keyfile"}  # the cluster's, not a replica's


class Arguments(BaseModel):
    """What `serve run … NAME=VALUE` and `args:` of a config file may say."""

    model_config = ConfigDict(extra="forbid")

    model: str
    options: dict[str, Any] = Field({}, description="options of each server, by their names in a TOML file")
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_backlog_s: float = Field(0.5, gt=0, description="seconds of work that a replica should hold at most")
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(120.0, ge=0)
    cpus: float = Field(1.0, ge=0, description="cores that Ray counts for a replica")
    gpus: int | None = Field(None, ge=0, description="GPUs of a replica, on one node; by default one per rank")
    retry_s: float = Field(60.0, ge=0, description="how long a request is tried again while encoders are lost")
    choice: Choice = Field("content", description="`least_loaded`: content does not count, only work does")
    doors: int = Field(1, ge=1, description="replicas of the door, each on a node of its own")
    door_resources: dict[str, float] = Field(
        {}, description="resources that the door asks of its node, so that it stands on nodes that stay"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Arguments:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


def build(args: Arguments) -> Application:
    """The door before the encoders. Raises StartupError for options that cannot work."""
    settings = load_settings({"model": args.model} | args.options)
    if settings.protocol == "sglang":
        raise StartupError(
            "SGLang's prefills are not served by a Ray cluster: start plain servers behind "
            "`encode-server route --protocol sglang` for them"
        )
    # Whatever was said here, in a file or by variables, holds on every node.
    options = settings.model_dump(mode="json", include=settings.model_fields_set - OF_THE_ADDRESS) | {"port": 0}
    gpus = args.gpus if args.gpus is not None else 0 if settings.device == "cpu" else settings.tp * settings.dp
    encoder = serve.deployment(
        EncoderReplica,
        name="Encoder",
        max_ongoing_requests=settings.max_requests,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            policy=AutoscalingPolicy(
                policy_function=ByBacklog, policy_kwargs={"target_backlog_s": args.target_backlog_s}
            ),
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=ContentRouter, request_routing_stats_period_s=STATS_PERIOD_S
        ),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=settings.stall_s,
        graceful_shutdown_timeout_s=settings.max_timeout_s,
        graceful_shutdown_wait_loop_s=1.0,
    ).bind(options)
    return serve.deployment(
        Door,
        name="Door",
        num_replicas=args.doors,
        max_replicas_per_node=1,
        max_ongoing_requests=settings.max_requests * args.max_replicas,
        ray_actor_options={"num_cpus": 0, "resources": args.door_resources},
    ).bind(
        encoder,
        DoorOptions(
            api_keys=settings.api_keys,
            max_requests=settings.max_requests * args.max_replicas,
            max_inflight_bytes=settings.max_inflight_mb << 20,
            max_body_bytes=settings.max_body_mb << 20,
            client_share=settings.client_share,
            least_rate=settings.least_rate_kb << 10,
            retry_s=args.retry_s,
            by_content=args.choice == "content",
        ),
    )
