"""Servers as they are commonly written, to measure ours against; each is one behind our own HTTP layer.

    python -m benchmarks.server.baselines upstream --port 8001 --model models/bdh-shakespeare

upstream        one request after the other, and for every token the whole context from its start, as upstream's
                `generate` does: what a first design is
one-at-a-time   the same with our kernels and a state: it differs from ours in batching nothing, and in nothing else
static          a batch is filled, computed until the longest completion of it is done, and then comes the next
dense           our scheduler, with whole states in torch (`engine.kernels: torch`): without the CPU kernels, which
                compute only what fires

They load the model, read requests and write responses as `bdh-batch serve` does, so that what differs in a measurement
is what differs here. What they cannot do is refused by name."""
