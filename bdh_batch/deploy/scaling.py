"""How many engines a load needs: the policy of Ray's autoscaler, which bounds it, and delays what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

OUTSTANDING, CAPACITY = "outstanding", "capacity"  # what engines report: sequences, and how many are no overload


def engines_for(outstanding: Iterable[float], capacities: Iterable[float]) -> int:
    """Returns how many engines compute a load without being overloaded.

    Args:
        outstanding: sequences that run and wait, of each engine.
        capacities: how many each of them should have at most.
    """
    known = [*capacities]
    return math.ceil(sum(outstanding) * len(known) / sum(known)) if known else 0


def desired_engines(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Returns how many engines a deployment should have, and the policy's state, which it does not need."""
    reported = context.aggregated_metrics or {}
    outstanding, capacities = reported.get(OUTSTANDING, {}), reported.get(CAPACITY, {})
    if not outstanding or not capacities:
        return context.target_num_replicas, {}  # they are starting: nothing is known yet
    return engines_for(outstanding.values(), capacities.values()), {}
