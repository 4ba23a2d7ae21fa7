"""What the Python API does besides: lists bit by bit, streams, states, interruptions, twins, errors."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bdh_batch
from bdh_batch import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from bdh_batch.errors import CheckpointError, ConfigError, InvalidRequest, Unavailable
from bdh_batch.http.errors import NotFound
from tests.conftest import clean_environment, eventually
from tests.support import ending_in

LONG = SamplingParams(max_tokens=100_000, ignore_eos=True)
BRIEF = SamplingParams(max_tokens=4, seed=1)


def under_way(llm: LLM) -> int:
    """Requests that the engine has."""
    requests = llm._async._requests
    assert requests is not None
    return requests.host.served.backend.load()


def test_defaults_are_those_of_vllm() -> None:
    assert asdict(SamplingParams()) == {
        **{"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "max_tokens": 16},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
        **{"stop": None, "stop_token_ids": None, "ignore_eos": False, "include_stop_str_in_output": False},
        **{"logprobs": None, "prompt_logprobs": None, "skip_special_tokens": True, "bad_words": None},
        **{"structured_outputs": None, "logit_bias": None, "allowed_token_ids": None},
        **{"truncate_prompt_tokens": None},
        # Not vLLM's:
        **{"cache_salt": None, "latent_steps": None, "update_latent_memory": None, "reasoning_effort": None},
    }


def test_the_package_alone_imports_next_to_nothing() -> None:
    look = "import sys, bdh_batch; print(*{'torch', 'numpy', 'pydantic', 'asyncio'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", look], env=clean_environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")
    assert {"LLM", "AsyncLLM", "SamplingParams"} <= {*dir(bdh_batch)}
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = bdh_batch.LLMs  # type: ignore[attr-defined]


def test_prompts_are_texts_token_ids_or_mappings(llm: LLM) -> None:
    given: list[Any] = ["ab", [97, 98], (97, 98), {"prompt": "ab"}, {"prompt_token_ids": [97, 98]}]
    several = llm.generate(given, BRIEF, use_tqdm=False)
    assert [each.prompt for each in several] == ["ab", None, None, "ab", None]
    assert len({(*each.prompt_token_ids, *each.outputs[0].token_ids) for each in several}) == 1
    for one in given:
        assert [each.outputs for each in llm.generate(one, BRIEF)] == [several[0].outputs]
    assert llm.generate([], BRIEF) == []
    first, _ = llm.generate((text for text in ("ab", "c")), BRIEF, use_tqdm=False)
    assert first.outputs == several[0].outputs


def test_a_generator_of_prompts_may_use_the_model_itself(llm: LLM) -> None:
    given = (text for text in ["a", "bcd", "ef"] if len(llm.tokenize(text)) > 1)
    assert [output.prompt for output in llm.generate(given, BRIEF, use_tqdm=False)] == ["bcd", "ef"]
    turns = ({"role": "user", "content": llm.detokenize([token])} for token in (97, 98))
    assert "".join(piece.text for piece in llm.stream(turns, BRIEF))


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    lengths = [3, 1, 2]
    params = [SamplingParams(max_tokens=length) for length in lengths]
    outputs = llm.generate(["a"] * 3, params, use_tqdm=False, priority=[1, 0, -1])
    assert [len(each.outputs[0].token_ids) for each in outputs] == lengths


def test_what_is_not_given_is_as_the_models_folder_says(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 3}')
    own = AsyncLLM(tmp_path, generation={"top_k": 5}).get_default_sampling_params()
    assert own == SamplingParams(temperature=0.0, max_tokens=3, top_k=5)
    assert AsyncLLM(folder).get_default_sampling_params() == SamplingParams()


def test_why_a_completion_ended(llm: LLM) -> None:
    free = SamplingParams(max_tokens=200, temperature=0, logit_bias={})
    first, second = llm.generate("x", SamplingParams(max_tokens=2, temperature=0))[0].outputs[0].token_ids
    [output] = llm.generate("x", SamplingParams(max_tokens=2, temperature=0, stop_token_ids=[second]))[0].outputs
    assert (output.finish_reason, output.stop_reason, output.token_ids) == ("stop", second, [first, second])
    [output] = llm.generate("x", SamplingParams(max_tokens=20, logit_bias={65: 100}, stop=["B", "AAA"]))[0].outputs
    assert (output.finish_reason, output.stop_reason, output.text) == ("stop", "AAA", "")
    [output] = llm.generate("x", free)[0].outputs
    assert (output.finish_reason, output.stop_reason, output.finished()) == ("length", None, True)


def test_a_stream_is_the_completion_in_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, n=2, seed=4, logprobs=1)
    [whole] = llm.generate("To be", params)
    pieces = [*llm.stream("To be", params)]
    for index, output in enumerate(whole.outputs):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == output.text
        assert [token for piece in mine for token in piece.token_ids] == output.token_ids
        assert [entry for piece in mine for entry in piece.logprobs or ()] == output.logprobs
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + ["length"]
    messages = [{"role": "user", "content": "Who?"}]
    said = "".join(piece.text for piece in llm.stream(messages, BRIEF))
    assert said == llm.chat(messages, BRIEF)[0].outputs[0].text


def test_a_stream_that_is_closed_or_forgotten_ends(llm: LLM) -> None:
    with llm.stream("x", LONG) as pieces:
        assert len(next(pieces).token_ids) >= 1
    eventually(lambda: under_way(llm) == 0)
    with pytest.raises(StopIteration):
        next(pieces)
    next(llm.stream("x", LONG))
    eventually(lambda: under_way(llm) == 0)


def test_an_interruption_ends_what_runs_and_nothing_else(llm: LLM) -> None:
    def interrupt() -> None:
        eventually(lambda: under_way(llm) > 1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["x"] * 40, LONG, use_tqdm=False)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert under_way(llm) == 0
    assert llm.generate("x", BRIEF)[0].finished


def test_several_threads_may_use_it(llm: LLM) -> None:
    alone = llm.generate("x", BRIEF)[0].outputs
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(llm.generate("x", BRIEF)[0].outputs)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 8


def test_long_lists_have_a_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["x"] * 5, BRIEF)
    assert "Processed prompts: 100%" in capsys.readouterr().err
    llm.generate(["x"] * 5, BRIEF, use_tqdm=False)
    llm.generate("x", BRIEF)
    assert capsys.readouterr().err == ""
    from tqdm import tqdm

    mine = StringIO()
    llm.embed(["x"] * 3, use_tqdm=lambda **given: tqdm(**given, file=mine))
    assert "3/3" in mine.getvalue()


def test_states_are_begun_in_forked_and_carried_in_files(llm: LLM, tmp_path: Path) -> None:
    whole = llm.generate("To be, or not to be", BRIEF)[0]
    state = llm.save_state("To be, or", metadata={"act": "3"}, ttl=60)
    assert (state.tokens, state.metadata, state.expires_at - state.created_at) == (9, {"act": "3"}, 60)
    llm.export_state(state, tmp_path / "state.safetensors")
    fork = llm.fork_state(state, metadata={"act": "4"})
    loaded = llm.import_state(tmp_path / "state.safetensors")
    assert {state.id, fork.id, loaded.id} <= {each.id for each in llm.list_states()}
    for begin in (state, state.id, fork, loaded):
        [after] = llm.generate(" not to be", BRIEF, state=begin)
        assert (after.outputs, after.num_cached_tokens) == (whole.outputs, 9)
        assert after.prompt_token_ids == whole.prompt_token_ids
    several = llm.generate([" not to be", "To be, or not to be"], BRIEF, state=[fork, None], use_tqdm=False)
    assert [each.outputs for each in several] == [whole.outputs] * 2
    for each in (state, fork, loaded.id):
        llm.delete_state(each)
    with pytest.raises(NotFound) as missing:
        llm.generate("x", state=state)
    assert missing.value.param == "state"


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_a_file_with_a_number_that_is_not_finite_is_refused(llm: LLM, tmp_path: Path, number: float) -> None:
    path, before = tmp_path / "state.safetensors", llm.list_states()
    state = llm.save_state("To be, or")
    llm.export_state(state, path)
    llm.delete_state(state)
    path.write_bytes(ending_in(path.read_bytes(), number))
    with pytest.raises(InvalidRequest, match="finite") as refused:
        llm.import_state(path)
    assert refused.value.param == "path"
    assert llm.list_states() == before


def test_a_state_after_what_was_generated(llm: LLM) -> None:
    [output] = llm.generate("To be", BRIEF)
    [on] = llm.generate("!", BRIEF, state=llm.save_state(output))
    [same] = llm.generate([[*output.prompt_token_ids, *output.outputs[0].token_ids, 33]], BRIEF)
    assert on.outputs == same.outputs
    pieces = [*llm.stream("!", BRIEF, state=llm.save_state(output))]
    assert [token for piece in pieces for token in piece.token_ids] == on.outputs[0].token_ids


def test_text_to_tokens_and_back(llm: LLM) -> None:
    assert llm.tokenize("a€") == [*"a€".encode()]
    assert llm.detokenize([*"a€".encode()]) == "a€"
    assert llm.get_tokenizer().token_bytes(65) == b"A"


# Most of it would not pass a type checker either.
BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no prompt": (lambda llm: llm.generate(""), "prompts"),
    "a number": (lambda llm: llm.generate(5), "prompts"),
    "bytes": (lambda llm: llm.generate(b"ab"), "prompts"),
    "an empty one of many": (lambda llm: llm.generate(["a", ""]), "prompts[1]"),
    "no token": (lambda llm: llm.generate(["a", [256]]), "prompts[1]"),
    "a token that is true": (lambda llm: llm.generate(["a", [True]]), "prompts[1]"),
    "half a character": (lambda llm: llm.generate(["a", "\ud800"]), "prompts[1]"),
    "an unknown member": (lambda llm: llm.generate({"prompt": "a", "b": 1}), "prompts"),
    "a prompt that is tokens": (
        lambda llm: llm.generate([{"prompt_token_ids": "a"}, {"prompt": 5}]),
        "prompts[1].prompt",
    ),
    "no parameters": (lambda llm: llm.generate("a", {"n": 1}), "sampling_params"),
    "too few": (lambda llm: llm.generate(["a", "b"], [BRIEF]), "sampling_params"),
    "one that is none": (lambda llm: llm.generate(["a"], [5]), "sampling_params[0]"),
    "below 0": (lambda llm: llm.generate("a", SamplingParams(temperature=-1)), "temperature"),
    "one of many": (lambda llm: llm.generate(["a"] * 2, [BRIEF, SamplingParams(top_p=2)]), "sampling_params[1].top_p"),
    "no number": (lambda llm: llm.generate("a", SamplingParams(temperature=float("nan"))), "temperature"),
    "a huge seed": (lambda llm: llm.generate("a", SamplingParams(seed=2**70)), "seed"),
    "latent steps": (lambda llm: llm.generate("a", SamplingParams(latent_steps=2)), "latent_steps"),
    "an effort": (lambda llm: llm.generate("a", SamplingParams(reasoning_effort="high")), "reasoning_effort"),
    "n": (lambda llm: llm.generate("a", SamplingParams(n=0)), "n"),
    "a bias": (lambda llm: llm.generate("a", SamplingParams(logit_bias={300: 1})), "logit_bias.300"),
    "an endless bias": (lambda llm: llm.generate("a", SamplingParams(logit_bias={3: float("inf")})), "logit_bias.3"),
    "two outputs": (
        lambda llm: llm.generate("a", SamplingParams(structured_outputs=StructuredOutputsParams(regex="a", json={}))),
        "structured_outputs",
    ),
    "an unknown output": (
        lambda llm: llm.generate("a", SamplingParams(structured_outputs={"xml": ""})),
        "structured_outputs.xml",
    ),
    "a bad regex": (
        lambda llm: llm.generate("a", SamplingParams(structured_outputs={"regex": "("})),
        "structured_outputs.regex",
    ),
    "a priority": (lambda llm: llm.generate("a", priority="x"), "priority"),
    "a bar": (lambda llm: llm.generate(["a", "b"], use_tqdm="x"), "use_tqdm"),
    "no state": (lambda llm: llm.generate("a", state=5), "state"),
    "no messages": (lambda llm: llm.chat([]), "messages"),
    "a text": (lambda llm: llm.chat("hi"), "messages"),
    "no content": (lambda llm: llm.chat([{"role": "user"}]), "messages[0].content"),
    "in the second": (
        lambda llm: llm.chat([[{"role": "user", "content": "a"}], [{"role": 5}]]),
        "messages[1][0].role",
    ),
    "a stream's prompt": (lambda llm: llm.stream(""), "prompt"),
    "a stream's logprobs": (lambda llm: llm.stream("a", SamplingParams(prompt_logprobs=1)), "prompt_logprobs"),
    "dimensions": (lambda llm: llm.embed("a", dimensions=33), "dimensions"),
    "nothing to embed": (lambda llm: llm.embed(["a", ""]), "prompts[1]"),
    "no continuation": (lambda llm: llm.score(["a", "b"], ["c", ""]), "continuations[1]"),
    "different lengths": (lambda llm: llm.score(["a", "b", "c"], ["d", "e"]), "continuations"),
    "three": (lambda llm: llm.score([("a", "b", "c")]), "prompts[0]"),
    "no text to score": (lambda llm: llm.score(5), "prompts"),
    "no neurons": (lambda llm: llm.neurons("a", 0), "top"),
    "too many neurons": (lambda llm: llm.neurons("a", 129), "top"),
    "neurons that are true": (lambda llm: llm.neurons("a", True), "top"),
    "no number of neurons": (lambda llm: llm.neurons("a", "16"), "top"),
    "neurons of nothing": (lambda llm: llm.neurons(["a", ""]), "prompts[1]"),
    "nothing to save": (lambda llm: llm.save_state(""), "of"),
    "metadata": (lambda llm: llm.save_state("a", metadata={"a": 1}), "metadata.a"),
    "a ttl": (lambda llm: llm.save_state("a", ttl=-1), "ttl"),
    "a ttl that is no number": (lambda llm: llm.save_state("a", ttl=float("nan")), "ttl"),
    "a long ttl": (lambda llm: llm.save_state("a", ttl=1e9), "ttl"),
    "a file": (lambda llm: llm.import_state(__file__), "path"),
    "no text": (lambda llm: llm.tokenize(5), "text"),
    "half a character to tokenize": (lambda llm: llm.tokenize("\ud800"), "text"),
    "no tokens": (lambda llm: llm.detokenize("a"), "tokens"),
    "a token too large": (lambda llm: llm.detokenize([256]), "tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_its_name(llm: LLM, case: str) -> None:
    call, param = BAD[case]
    with pytest.raises(InvalidRequest) as refused:
        call(llm)
    assert refused.value.param == param
    assert under_way(llm) == 0


def test_what_cannot_be_loaded(tmp_path: Path, folder: Path) -> None:
    given: list[tuple[dict[str, Any], str]] = [
        ({"device": "tpu"}, "model.device"),
        ({"engine": {"threads": 0}}, "engine.threads"),
        ({"engine": {"tread": 1}}, "engine.threads"),
        ({"engine": {"replicas": 2}}, "engine.replicas"),
        ({"engine": 5}, "engine"),
        ({"server": {"port": 1}}, "server"),
        ({"max_modl_len": 5}, "max_model_len"),
        ({"path": "x"}, "model.path"),
        ({"config": tmp_path / "none.yaml"}, "none.yaml"),
    ]
    for settings, named in given:
        with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
            LLM(folder, **settings)
    with pytest.raises((ConfigError, CheckpointError), match="nowhere"):
        LLM(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        LLM(tmp_path)


def test_arguments_are_options(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("server: {port: 9}\nengine: {threads: 1}\nauth: {enabled: true}")
    config, path = tmp_path / "server.yaml", tmp_path / "jinja"
    llm = AsyncLLM(folder, config=config, max_num_seqs=3, max_model_len=99, enable_prefix_caching=False, name="it")
    chosen = llm._model.settings
    assert (chosen.scheduler.max_running, chosen.prefix_cache.enabled, chosen.engine.threads) == (3, False, 1)
    assert (llm.max_model_len, llm.model_name, chosen.auth.enabled) == (99, "it", False)
    assert AsyncLLM(folder, chat_template=path)._model.settings.chat.template == path


def test_both_twins_have_the_same_verbs() -> None:
    verbs = {name for name in dir(LLM) if not name.startswith("_")}
    assert verbs == {name for name in dir(AsyncLLM) if not name.startswith("_")} - {"start", "open_stream", "pieces"}
    for name in verbs:
        if callable(getattr(LLM, name)):
            mine, theirs = inspect.signature(getattr(LLM, name)), inspect.signature(getattr(AsyncLLM, name))
            assert [*mine.parameters.values()] == [*theirs.parameters.values()], name
            assert getattr(LLM, name).__doc__


async def test_the_asynchronous_twin(folder: Path, llm: LLM) -> None:
    expected = await asyncio.to_thread(llm.generate, ["a", "b"], BRIEF, use_tqdm=False)
    async with AsyncLLM(folder) as other:
        both = await asyncio.gather(other.generate("a", BRIEF), other.generate("b", BRIEF))
        assert [each.outputs for (each,) in both] == [each.outputs for each in expected]
        pieces = [piece async for piece in other.stream("a", BRIEF)]
        assert [token for piece in pieces for token in piece.token_ids] == expected[0].outputs[0].token_ids
        running = asyncio.create_task(other.generate(["a"] * 3, LONG, use_tqdm=False))
        stream = other.stream("b", LONG)
        assert isinstance(stream, AsyncIterator)
        await anext(stream)
    with pytest.raises(Unavailable):
        await running
    with pytest.raises(Unavailable):
        [piece async for piece in stream]
    with pytest.raises(Unavailable):
        await other.generate("a")
    await other.close()


def test_what_is_closed_says_so(folder: Path) -> None:
    llm = LLM(folder, scheduler={"max_running": 2, "max_queued_requests": 8, "max_queued_tokens": 300})
    # Long prompts fill the queue by their tokens before there are as many as the window admits.
    outputs = llm.generate(["x" * 100] * 30, BRIEF, use_tqdm=False)
    assert len(outputs) == 30
    pieces = llm.stream("x", LONG)
    next(pieces)
    llm.close()
    llm.close()
    for call in (lambda: next(pieces), lambda: llm.generate("x"), llm.list_states):
        with pytest.raises(Unavailable, match="has been closed"):
            call()
