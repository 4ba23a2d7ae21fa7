"""What a cluster needs of the settings, and what they need of a cluster. What cannot work is refused at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bdh_batch.errors import ConfigError
from bdh_batch.processes import supervisor
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.settings import Settings, Store
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
    if settings.server.workers > 1 and settings.store.path is None and settings.store.url is None:
        text = "each of several front ends (server.workers) would have a store of its own; set it, or store.url"
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


def fronts_on_any_node(store: Store) -> bool:
    """Whether front ends can be apart: the store is for several machines, and so is the folder of states on their way
    between them and engines."""
    return store.url is not None and store.path is not None


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
    for name, share in shares.items():
        for kind, option, each in (("CPU", "engine.threads", share.cpus), ("GPU", "ray.gpus_per_engine", share.gpus)):
            largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
            if each > largest:
                text = f"an engine of {name} takes {each:g} {kind}, and no node has more than {largest:g}"
                raise ConfigError(f"{option}: {text}")
    least = [share for share in shares.values() for _ in range(share.least)]
    if (placed := _placed(least, nodes)) < len(least):
        raise ConfigError(f"engine.replicas: the cluster's nodes have room for {placed} of {len(least)} engines")
    most = [share for share in shares.values() for _ in range(share.most)]
    if (placed := _placed(most, nodes)) < len(most):
        return [f"ray.max_replicas: the cluster's nodes have room for {placed} of {len(most)} engines"]
    return []


def _placed(engines: Sequence[Share], nodes: Sequence[Mapping[str, float]]) -> int:
    """Returns how many engines, each of the size that its share has, find a node with room; large ones first."""
    left = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    placed = 0
    for share in sorted(engines, key=lambda share: (share.gpus, share.cpus), reverse=True):
        room = next((node for node in left if node[0] >= share.cpus and node[1] >= share.gpus), None)
        if room is not None:
            room[0], room[1] = room[0] - share.cpus, room[1] - share.gpus
            placed += 1
    return placed
