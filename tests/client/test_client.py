"""The client for what the official one lacks, sync and async, against real servers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import httpx2
import numpy as np
import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam

from bdh_batch import __version__
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.client import (
    AsyncBDHClient,
    BDHClient,
    ChatParameters,
    ClientError,
    CompletionParameters,
    Score,
    StreamOptions,
    errors,
)
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.http.auth.keys import KeyFile, new_key
from bdh_batch.http.schema import requests as wire
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Segment
from tests.conftest import eventually

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "conformance" / "tiny"
BUNDLED = ROOT / "models" / "bdh-shakespeare"
TEXT = ROOT / "tests" / "data" / "shakespeare-validation.txt"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Sing, é!"}]
X: dict[int, float] = {120: 100.0}  # all but forces an x
ENDLESS = 100_000
START_SECONDS = 600.0
REQUEST = httpx2.Request("GET", "http://proxy/v1/models")


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[BDHClient]:
    with BDHClient(tiny.url) as opened:
        yield opened


class TestCalls:
    def test_parameters_are_passed_on_typed(self, client: BDHClient) -> None:
        response = client.complete("ab", max_tokens=3, logit_bias=X, priority=2, min_p=0.1, repetition_penalty=1.1)
        assert response.choices[0].text == "xxx"
        chosen = client.complete("ab", structured_outputs={"choice": ["yes", "no"]}, top_k=0, deadline=50.0)
        assert chosen.choices[0].text in ("yes", "no")
        chat = client.chat(MESSAGES, model="minute", max_completion_tokens=2, logprobs=True, top_logprobs=1)
        assert chat.model == "minute"
        assert chat.choices[0].logprobs is not None

    def test_streams_are_the_response_in_chunks(self, client: BDHClient, tiny: Server) -> None:
        whole = client.complete("ab", max_tokens=20, seed=3).choices[0].text
        *chunks, last = client.stream_complete("ab", max_tokens=20, seed=3, options={"include_usage": True})
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole
        assert last.usage is not None
        assert last.usage.completion_tokens == 20
        deltas = [chunk.choices[0].delta for chunk in client.stream_chat(MESSAGES, max_tokens=3, logit_bias=X)]
        assert (deltas[0].role, "".join(delta.content or "" for delta in deltas)) == ("assistant", "xxx")
        left = client.stream_complete("ab", max_tokens=ENDLESS)
        next(left)
        left.close()  # type: ignore[attr-defined]
        tiny.until_idle()

    def test_tokens_go_there_and_back(self, client: BDHClient) -> None:
        reported = client.tokenize("né", return_token_strs=True)
        assert (reported.tokens, reported.count, reported.max_model_len) == ([*"né".encode()], 3, 131072)
        assert reported.token_strs == ["n", "<0xC3>", "<0xA9>"]
        assert client.detokenize(reported.tokens) == "né"
        chat = client.tokenize_chat(MESSAGES)
        assert client.detokenize(chat.tokens) == "user: Sing, é!\nassistant:"
        assert chat.token_strs is None
        info = client.tokenizer_info()
        assert (info.vocab_size, info.eos_token, info.eos_token_ids) == (256, None, [])
        assert (info.prefix_token, info.prefix_token_id) == ("\n", 10)

    def test_the_server_reports_about_itself(self, client: BDHClient, tiny: Server) -> None:
        info = client.server_info()
        assert (info.version, info.model) == (__version__, "tiny")
        assert info.config["scheduler"]["max_running"] == 256
        client.health()
        client.ready()
        tiny.until_idle()
        metrics = client.metrics()
        assert metrics.value("bdh_num_requests_running", model_name="tiny") == 0
        routes = metrics.value("bdh_http_requests_total")
        assert routes > metrics.value("bdh_http_requests_total", route="/v1/completions", status="200") > 0
        with pytest.raises(KeyError, match="bdh_nothing"):
            metrics.value("bdh_nothing")

    async def test_async_they_are_the_same(self, client: BDHClient, tiny: Server) -> None:
        async with AsyncBDHClient(f"{tiny.url}/v1/") as other:
            await other.wait_until_ready(60.0)
            assert (await other.score("né")) == client.score("né")
            assert (await other.tokenize("né")).tokens == client.tokenize("né").tokens
            assert (await other.complete("a", logit_bias=X, max_tokens=2)).choices[0].text == "xx"
            deltas = [chunk.choices[0].delta async for chunk in other.stream_chat(MESSAGES, max_tokens=3, logit_bias=X)]
            assert "".join(delta.content or "" for delta in deltas) == "xxx"
            left = other.stream_complete("ab", max_tokens=ENDLESS)
            assert await anext(left)
            await left.aclose()  # type: ignore[attr-defined]
            tiny.until_idle()
            with pytest.raises(errors.UnknownParameter):
                await other.complete("a", prmpt="b")  # type: ignore[call-arg]

    def test_both_clients_have_the_same_ones(self) -> None:
        public = [{name for name in vars(kind) if not name.startswith("_")} for kind in (BDHClient, AsyncBDHClient)]
        assert public[0] == public[1]
        assert all(getattr(BDHClient, name).__doc__ for name in public[0] - {"send", "stream", "close"})

    @pytest.mark.parametrize(
        ("parameters", "body", "others"),
        [
            (CompletionParameters, wire.CompletionBody, {"prompt"}),
            (ChatParameters, wire.ChatBody, {"messages"}),
            (StreamOptions, wire.StreamOptions, set()),
        ],
    )
    def test_parameters_are_what_the_server_takes(self, parameters: Any, body: Any, others: set[str]) -> None:
        older = {f"guided_{kind}" for kind in ("json", "regex", "choice", "grammar")}
        labels = {"safety_identifier", "request_id", "prompt_cache_key"}
        apart = others | older | labels | {"stream", "stream_options"}
        assert get_type_hints(parameters).keys() == body.model_fields.keys() - apart

    def test_it_needs_neither_torch_nor_the_server(self) -> None:
        code = "import sys, bdh_batch.client; print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert not {"torch", "numba", "starlette", "uvicorn", "bdh_batch.http", "bdh_batch.settings"} & {*loaded}


class Bundled:
    """The bundled model with its window, computed by the specification."""

    def __init__(self) -> None:
        model, device = load_model(BUNDLED, torch.float32, torch.device("cpu")), torch.device("cpu")
        window = json.loads((BUNDLED / "config.json").read_text())["attention_window"]
        self._runner = Runner(TorchKernels(model.weights, window), StatePool(model.config, 1, device, window))

    def logprobs(self, text: str) -> np.ndarray:
        """[T - 1, V]: of what follows each byte but the last."""
        logits = np.asarray(self._runner.logits([Segment(0, 0, text.encode(), None)]).double().numpy())[:-1]
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Lines are so short that torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestScores:
    """What an evaluation harness asks for: log-likelihoods of texts that are given."""

    @pytest.mark.usefixtures("one_thread")
    def test_of_50_lines_are_the_models_own_16_in_a_request_and_alone(self, server: Server) -> None:
        reference = Bundled()
        lines = [line for line in TEXT.read_text().splitlines() if len(line) > 1][:50]
        tables = [reference.logprobs(line) for line in lines]
        expected = [table[np.arange(len(table)), [*line.encode()[1:]]] for line, table in zip(lines, tables)]
        with BDHClient(server.url) as client:
            alone = {at: client.score(lines[at]) for at in range(0, 50, 3)}
            batches = [client.score_all(lines[at : at + 16]) for at in range(0, 50, 16)]
            tops = client.complete(lines[:16], echo=True, logprobs=5, max_tokens=0).choices
        together = [score for batch in batches for score in batch]
        assert len(together) == 50
        for found in (alone, dict(enumerate(together))):
            for at, score in found.items():
                line, own, table = lines[at], expected[at], tables[at]
                assert "".join(score.tokens) == line
                assert score.logprobs[0] is None
                np.testing.assert_allclose(score.logprobs[1:], own, atol=1e-4)  # type: ignore[arg-type]
                assert score.total == pytest.approx(own.sum(), abs=1e-4 * len(own))
                likeliest = [a == b for a, b in zip(table.argmax(axis=1), line.encode()[1:])]
                assert score.likeliest == [None, *likeliest]
        for choice, table in zip(tops, tables):
            assert choice.logprobs is not None
            assert choice.logprobs.top_logprobs is not None
            for reported, row in zip(choice.logprobs.top_logprobs[1:], table, strict=True):
                best = {chr(token): row[token] for token in np.argsort(-row)[:5]}
                assert best == pytest.approx({name: reported[name] for name in best}, abs=1e-4)

    def test_of_a_completion_begin_where_its_prompt_ends(self, client: BDHClient, tiny: Server) -> None:
        greedy = tiny.complete(prompt="né", max_tokens=4, temperature=0, return_token_ids=True)["choices"][0]
        tokens = [*"né".encode(), *greedy["token_ids"]]
        whole = client.score(tokens)
        assert not whole.greedy
        assert Score(whole.tokens[3:], whole.logprobs[3:], whole.likeliest[3:], whole.offsets[3:]).greedy
        spelled = client.score("né, Ñandú")
        assert "".join(spelled.after(2).tokens[:4]) == ", bytes:\\xc3bytes:\\x91"
        assert spelled.after(2).total == pytest.approx(sum(spelled.logprobs[3:]))  # type: ignore[arg-type]
        assert spelled.after(0) == spelled


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """By name; `strict` puts them there."""
    return {}


@pytest.fixture(scope="module")
def strict(serve: ServeFactory, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that refuses for every reason there is: one slot to run in, one request to wait, keys, small bodies."""
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys")
    rights: dict[str, dict[str, object]] = {"all": {}, "other": {"models": ["gpt"]}, "few": {"requests_per_minute": 1}}
    keys.update((name, file.add(partial(new_key, name=name, rights=right))) for name, right in rights.items())
    options = [
        *("auth.enabled=true", f"auth.api_keys_file={file.path}", "limits.max_body_bytes=20000"),
        *("scheduler.max_running=1", "scheduler.max_queued_requests=1"),
    ]
    with serve(*options, model=TINY) as server:
        yield server


class TestErrors:
    """Each is raised for what it means, and has the official client's own as its cause."""

    @pytest.mark.parametrize(
        ("key", "ask", "kind", "cause", "reported"),
        [
            ("all", lambda c: c.complete("a", top_p=5), errors.InvalidRequest, openai.BadRequestError, (400, "top_p")),
            ("all", lambda c: c.complete(5), errors.InvalidRequest, openai.BadRequestError, (400, "prompt")),
            *(
                ("all", lambda c, extra=extra: c.complete("a", **extra), kind, openai.BadRequestError, (400, *extra))
                for extra, kind in (
                    ({"prmpt": "b"}, errors.UnknownParameter),
                    ({"suffix": "b"}, errors.UnsupportedParameter),
                    ({"max_tokens": 10**6}, errors.ContextLengthExceeded),
                )
            ),
            ("all", lambda c: c.chat([{}]), errors.InvalidRequest, openai.BadRequestError, (400, "messages[0].role")),
            ("all", lambda c: c.complete("a", model="x"), errors.ModelNotFound, openai.NotFoundError, (404, "model")),
            ("all", lambda c: c.complete("a" * 20000), errors.TooLarge, openai.APIStatusError, (413, None)),
            ("none", lambda c: c.tokenize("a"), errors.Unauthorized, openai.AuthenticationError, (401, None)),
            ("other", lambda c: c.score("a"), errors.Forbidden, openai.PermissionDeniedError, (403, "model")),
        ],
    )
    def test_are_named_by_meaning(
        self,
        strict: Server,
        keys: dict[str, str],
        key: str,
        ask: Callable[[Any], object],
        kind: type[ClientError],
        cause: type[openai.APIStatusError],
        reported: tuple[int, str | None],
    ) -> None:
        before = strict.metrics()
        with BDHClient(strict.url, keys.get(key, key)) as client, pytest.raises(kind) as caught:
            ask(client)
        error = caught.value
        assert type(error) is kind
        assert (error.status, error.param, error.retry_after) == (*reported, None)
        assert error.request_id
        assert isinstance(error.__cause__, cause)
        assert "Error code" not in str(error)
        after = strict.metrics()
        moved = {name: after[name] - before.get(name, 0) for name in after if name.startswith("bdh_http_requests_t")}
        assert sum(moved.values()) == 2  # itself, not tried again, and the scrape

    def test_of_deadlines_come_once(self, strict: Server, keys: dict[str, str]) -> None:
        before = strict.metrics()
        with BDHClient(strict.url, keys["all"]) as client, pytest.raises(errors.DeadlineExceeded) as caught:
            client.complete("a", max_tokens=ENDLESS, deadline=0.5)
        error = caught.value
        assert (type(error), error.status) in ((errors.RunTimeout, 504), (errors.QueueTimeout, 408))
        name = f"bdh_http_requests_total{{route=/v1/completions,status={error.status}}}"
        assert strict.metrics()[name] == before.get(name, 0) + 1  # the official client would have tried again, twice

    def test_report_when_to_come_back(self, strict: Server, keys: dict[str, str]) -> None:
        with BDHClient(strict.url, keys["few"], max_retries=0) as client:
            client.tokenizer_info()
            with pytest.raises(errors.RateLimited) as limited:
                client.tokenizer_info()
        assert isinstance(limited.value.__cause__, openai.RateLimitError)
        assert limited.value.retry_after is not None
        assert 1 <= limited.value.retry_after <= 60
        with BDHClient(strict.url, keys["all"], max_retries=0) as client, ThreadPoolExecutor(1) as pool:
            running = client.stream_complete("a", max_tokens=ENDLESS, deadline=3600.0)
            next(running)
            for deadline in (0.5, 5.0, 50.0):  # where others have waited for longer, it is refused at once
                with pytest.raises((errors.QueueTimeout, errors.QueueFull)) as late:
                    client.complete("a", deadline=deadline)
                if late.type is errors.QueueTimeout:
                    break
            assert late.type is errors.QueueTimeout
            waiting = pool.submit(client.complete, "a", max_tokens=1)
            strict.until(lambda m: m["bdh_num_requests_waiting"] == 1)
            with pytest.raises(errors.QueueFull) as full:
                client.complete("a")
            assert full.value.retry_after is not None
            assert full.value.code == "queue_full"
            running.close()  # type: ignore[attr-defined]
            assert waiting.result().choices
        strict.until_idle()

    def test_end_streams_too(self, client: BDHClient) -> None:
        for _ in range(20):
            with pytest.raises(errors.DeadlineExceeded) as caught:
                list(client.stream_complete("a", max_tokens=ENDLESS, deadline=2.0))
            if caught.value.status is None:
                break  # else others kept the cores, and it had not begun
        assert type(caught.value) is errors.RunTimeout
        assert type(caught.value.__cause__) is openai.APIError
        assert (caught.value.status, caught.value.code) == (None, "request_timeout")

    async def test_of_a_server_that_is_not_there_yet_or_no_more(self, serve: ServeFactory) -> None:
        with serve(model=TINY, wait=False) as server, BDHClient(server.url, max_retries=0) as client:
            client.wait_until_ready(START_SECONDS)
            running = client.stream_complete("a", max_tokens=ENDLESS)
            next(running)
            server.terminate()
            eventually(lambda: server.http.get("/readyz").status_code == 503)
            for call in (client.ready, lambda: client.complete("a"), lambda: client.wait_until_ready(0.3)):
                with pytest.raises(errors.Unavailable, match="shutting down") as caught:
                    call()
                assert caught.value.retry_after == 5
            client.health()
            running.close()  # type: ignore[attr-defined]
            server.exit_code()
            with pytest.raises(errors.Unreachable):
                client.health()
            async with AsyncBDHClient(server.url, max_retries=0) as other:
                with pytest.raises(errors.Unreachable):
                    await other.wait_until_ready(0.3)

    def test_of_what_cannot_be_sent_name_the_request(self) -> None:
        with BDHClient("http://127.0.0.1:1") as client:
            for prompt, temperature in (("half \ud800", 1.0), ("a", float("nan"))):
                with pytest.raises(errors.InvalidRequest, match="cannot be sent as JSON"):
                    client.complete(prompt, temperature=temperature)
            for url, key in (("foo", "none"), ("http://a?b", "none"), ("http://[", "none"), (client._root, "a\nb")):
                with pytest.raises(ValueError, match=r"^(base_url|api_key): "):
                    BDHClient(url, key)
        with pytest.raises(ValueError, match="base_url") as caught:
            BDHClient("http://user:secret@a/path?token=secret")
        assert "http://a/path" in str(caught.value)
        client = BDHClient("http://user:secret@127.0.0.1:1", max_retries=0)
        with client, pytest.raises(errors.Unreachable) as unreachable:
            client.health()
        assert "http://127.0.0.1:1/health" in str(unreachable.value)
        assert "secret" not in str(caught.value) + str(unreachable.value)

    def test_of_another_server_say_what_came(self) -> None:
        page = httpx2.MockTransport(lambda _: httpx2.Response(200, text="<html>"))
        with BDHClient(http_client=httpx2.Client(transport=page)) as client:
            for call in (client.server_info, client.states.list, client.metrics, lambda: client.complete("a")):
                with pytest.raises(errors.ServerFailed, match="html"):
                    call()
            with pytest.raises(ValueError, match="empty name"):  # of the path, which is no file's
                client.states.download("state_1", "/")

    @pytest.mark.parametrize(("status", "kind"), errors.BY_STATUS.items())
    def test_of_a_proxy_go_by_its_status(self, status: int, kind: type[ClientError]) -> None:
        response = httpx2.Response(status, text="<html>", headers={"retry-after": "3"}, request=REQUEST)
        error = errors.translated(openai.APIStatusError("<html>", response=response, body=None))
        assert (type(error), error.status, error.retry_after, str(error)) == (kind, status, 3, "<html>")
