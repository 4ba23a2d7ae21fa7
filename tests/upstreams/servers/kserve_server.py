"""A KServe model server with a predictor of texts. Run with the Python of .venv-upstreams: kserve_server.py HTTP GRPC

KServe's own gRPC has ModelInfer only. Triton's ModelStreamInfer is added to it, answered by the same predictor, as
those have it who serve language models behind it.
"""

import asyncio
import sys

import grpc
import uvicorn
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb, server as grpc_server

HTTP, GRPC = map(int, sys.argv[1:3])
STREAMS = sys.argv[3:] != ["--no-streams"]


LOOPBACK = "127.0.0.1"


class Parrot(Model):
    """Says the words of a prompt again, so many of them as max_tokens says."""

    def __init__(self):
        super().__init__("parrot")
        self.ready = True

    def words(self, request):
        given = {each.name: each for each in request.inputs}
        prompt, most = (given[name].data[0] if name in given else None for name in ("prompt", "max_tokens"))
        words = (prompt.decode() if isinstance(prompt, bytes) else prompt).split(" ")
        return words[:most], "length" if most and most < len(words) else "stop"

    def predict(self, payload, headers=None):
        words, reason = self.words(payload)
        outputs = [("text", " ".join(words)), ("finish_reason", reason)]
        made = [InferOutput(name, [1], "BYTES", [value.encode()]) for name, value in outputs]
        return InferResponse(response_id=payload.id, model_name=self.name, infer_outputs=made)


PARROT = Parrot()


def response(id, token, reason):
    made = pb.ModelInferResponse(model_name=PARROT.name, id=id)
    for name, value in (("token", token), ("finish_reason", reason)):
        made.outputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(value.encode())
    content = made.SerializeToString()
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return b"\x12" + length + bytes([size]) + content  # a ModelStreamInferResponse, which KServe's stubs have not


async def stream(requests, context):
    async for message in requests:
        request = pb.ModelInferRequest.FromString(message)
        words, reason = PARROT.words(InferRequest.from_grpc(request))
        for number, word in enumerate(words):
            yield response(request.id, word if number == 0 else f" {word}", "null")
            await asyncio.sleep(0.001)
        yield response(request.id, "", reason)


class OnLoopback(uvicorn.Config):
    """KServe listens at all addresses."""

    def __init__(self, app, host, **options):
        super().__init__(app, host=LOOPBACK, **options)


def with_streams(servicer, server):
    add(servicer, server)
    listen = server.add_insecure_port
    server.add_insecure_port = lambda address: listen(f"{LOOPBACK}:{GRPC}")
    if not STREAMS:
        return
    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream)}
    # Of several handlers of one service, gRPC asks one after the other for a method.
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)])


add = grpc_server.grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
uvicorn.Config = OnLoopback
grpc_server.grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server = with_streams
ModelServer(http_port=HTTP, grpc_port=GRPC, enable_grpc=True).start([PARROT])
