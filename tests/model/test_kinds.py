"""Every kind of checkpoint that people have is computed as it is defined, by the reference and the CPU kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bdh_cq import BDH, BDHReasoningWrapper
from torch import Tensor

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.checkpoint.config import NOTHING, Given, rope_frequencies
from bdh_batch.checkpoint.convert import convert
from bdh_batch.kernels.base import Kernels, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels
from tests.kernels.support import alone, in_a_crowd, states_for
from tests.model.dense import Dense, Rope, half, interleaved, still
from tests.model.formats import CPU, save

V, D, H, N, L = 23, 16, 2, 24, 3
TOLERANCE = 1e-4
SIZES = {"n_layer": L, "n_embd": D, "n_head": H, "mlp_internal_dim_multiplier": 3, "vocab_size": V}
CQ_SIZES = {"dim": D, "num_tokens": V, "depth": L, "heads": H, "dim_qk_heads": H * N}
Make = Callable[[Weights], Kernels]
State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are computed in a millisecond by one thread, and in hundred by several on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Numbers:
    """The matrices of a model, by no format's names; `layers` has one set of them, or one for each layer."""

    embed: Tensor
    layers: list[tuple[Tensor, Tensor, Tensor]]
    head: Tensor

    def upstream(self) -> State:
        (encoder, encoder_v, decoder), *_ = self.layers
        matrices = {"encoder": encoder, "encoder_v": encoder_v, "decoder": decoder}
        return {"embed.weight": self.embed, **matrices, "lm_head": self.head}

    def by_layer(self) -> State:
        names = ("encoder", "encoder_v", "decoder")
        matrices = {f"{name}.{i}": each[n] for i, each in enumerate(self.layers) for n, name in enumerate(names)}
        return {"embed.weight": self.embed, **matrices, "lm_head": self.head}

    def paper(self) -> State:
        (decoder_x, decoder_y, encoder), *_ = self.layers
        matrices = {"decoder_x": decoder_x, "decoder_y": decoder_y, "encoder": encoder}
        return {"wte.weight": self.embed, **matrices, "readout": self.head}

    def cq(self, radians: Tensor | None) -> State:
        (encoder, encoder_v, decoder), *_ = self.layers
        return {
            "token_embed.weight": self.embed,
            **({} if radians is None else {"rope.freqs": radians}),
            "block.to_qk.weight": encoder.transpose(1, 2).reshape(-1, D).contiguous(),
            "block.proj_up": encoder_v,
            "block.proj_out.weight": decoder.T.contiguous(),
            "to_logits.weight": self.head.T.contiguous(),
        }

    def dense(self, rope: Rope, final_norm: bool = False) -> Dense:
        layers = self.layers if len(self.layers) == L else self.layers * L
        return Dense(self.embed, layers, self.head, rope, final_norm)


@cache
def numbers(sets: int = 1, neurons: int = N, heads: int = H) -> Numbers:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    layers = [(random(heads, D, neurons), random(heads, D, neurons), random(heads * neurons, D)) for _ in range(sets)]
    return Numbers(random(V, D), layers, random(D, V))


def paper_layer(layer: int) -> State:
    return dict(zip(("decoder_x", "decoder_y", "encoder"), numbers(L).layers[layer]))


def narrow() -> Numbers:
    """Numbers that 16 bits hold."""
    (layer,) = numbers().layers
    encoder, encoder_v, decoder = (tensor.half().float() for tensor in layer)
    return Numbers(numbers().embed.half().float(), [(encoder, encoder_v, decoder)], numbers().head.half().float())


def with_config(folder: Path, values: dict[str, Any], saved: object) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return save(folder, saved)


def turns(theta: float = 2.0**16, turning: int = N, neurons: int = N) -> Tensor:
    return rope_frequencies(neurons, theta, turning).view(1, 1, 1, -1)


def radians(turning: int, theta: float = 10_000.0) -> Tensor:
    return torch.tensor([theta ** (-2 * i / turning) for i in range(turning // 2)])


def npz(folder: Path, arrays: dict[str, Any], packed: bool = False, config: dict[str, Any] | None = None) -> Path:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (np.savez_compressed if packed else np.savez)(folder / "weights.npz", **arrays)
    return folder / "weights.npz"


def mlx_arrays() -> dict[str, Any]:
    state = numbers().upstream() | {"attn.freqs": turns()}
    renamed = {"embed.weight": "embed_weight", "attn.freqs": "attn_freqs"}
    arrays = {renamed.get(key, key): tensor.numpy() for key, tensor in state.items()}
    return arrays | {"step": np.array(700), "loss": np.array(1.25)}


@dataclass(frozen=True)
class Case:
    """A file of one kind, what the settings say besides, and what it should compute."""

    write: Callable[[Path], Path]
    dense: Dense
    given: Given = NOTHING
    kind: str = "upstream"


UPSTREAM, CQ_ROPE = interleaved(2.0**16, N), interleaved(10_000.0, 8)
SAYS_NOTHING = {
    **{"per_layer_weights": False, "attn_window": None, "latent_token_id": None, "forget_mode": "none", "u_decay": 1.0},
    **{"rope_theta": 65536, "n_neurons": H * N, "max_seq_len": 512, "tokenizer_type": "bpe", "unk_token_id": 3},
    **{"tokenizer_vocab_size": 20, "tokenizer_path": "tokenizer/tokenizer.json"},
}
CASES = {
    "upstream": Case(
        lambda to: save(
            to, {f"_orig_mod.module.{k}": t for k, t in (numbers().upstream() | {"freqs": turns()}).items()}
        ),
        numbers().dense(UPSTREAM),
        Given(layers=L),
    ),
    "inside a model called core": Case(
        lambda to: save(
            to,
            {
                "model_state": {f"core.{key}": tensor for key, tensor in numbers().upstream().items()},
                "config": SIZES | SAYS_NOTHING,
            },
        ),
        numbers().dense(UPSTREAM),
    ),
    "frequencies of 16 bits": Case(
        lambda to: with_config(to, SIZES, numbers().upstream() | {"attn.freqs": turns().half()}),
        numbers().dense(UPSTREAM),
    ),
    "weights for each layer": Case(
        lambda to: with_config(
            to, SIZES | {"per_layer_weights": True}, {"model": numbers(L).by_layer() | {"attn.freqs": turns()}}
        ),
        numbers(L).dense(UPSTREAM),
    ),
    "norm at the end, by the settings": Case(
        lambda to: with_config(to, SIZES, numbers().upstream() | {"attn.freqs": turns()}),
        numbers().dense(UPSTREAM, final_norm=True),
        Given(norm="final"),
    ),
    "half layout in part of a head": Case(
        lambda to: with_config(
            to, SIZES | {"rope_layout": "half", "rope_theta": 500, "rotary_dim": 10}, numbers().upstream()
        ),
        numbers().dense(half(500.0, 10)),
    ),
    "everything at once": Case(
        lambda to: with_config(
            to,
            SIZES | {"rope_layout": "half", "rotary_dim": 10, "per_layer_weights": True, "norm": "final"},
            {"state_dict": {f"model.bdh.{key}": tensor for key, tensor in numbers(L).by_layer().items()}},
        ),
        numbers(L).dense(half(10_000.0, 10), final_norm=True),
    ),
    "neurons by floor division": Case(
        lambda to: with_config(
            to,
            SIZES | {"mlp_internal_dim_multiplier": 5, "n_head": 3},  # 80 // 3
            numbers(1, 26, 3).upstream() | {"attn.freqs": turns(neurons=26, turning=26)},
        ),
        numbers(1, 26, 3).dense(interleaved(2.0**16, 26)),
    ),
    "MLX": Case(lambda to: npz(to, mlx_arrays()), numbers().dense(UPSTREAM), Given(layers=L), "MLX trainer"),
    "MLX, compressed, in a folder with a config": Case(
        lambda to: npz(to, mlx_arrays(), packed=True, config=SIZES).parent,
        numbers().dense(UPSTREAM),
        kind="MLX trainer",
    ),
    "the paper's names, halves and a norm in every layer": Case(
        lambda to: with_config(to, {"L": L, "D": D, "H": H, "N": H * N, "vocab_size": V}, numbers().paper()),
        numbers().dense(half(10_000.0, N)),
        Given(norm="every_layer", rope_layout="half"),
        "the paper's listing",
    ),
    "the paper's names, upstream's RoPE and a norm at the end": Case(
        lambda to: with_config(to, {"L": L, "D": D, "H": H, "N": H * N, "vocab_size": V}, numbers().paper()),
        numbers().dense(UPSTREAM, final_norm=True),
        Given(norm="final", rope_layout="interleaved", rope_theta=65536.0),
        "the paper's listing",
    ),
    "the paper's names, by the config": Case(
        lambda to: with_config(
            to,
            SIZES | {"norm": "final", "rope_layout": "half", "rope_theta": 300.0, "n_neurons": N},
            {"model_state_dict": {f"module.{key}": tensor for key, tensor in numbers().paper().items()}},
        ),
        numbers().dense(half(300.0, N), final_norm=True),
        kind="the paper's listing",
    ),
    "the paper's names, frequencies in radians": Case(
        lambda to: save(to, numbers().paper() | {"attn.rope.inv_freq": radians(N, 700.0)}),
        numbers().dense(half(700.0, N)),
        Given(L, "every_layer", "half"),
        "the paper's listing",
    ),
    "the paper's names, weights for each layer": Case(
        lambda to: save(
            to,
            {f"layers.{i}.{key}": tensor for i in range(L) for key, tensor in paper_layer(i).items()}
            | {key: numbers().paper()[key] for key in ("wte.weight", "readout")},
        ),
        replace(numbers(L).dense(UPSTREAM), embed=numbers().embed, head=numbers().head),
        Given(None, "every_layer", "interleaved"),
        "the paper's listing",
    ),
    "bdh-cq": Case(
        lambda to: with_config(to, CQ_SIZES | {"rotary_dim": 8}, numbers().cq(radians(8))),
        numbers().dense(CQ_ROPE, final_norm=True),
        kind="bdh-cq",
    ),
    "bdh-cq in its wrapper, depth by the settings": Case(
        lambda to: save(
            to,
            {f"bdh.{key}": tensor for key, tensor in numbers().cq(radians(8)).items()}
            | {"latent_step_embed": torch.arange(float(D))},
        ),
        numbers().dense(CQ_ROPE, final_norm=True),
        Given(layers=L),
        "bdh-cq",
    ),
    "bdh-cq in 16 bits": Case(
        lambda to: with_config(to, CQ_SIZES, {k: t.half() for k, t in narrow().cq(radians(8)).items()}),
        narrow().dense(CQ_ROPE, final_norm=True),
        kind="bdh-cq",
    ),
    "bdh-cq without positions": Case(
        lambda to: with_config(to, CQ_SIZES | {"rotary_dim": 0, "triadic": False}, numbers().cq(None)),
        numbers().dense(still, final_norm=True),
        kind="bdh-cq",
    ),
    "bdh-cq with frequencies of its own": Case(
        lambda to: save(to, {"model": numbers().cq(radians(6, 77.0)), "config": CQ_SIZES}),
        numbers().dense(interleaved(77.0, 6), final_norm=True),
        kind="bdh-cq",
    ),
    "bdh-cq with an odd number of neurons": Case(
        lambda to: with_config(to, CQ_SIZES | {"dim_qk_heads": H * 13}, numbers(1, 13).cq(radians(8))),
        numbers(1, 13).dense(CQ_ROPE, final_norm=True),
        kind="bdh-cq",
    ),
}


@pytest.mark.parametrize("make", [TorchKernels, CpuKernels])
@pytest.mark.parametrize("name", CASES)
class TestEveryKind:
    def tokens(self, length: int = 60) -> Tensor:
        return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(1))

    def test_whole_token_by_token_and_in_ragged_pieces_also_when_converted(
        self, name: str, make: Make, tmp_path: Path
    ) -> None:
        case, tokens = CASES[name], self.tokens()
        right = case.dense.logits(tokens)
        path = case.write(tmp_path)
        convert(path, tmp_path / "native", case.given)
        for each, given in ((path, case.given), (tmp_path / "native", NOTHING)):
            model = load_model(each, torch.float32, CPU, given)
            assert model.kind == (case.kind if each == path else "upstream")
            kernels, states = make(model.weights), states_for(model.weights, 6)
            close(alone(kernels, states, tokens, 0, []), right)
            close(alone(kernels, states, tokens, 1, range(1, len(tokens))), right)
            rows = dict.fromkeys((2, 3, 5), tokens)
            for logits in in_a_crowd(kernels, states, rows, np.random.default_rng(0), longest=20).values():
                close(logits, right)


def close(logits: Tensor, right: Tensor) -> None:
    assert float((logits.double() - right).abs().max()) <= TOLERANCE


class TestCq:
    """Against the package's own model."""

    LENGTH = 300

    @pytest.mark.parametrize("rotary", [0, 4, 12])
    @pytest.mark.parametrize("make", [TorchKernels, CpuKernels])
    def test_logits_are_the_packages(self, make: Make, rotary: int, tmp_path: Path) -> None:
        torch.manual_seed(rotary)
        theirs = BDH(dim=D, num_tokens=V, depth=L, heads=H, dim_qk_heads=H * N, rotary_dim=rotary)
        path = with_config(tmp_path, CQ_SIZES | {"rotary_dim": rotary}, theirs.state_dict())
        weights = load_model(path, torch.float32, CPU).weights
        tokens = torch.randint(0, V, (self.LENGTH,))
        with torch.no_grad():
            right = theirs(tokens[None])[0].double()
        close(alone(make(weights), states_for(weights, 1), tokens, 0, [7, 8, 200]), right)

    @pytest.mark.parametrize("embedded", [True, False])
    def test_its_wrapper_has_latent_steps(self, embedded: bool, tmp_path: Path) -> None:
        theirs = BDHReasoningWrapper(
            BDH(dim=D, num_tokens=V, depth=L, heads=H, dim_qk_heads=H * N, rotary_dim=4), latent_step_embed=embedded
        )
        if embedded:
            torch.nn.init.normal_(theirs.latent_step_embed)
        path = with_config(tmp_path, CQ_SIZES | {"latent_step_embed": embedded}, {"model": theirs.state_dict()})
        convert(path, tmp_path / "native")
        for each in (path, tmp_path / "native"):
            model = load_model(each, torch.bfloat16, CPU)
            assert model.config.latent_steps
            assert model.weights.final_norm
            latent = model.weights.latent_embed
            assert (latent is not None) == embedded
            assert latent is None or torch.equal(latent, theirs.latent_step_embed)
