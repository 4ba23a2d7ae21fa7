"""What a cluster needs of the settings, and what they need of a cluster. What cannot work is refused at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bdh_batch.errors import ConfigError
from bdh_batch.processes import supervisor
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.settings import Settings
from bdh_batch.system.machine import usable_cores

# What Ray decides, or its proxies do, is not an option there.
NOT_OURS = {
    "server.uds": "Ray's proxy listens, and has no Unix sockets: server.host and server.port say where",
    "server.pid_file": "`bdh-batch reload` does not reach a cluster: `serve deploy` replaces engines there",
    "server.max_loaded_models": "all models stay loaded on a cluster",
    "kserve.grpc_port": "Ray's proxy takes HTTP alone",
    "scheduler.trace_file": "the engines of a cluster share no file",
}


@dataclass(frozen=True, slots=True)
class Share:
    """What the engines of a model take of a cluster.

    Args:
        least, most: engines.
        cpus, gpus: of each.
    """

    least: int
    most: int
    cpus: int
    gpus: float


def check(settings: Settings, models: Sequence[ModelSettings]) -> None:
    """Checks that options fit a cluster. Raises ConfigError where they do not."""
    supervisor.check(settings, models)
    for option, why in NOT_OURS.items():
        section, _, key = option.partition(".")
        if getattr(getattr(settings, section), key) is not None:
            raise ConfigError(f"{option}: {why}; leave it out")
    if settings.server.workers > 1 and settings.store.path is None:
        text = "each of several front ends (server.workers) would have a store of its own; set it to a folder"
        raise ConfigError(f"store.path: {text}")
    for model in models:
        where = f"models ({model.name}): " if settings.models else "engine."
        if model.on_demand:
            raise ConfigError(f"models ({model.name}): load: on_demand is for one machine; on a cluster all are warm")
        if model.settings.engine.devices:
            raise ConfigError(f"{where}devices: Ray gives each engine its GPU (ray.gpus_per_engine); leave it out")
        least, most = model.settings.engine.replicas or 1, settings.ray.max_replicas
        if most is not None and most < least:
            raise ConfigError(f"ray.max_replicas: {most}, but {where}replicas is {least}, which is the least")


def share_of(model: ModelSettings, models: int) -> Share:
    """Returns what the engines of one of so many models take.

    An engine without `engine.threads` gets an equal share of this machine's cores; beside a GPU, one.
    """
    settings = model.settings
    least = settings.engine.replicas or 1
    most = max(least, settings.ray.max_replicas or least)
    gpus = settings.ray.gpus_per_engine
    if gpus is None:
        gpus = 1.0 if settings.model.device == "cuda" else 0.0
    cpus = settings.engine.threads or (1 if gpus else max(1, usable_cores() // (most * models)))
    return Share(least, most, cpus, gpus)


def with_threads(model: ModelSettings, threads: int) -> ModelSettings:
    """Returns the settings with as many threads as Ray has reserved cores."""
    engine = model.settings.engine.model_copy(update={"threads": threads, "devices": []})
    return replace(model, settings=model.settings.model_copy(update={"engine": engine}))


def check_room(shares: Mapping[str, Share], nodes: Sequence[Mapping[str, float]]) -> Sequence[str]:
    """Checks that a cluster has room for the least engines, and returns warnings of what it has no room for.

    Args:
        shares: of each model, by its name.
        nodes: the resources of each node, CPU and GPU.

    Raises:
        ConfigError: it has none.
    """
    warnings = []
    for kind, of in (("CPU", "cpus"), ("GPU", "gpus")):
        there = sum(node.get(kind, 0.0) for node in nodes)
        largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        for name, share in shares.items():
            if getattr(share, of) > largest:
                text = f"an engine of {name} takes {getattr(share, of):g} {kind}, and no node has more than {largest:g}"
                raise ConfigError(f"{'engine.threads' if kind == 'CPU' else 'ray.gpus_per_engine'}: {text}")
        least = sum(share.least * getattr(share, of) for share in shares.values())
        most = sum(share.most * getattr(share, of) for share in shares.values())
        if least > there:
            text = f"the engines take {least:g} {kind} in all, and the cluster has {there:g}"
            raise ConfigError(f"engine.replicas: {text}")
        if most > there:
            warnings.append(f"ray.max_replicas: so many engines take {most:g} {kind}, and the cluster has {there:g}")
    return warnings
