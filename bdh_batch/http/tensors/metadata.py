"""What the server says of itself and of a model in KServe's protocol."""

from __future__ import annotations

from typing import Any

from bdh_batch import __version__
from bdh_batch.http.tensors.outputs import OUTPUTS
from bdh_batch.http.tensors.tensor import BYTES
from bdh_batch.settings import KServe

EXTENSIONS = ("binary_tensor_data", "generate", "parameters")
PLATFORM = "bdh_batch"
# The inputs that most requests have. Any other field of /v1/completions may come as a tensor or a parameter, too.
INPUTS = (
    ("prompt", BYTES, (-1,)),
    ("max_tokens", "INT32", (1,)),
    ("temperature", "FP32", (1,)),
    ("top_p", "FP32", (1,)),
    ("top_k", "INT32", (1,)),
)


def server_metadata() -> dict[str, Any]:
    return {"name": "bdh_batch", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(name: str, settings: KServe) -> dict[str, Any]:
    """Of a model under one of its names."""
    inputs = [{"name": name, "datatype": datatype, "shape": list(shape)} for name, datatype, shape in INPUTS]
    outputs = [{"name": name, "datatype": out.datatype, "shape": list(out.shape)} for name, out in OUTPUTS.items()]
    return {
        "name": name,
        "versions": [settings.model_version],
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": outputs,
    }
