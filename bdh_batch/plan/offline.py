"""What can be done with a model's files where no server runs: converting them, and showing what serving takes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bdh_batch.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bdh_batch.checkpoint.config import NOTHING, Given, bytes_per_sequence
from bdh_batch.checkpoint.convert import convert
from bdh_batch.checkpoint.dialects.keys import LATENT
from bdh_batch.checkpoint.int8 import bytes_of_weights
from bdh_batch.errors import CheckpointError
from bdh_batch.system.device_memory import free_memory
from bdh_batch.system.sizes import size_text
from bdh_batch.text.folder import load_tokenizer
from bdh_batch.text.tokenizer import ByteTokenizer, TokenIdsOnly

__all__ = ["Inspection", "convert", "given_by", "inspect"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
STATE_DTYPES = (torch.float32, torch.bfloat16)
KINDS = {"without_window": 0, "with_window": 2}  # any window takes the same
MEMORIES = {"cpu": "fit what is free", "cuda": "fit what the GPU has free", "asked": "fit what was asked about"}
TOKENIZERS = {ByteTokenizer: "bytes", TokenIdsOnly: "none: token ids only"}
LABEL, COLUMN = 30, 16  # characters

Sizes = dict[str, dict[str, int]]  # by dtype, by kind


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of one model; sizes in bytes. `sequences` holds how many states fit each memory, the weights not
    counted."""

    file: str
    kind: str  # of checkpoint
    variant: str  # what distinguishes the model from others of its sizes
    config: Mapping[str, Any]
    layers_told: bool
    parameters: int
    weights_saved: Mapping[str, int]
    weights_served: Mapping[str, int]  # by model.dtype
    attention_window: int  # what serving takes if nothing else is asked for; 0 is none
    tokenizer: str
    state: Sizes  # of one sequence, by engine.state_dtype
    memory: Mapping[str, int]
    sequences: Mapping[str, Sizes]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        served, saved = (
            ", ".join(f"{size_text(size)} in {dtype}" for dtype, size in sizes.items())
            for sizes in (self.weights_served, self.weights_saved)
        )
        facts = {"file": self.file, "kind": self.kind, "variant": self.variant} | {
            name: f"{value}" for name, value in self.config.items()
        }
        if not self.layers_told:
            facts["n_layer"] += " (not in the file: upstream's; --layers sets it)"
        facts |= {
            "window when served": f"{self.attention_window} tokens" if self.attention_window else "none",
            "tokenizer": self.tokenizer,
            "parameters": f"{self.parameters:,}",
            "weights as saved": saved,
            "weights as served": served,
        }
        lines = [f"{name:<{LABEL}}{value}" for name, value in facts.items()]
        return "\n".join([*lines, "", *self._table()])

    def _table(self) -> list[str]:
        heads = [(dtype, kind) for dtype in self.state for kind in KINDS]
        rows = [("", [dtype for dtype, _ in heads]), ("", [kind.replace("_", " ") for _, kind in heads])]
        rows.append(("state of a sequence", [size_text(self.state[dtype][kind]) for dtype, kind in heads]))
        for name, size in self.memory.items():
            fitting = self.sequences[name]
            rows.append(
                (f"{MEMORIES[name]}, {size_text(size)}", [f"{fitting[dtype][kind]:,}" for dtype, kind in heads])
            )
        width = max(LABEL, *(len(label) + 2 for label, _ in rows))
        return [f"{label:<{width}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells) for label, cells in rows]


def given_by(options: Namespace) -> Given:
    """What the flags of a command say about a model that its file may leave open."""
    return Given(**{field.name: getattr(options, field.name) for field in fields(Given)})


def inspect(path: Path, given: Given = NOTHING, memory: int | None = None) -> Inspection:
    """Looks at a model without reading its weights.

    Args:
        given: what the file may leave open.
        memory: bytes that states may take, to count how many fit besides what fits the free memory.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    checkpoint = open_checkpoint(path, given)
    config = checkpoint.config
    parameters = sum(checkpoint.state[key].numel() for key in config.shapes())
    state = {
        short(dtype): {kind: bytes_per_sequence(config, window, dtype) for kind, window in KINDS.items()}
        for dtype in STATE_DTYPES
    }
    sizes = memories(memory)
    return Inspection(
        file=str(checkpoint.file),
        kind=checkpoint.kind,
        variant=checkpoint.variant(),
        config=config.to_dict(),
        layers_told=checkpoint.layers_known,
        parameters=parameters,
        weights_saved=saved_sizes(checkpoint),
        weights_served={short(dtype): bytes_of_weights(config, dtype) for dtype in WEIGHT_DTYPES},
        attention_window=config.suggested_window,
        tokenizer=tokenizer_kind(checkpoint.file.parent, config.vocab_size),
        state=state,
        memory=sizes,
        sequences={
            name: {dtype: {kind: size // each for kind, each in kinds.items()} for dtype, kinds in state.items()}
            for name, size in sizes.items()
        },
    )


def saved_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the weights in the file, by dtype; a tied head counts as the embedding it is."""
    found: Counter[str] = Counter()
    tensors = (checkpoint.state[key] for key in checkpoint.tensor_keys() if key != LATENT)
    for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values():
        found[short(tensor.dtype)] += tensor.nbytes
    return dict(found)


def memories(asked: int | None) -> dict[str, int]:
    """Bytes that are free for states on each device, and those asked about."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = {device: free_memory(torch.device(device)) for device in devices}
    return found | ({} if asked is None else {"asked": asked})


def tokenizer_kind(folder: Path, vocab_size: int) -> str:
    try:
        tokenizer = load_tokenizer(folder, vocab_size)
    except CheckpointError as error:
        return f"cannot be served: {error}"
    return TOKENIZERS.get(type(tokenizer), "tokenizer.json")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
