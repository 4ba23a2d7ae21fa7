"""The server as an application of Ray Serve: `serve run bdh_batch.deploy.ray:app config=FILE`.

Ray places the processes, restarts them, scales them and routes HTTP to front ends. What front ends and engines say to
each other goes over connections of their own (`backends/`), as between the processes of one machine.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from bdh_batch.deploy.checks import check, fronts_on_any_node, share_of, with_threads
from bdh_batch.deploy.replicas import HEAD_NODE, DirectoryReplica, EngineReplica, FrontReplica
from bdh_batch.deploy.scaling import desired_engines
from bdh_batch.errors import ConfigError
from bdh_batch.processes.model_settings import ModelSettings, models_of
from bdh_batch.settings import Settings, load

ON_HEAD = {HEAD_NODE: 0.001}
LOOK_BACK_SECONDS = 12.0  # over which a load is averaged; Ray warns of less than it takes to report one
TRIES = 3  # to start a process, before the server cannot start
SLACK_SECONDS = 10.0  # for what follows a drain, until Ray kills a process
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # what Ray says beside what this package logs


def app(args: dict[str, str]) -> serve.Application:
    """Builds the application, for `serve run` and `serve deploy`.

    Args:
        args: `config`, the path of a YAML file of options; and any option, as in {"engine.replicas": "2"}.

    Raises:
        ConfigError: an option does not fit.
    """
    given = dict(args)
    config = given.pop("config", None)
    resolved = load(None if config is None else Path(config), given.items(), "arguments")
    return application(resolved.settings)


def application(settings: Settings, front_end: type[FrontReplica] = FrontReplica) -> serve.Application:
    """Builds the application of settings.

    Args:
        front_end: what runs as front end.

    Raises:
        ConfigError: the settings do not fit a cluster.
    """
    models = models_of(settings)
    check(settings, models)
    _make_store(settings)
    secret = secrets.token_hex(16)
    grace = settings.server.drain_seconds + SLACK_SECONDS
    directory = _deployment(
        DirectoryReplica,
        name="directory",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
    )
    listed = directory.bind()
    engines = [
        _engine_deployment(model, number, len(models), grace).bind(
            with_threads(model, share_of(model, len(models)).cpus), number, secret, listed
        )
        for number, model in enumerate(models)
    ]
    front = _deployment(
        serve.ingress()(front_end),
        name="front",
        num_replicas=settings.server.workers,
        max_ongoing_requests=100_000,  # the front end itself bounds them, and says so
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        ray_actor_options={"num_cpus": 0} | ({} if fronts_on_any_node(settings.store) else {"resources": ON_HEAD}),
    )
    return front.bind(settings, secret, listed, *engines)


def _make_store(settings: Settings) -> None:
    """Makes the folder of the store, which engines look for. Raises ConfigError."""
    path = settings.store.path
    if path is None:
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"store.path: {path} cannot be made ({error})") from error


def _deployment(kind: type, **options: Any) -> serve.Deployment:
    return serve.deployment(**options, max_constructor_retry_count=TRIES, logging_config=QUIET)(kind)


def _engine_deployment(model: ModelSettings, number: int, models: int, grace: float) -> serve.Deployment:
    settings, share = model.settings, share_of(model, models)
    least, most = share.least, share.most
    options: dict[str, Any] = {"num_replicas": least}
    if most > least:
        policy = AutoscalingPolicy(policy_function=desired_engines)  # type: ignore[no-untyped-call]
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                upscale_delay_s=settings.ray.upscale_seconds,
                downscale_delay_s=settings.ray.downscale_seconds,
                look_back_period_s=LOOK_BACK_SECONDS,
                policy=policy,
            )
        }
    return _deployment(
        EngineReplica,
        name=f"engine-{number}",
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        **options,
    )
