"""Who may call, how often, over TLS, from several processes, and until when."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
import tritonclient.grpc as triton
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

from bdh_batch.errors import ConfigError
from bdh_batch.http.auth.keys import KeyFile, new_key
from bdh_batch.http.gate import Gate
from bdh_batch.http.serving import Serving
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.service import open_grpc
from bdh_batch.settings import Settings
from tests.conftest import CONFORMANCE, eventually, free_port
from tests.kserve.support import SERVICE, Worker, add, request, worker_of

if TYPE_CHECKING:
    from tests.conftest import Cli, ServeFactory

TINY = CONFORMANCE / "tiny"
TLS = Path(__file__).parent.parent / "data" / "tls"
OF_ANN = {"metadata": [("authorization", "Bearer key-of-ann")]}
WRONG = {"metadata": [("authorization", "Bearer key-of-nobody")]}
PER_MINUTE = 6
LONG: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True}
LAST: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def guarded(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, str]]:
    """Asks for keys over TLS; with the key of one that may use another model only."""
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys")
    other = file.add(lambda digest: new_key(digest, "other", {"models": ("another",)}))
    options = (
        *("auth.enabled=true", "auth.api_keys=key-of-ann,key-of-bob", f"auth.api_keys_file={file.path}"),
        *("auth.protect_docs=true", "rate_limiting.enabled=true"),
        f"rate_limiting.requests_per_minute={PER_MINUTE}",
    )
    with worker_of(serve, free_port(), "tiny", *options, model=TINY) as worker:
        yield worker, other


class TestKeys:
    def test_are_asked_for_but_by_probes(self, guarded: tuple[Worker, str]) -> None:
        worker, other = guarded
        assert worker.triton.is_server_ready()
        assert worker.triton.get_server_metadata().name == "bdh_batch"
        bearer = {"metadata": [("authorization", f"Bearer {other}")]}
        asked = request("tiny", max_tokens=1)
        assert worker.refused("ModelInfer", asked)[0] == grpc.StatusCode.UNAUTHENTICATED
        code, _, trailers = worker.refused("ModelInfer", asked, **WRONG)
        assert (code, trailers["error-code"]) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
        assert worker.refused("ModelInfer", asked, **bearer)[0] == grpc.StatusCode.PERMISSION_DENIED
        named = pb.ModelMetadataRequest(name="tiny")
        assert worker.refused("ModelMetadata", named, **bearer)[0] == grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as refused:
            list(worker.stream([asked]))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED

    def test_are_asked_for_by_reflection_where_docs_are_protected(self, guarded: tuple[Worker, str]) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(guarded[0].channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.ServerReflectionInfo(iter([asked])))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert next(stub.ServerReflectionInfo(iter([asked]), **OF_ANN)).list_services_response.service

    def test_have_their_limits_on_every_request_of_a_stream(self, guarded: tuple[Worker, str]) -> None:
        worker = guarded[0]
        requests = [request("tiny", id=str(number), max_tokens=1) for number in range(PER_MINUTE + 2)]
        of_bob = [("authorization", "Bearer key-of-bob")]
        refused = [each for each in worker.stream(requests, metadata=of_bob) if each.error_message]
        assert len(refused) == 2
        assert all("requests per minute" in each.error_message for each in refused)
        code, _, trailers = worker.refused("ModelInfer", request("tiny", max_tokens=1), metadata=of_bob)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers["x-ratelimit-remaining-requests"] == "0"
        assert 1 <= int(trailers["retry-after"]) <= 60


def test_calls_are_bounded_and_probes_are_not(serve: ServeFactory) -> None:
    """Two of one caller, three in all; over TLS, as the certificate of HTTPS holds here, too."""
    tls = (f"server.tls_cert={TLS / 'cert.pem'}", f"server.tls_key={TLS / 'key.pem'}")
    bounds = ("kserve.max_calls=3", "kserve.max_calls_per_caller=2", "limits.write_seconds=0.5")
    port = free_port()
    with serve(f"kserve.grpc_port={port}", *tls, *bounds, model=TINY, wait=False) as server:
        certificate = (TLS / "cert.pem").read_bytes()
        credentials = grpc.ssl_channel_credentials(certificate)
        with grpc.secure_channel(f"localhost:{port}", credentials, [("grpc.http2.bdp_probe", 0)]) as channel:
            ready = channel.unary_unary(f"{SERVICE}ServerReady")

            def is_ready() -> bool:
                raw = ready(b"", wait_for_ready=True, timeout=300)
                return bool(pb.ServerReadyResponse.FromString(raw).ready)

            eventually(is_ready, what=lambda: server.log)
            infer = channel.unary_unary(f"{SERVICE}ModelInfer")
            calls = [infer.future(request("tiny", **LONG).SerializeToString()) for _ in range(2)]
            refusals: list[grpc.RpcError] = []

            def refused() -> bool:
                one = infer.future(request("tiny", **LONG).SerializeToString(), timeout=0.2)
                refusals.append(one.exception())
                return bool(refusals[-1].code() == grpc.StatusCode.RESOURCE_EXHAUSTED)

            eventually(refused)
            assert "kserve.max_calls_per_caller" in (refusals[-1].details() or "")
            assert is_ready()
            for call in calls:
                call.cancel()
            stream = channel.unary_stream(f"{SERVICE}ModelStreamInfer")
            asked = request("tiny", n=8, logprobs=20, **LONG).SerializeToString()
            stalled: list[Any] = []

            def begins() -> bool:
                """Reads one response and no more: its requests end as soon as nothing fits the buffers between."""
                stalled.append(stream(asked, timeout=300))
                try:
                    return bool(next(stalled[-1]))
                except grpc.RpcError:  # others are not seen to be gone, or this was read too late
                    return False

            eventually(begins)
            url = f"https://localhost:{server.port}/load"
            context = ssl.create_default_context(cadata=certificate.decode())
            with httpx.Client(verify=context, timeout=300) as https:
                eventually(lambda: https.get(url).json()["server_load"] == 0)
            stalled.clear()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as plain, pytest.raises(grpc.RpcError) as broken:
            plain.unary_unary(f"{SERVICE}ServerReady")(b"", timeout=300)
        assert broken.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_drain_finishes_what_runs_and_refuses_what_is_new(serve: ServeFactory) -> None:
    held = threading.Event()

    def requests() -> Iterator[Any]:
        yield request("tiny", **LAST)
        held.wait()
        yield request("tiny", id="new", max_tokens=1)

    with worker_of(serve, free_port(), "tiny", model=TINY) as worker:
        expected = worker.server.text(prompt="ROMEO:", **LAST)
        stream = worker.stream(requests())
        text = next(stream).infer_response.outputs[0].contents.bytes_contents[0]
        endless = worker.stream([request("tiny", **LONG)])  # it drains until this one is left
        next(endless)
        worker.server.terminate()
        eventually(lambda: not worker.triton.is_server_ready())
        assert worker.refused("ModelInfer", request("tiny", max_tokens=1))[0] == grpc.StatusCode.UNAVAILABLE
        endless.cancel()
        rest: list[bytes] = []
        with pytest.raises(grpc.RpcError) as ended:
            rest.extend(each.infer_response.outputs[0].contents.bytes_contents[0] for each in stream)
        held.set()
        assert (text + b"".join(rest)).decode() == expected
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
        assert worker.server.exit_code() == 0


def test_a_call_without_a_request_or_a_message_ends_after_a_while(serve: ServeFactory) -> None:
    held = threading.Event()

    def requests(*first: Any) -> Iterator[Any]:
        yield from first
        held.wait()

    def first(call: Any) -> Any:
        """Its first response; None where its request has come too late."""
        with contextlib.suppress(grpc.RpcError):
            return next(call)
        return None

    hasty = ("kserve.idle_seconds=0.5", "limits.body_seconds=0.5")
    with worker_of(serve, free_port(), "tiny", *hasty, model=TINY) as worker:
        reflection = reflection_pb2_grpc.ServerReflectionStub(worker.channel).ServerReflectionInfo
        listed = reflection_pb2.ServerReflectionRequest(list_services="")
        short = request("tiny", max_tokens=1)
        for call in (worker.stream(requests()), worker.stream(requests(short)), reflection(requests(listed))):
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
            assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert "kserve.idle_seconds" in (ended.value.details() or "")
        with pytest.raises(grpc.RpcError) as ended:
            worker.channel.stream_unary(f"{SERVICE}ModelInfer")(requests(), timeout=300)
        assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "limits.body_seconds" in (ended.value.details() or "")
        for _ in range(100):  # one comes too late where the machine is busy
            if first(call := worker.stream(requests(request("tiny", **LONG)))) is not None:
                break
        else:
            raise AssertionError("no stream has begun")
        began = time.monotonic()
        while time.monotonic() < began + 1.5:  # a request is under way
            assert not next(call).error_message
        call.cancel()
        held.set()


def test_several_front_ends_share_the_port_and_load_models_on_demand(serve: ServeFactory) -> None:
    odd = CONFORMANCE / "odd-sizes"
    models = f"[{{id: tiny, path: {TINY}}}, {{id: odd, path: {odd}, load: on_demand, keep_alive: 60}}]"
    options = (f"models={models}", "server.workers=2", "engine.threads=1")
    with worker_of(serve, free_port(), "tiny", *options) as worker:
        expected = worker.server.text(model="tiny", prompt="ROMEO:", max_tokens=6, seed=1)
        for _ in range(4):
            with triton.InferenceServerClient(worker.address) as client:
                eventually(client.is_server_ready)
                assert client.is_model_ready("odd")
                assert client.get_model_metadata("odd").name == "odd"
            assert worker.infer(request("tiny", max_tokens=6, seed=1))["text"] == [expected]
        asked = pb.ModelInferRequest(model_name="odd")
        add(asked, "prompt", "INT32", [4], [3, 96, 14, 15])
        for name, value in (("max_tokens", 5), ("seed", 1)):
            asked.parameters[name].int64_param = value
        body = {"model": "odd", "prompt": [3, 96, 14, 15], "max_tokens": 5, "seed": 1, "return_token_ids": True}
        assert worker.infer(asked)["token_ids"] == worker.server.complete(**body)["choices"][0]["token_ids"]


def test_a_port_in_use_is_an_error(worker: Worker, cli: Cli) -> None:
    port = worker.address.rpartition(":")[2]
    ended = cli("serve", "--model", TINY, "--port", free_port(), "--set", f"kserve.grpc_port={port}")
    assert ended.returncode == 2
    assert f"kserve.grpc_port: cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_the_extra_there_is_no_grpc_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"kserve": {"grpc_port": 5000}})
    serving = Serving.of(settings, Gate(), Metrics("tiny"))
    monkeypatch.delitem(sys.modules, "bdh_batch.kserve.server", raising=False)
    monkeypatch.setitem(sys.modules, "grpc_reflection.v1alpha", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"kserve\.grpc_port.*pip install 'bdh-batch\[kserve\]'"):
        open_grpc(serving)


def test_grpc_is_not_imported_where_no_port_is_set() -> None:
    code = "import sys, bdh_batch.processes.service; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "bdh_batch.processes.service" in modules
    assert {"grpc", "tritonclient", "google.protobuf", "bdh_batch.kserve"}.isdisjoint(modules)
