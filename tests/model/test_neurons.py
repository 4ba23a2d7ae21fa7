"""The neurons that a step shows: the strongest of each layer, by the checkpoint's own numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.engine.neurons import WATCHED_BYTES, NeuronView, most_watched
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.engine.strongest import Found, on_device, on_host
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Neurons, Plan, Segment

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
TOKENS = [*b"half of the neurons turn"]


def listed(neurons: Neurons, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the strongest, [layers, top], and their values."""
    return (
        np.frombuffer(neurons.strongest, np.uint32).reshape(layers, -1),
        np.frombuffer(neurons.values, np.float32).reshape(layers, -1),
    )


def test_the_strongest_of_each_layer_are_found_for_each_segment() -> None:
    layers, heads, per_head = 3, 2, 8
    view = NeuronView(layers, heads, per_head, CPU, None)
    segments = [
        Segment(0, 0, [5, 6, 7], None, watch=4, watch_from=1),
        Segment(1, 9, [8], None),
        Segment(2, 4, [9], None, watch=2),
        Segment(3, 0, [4, 4], None, watch=1000),
    ]
    fired = view.memory(5)
    fired[:] = torch.randn(fired.shape, generator=torch.manual_seed(3)).relu()
    found = view.shown(segments, fired)
    assert {at: [each.token for each in some] for at, some in found.items()} == {0: [6, 7], 2: [9], 3: [4, 4]}
    for row, neurons in enumerate([each for some in found.values() for each in some]):
        numbers, values = listed(neurons, layers)
        flat = fired[:, row].flatten(1)
        assert values.shape[1] == (4, 4, 2, 16, 16)[row]
        assert np.allclose(np.frombuffer(neurons.active, np.float32), (flat > 0).float().mean(1))
        for layer in range(layers):
            assert values[layer].tolist() == flat[layer].sort(descending=True).values[: values.shape[1]].tolist()
            assert values[layer].tolist() == flat[layer][numbers[layer].astype(int)].tolist()
            assert len(set(numbers[layer])) == values.shape[1]


@pytest.mark.parametrize("find", [on_host, on_device])
def test_the_strongest_have_the_numbers_of_their_order(find: Callable[..., Found]) -> None:
    order = torch.tensor([3, 1, 0, 2])
    fired = torch.tensor([[[[0.0, 5.0, 0.0, 2.0], [7.0, 0.5, 6.0, 1.0]]]])
    active, numbers, values = find(fired, 3, order)
    assert active.tolist() == [[0.75]]
    assert numbers.tolist() == [[[7, 4, 1]]]
    assert values.tolist() == [[[7.0, 6.0, 5.0]]]


def test_of_equal_neurons_the_first_are_shown_and_what_is_no_number_is_not() -> None:
    fired = torch.tensor([torch.nan, 1.0, 2.0, 1.0, 2.0, 1.0, torch.nan, 0.0]).view(1, 1, 2, 4)
    active, numbers, values = on_host(fired, 4, None)
    assert (active.tolist(), numbers.tolist(), values.tolist()) == ([[0.625]], [[[2, 4, 1, 3]]], [[[2, 2, 1, 1]]])
    _, numbers, values = on_host(torch.full((1, 1, 1, 4), torch.nan), 2, None)
    assert values.tolist() == [[[0, 0]]]


def test_memory_is_used_again_and_bounded() -> None:
    view = NeuronView(2, 4, 8, CPU, None)
    larger = view.memory(9)
    assert view.memory(3).data_ptr() == larger.data_ptr()
    assert view.memory(3).is_contiguous()
    assert most_watched(6, 4, 8192) * 6 * 4 * 8192 * 4 <= WATCHED_BYTES
    assert most_watched(6, 4, 8192) == 21
    assert most_watched(100, 32, 2**20) == 2


@pytest.fixture
def half(tmp_path: Path) -> Model:
    """A model whose kernels number neurons in another order than its checkpoint."""
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_layout": "half"}))
    stored = load_file(TINY / "model.safetensors")
    save_file({name: each for name, each in stored.items() if "freqs" not in name}, tmp_path / "model.safetensors")
    return load_model(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("kernels", [CpuKernels, TorchKernels])
def test_neurons_have_the_numbers_of_the_checkpoint(half: Model, kernels: type[CpuKernels | TorchKernels]) -> None:
    """In the first layer they follow from the embedding alone, which a file's own matrices give."""
    assert half.neuron_order is not None
    runner = Runner(kernels(half.weights), StatePool(half.config, 1, CPU), neuron_order=half.neuron_order)
    plan = Plan([Segment(0, 0, TOKENS, None, watch=6)], watches=True)
    outcome = runner.run(plan)
    stored = load_file(TINY / "model.safetensors")
    embedded = torch.nn.functional.layer_norm(stored["embed.weight"][TOKENS], (half.config.n_embd,))
    fired = (embedded @ stored["encoder"]).relu().transpose(0, 1).flatten(1)  # [T, h * N]
    for neurons, own in zip(outcome.neurons[0], fired, strict=True):
        numbers, values = listed(neurons, half.config.n_layer)
        assert values[0] == pytest.approx(own[numbers[0].astype(int)].numpy(), abs=1e-5)
        assert values[0] == pytest.approx(own.topk(6).values.numpy(), abs=1e-5)
        assert neurons.per_head == half.config.neurons_per_head
