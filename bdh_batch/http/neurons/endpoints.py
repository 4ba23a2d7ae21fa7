"""The rows of /v1/neurons in the table of endpoints."""

from __future__ import annotations

from bdh_batch.http.docs.endpoint import MODEL, Endpoint
from bdh_batch.http.neurons.objects import NeuronContexts, NeuronMap

ROOT = "/v1/neurons"


def neurons() -> list[Endpoint]:
    return [
        Endpoint(
            *("getNeurons", "neurons.show", "Models", ROOT, "The layers, heads and neurons of a model", NeuronMap),
            query=("model",),
            errors=MODEL,
            replies={
                "model": {
                    "model": "bdh-shakespeare",
                    "layers": 6,
                    "heads": 4,
                    "neurons_per_head": 1024,
                    "max_neurons": 2**20,
                    "study": None,
                }
            },
        ),
        Endpoint(
            *("getNeuronContexts", "neurons.contexts", "Models", f"{ROOT}/contexts"),
            *("Where in a text a neuron fires most", NeuronContexts),
            description="Of the text that `bdh-batch model neurons` had the model read; 404 where it has not.",
            query=("model", "layer", "head", "neuron"),
            errors=MODEL,
            replies={
                "neuron": {
                    "layer": 0,
                    "head": 1,
                    "neuron": 85,
                    "active": 0.12,
                    "contexts": [
                        {"position": 9, "byte": 9, "value": 3.25, "before": "To be, or", "token": " ", "after": "not"}
                    ],
                }
            },
        ),
    ]
