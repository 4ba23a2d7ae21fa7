"""Models that call themselves BDH and are other functions than the kernels compute: refused by what they are."""

from __future__ import annotations

import re
from collections.abc import Collection

from bdh_batch.checkpoint.files import E_DX_DY
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import listed, shown

KINDS = (  # what tells them by a key, and what they are
    (re.compile(r"(.*\.)?mask_encoder(\..*)?"), "a BDH with a learnt mask of its neurons"),
    (re.compile(r"(.*[._])?(forget|decay|fgate|f_gate)([._].*)?"), "a BDH whose state forgets by gates or by decay"),
    (re.compile(r"(.*[._])?(lambda|diff)([._].*)?"), "a BDH with differential attention"),
    (re.compile(r"(.*\.)?to_qk2(\..*)?"), "a bdh-cq with triadic attention"),
    (re.compile(r"(.*\.)?to_qks(\..*)?"), "a bdh-cq with attention of higher order"),
    (re.compile(r"(.*\.)?attn_residual(\..*)?"), "a bdh-cq with attention residuals"),
)


def refuse_unknown(names: Collection[str]) -> None:
    """
    Args:
        names: of the tensors, without what wraps the model.

    Raises:
        CheckpointError: the model is one of those.
    """
    if set(names) >= {"E", "Dx", "Dy"}:
        raise CheckpointError(E_DX_DY)
    for pattern, kind in KINDS:
        if found := sorted(name for name in names if pattern.fullmatch(name)):
            raise CheckpointError(f"is {kind} ({listed(map(shown, found[:3]), ', ')}), which is not computed here")
