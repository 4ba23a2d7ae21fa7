"""KServe v2 over gRPC. Imported only where `kserve.grpc_port` is set: what it needs is an extra."""

import os

# Read by gRPC when it is loaded. Its own log has a line for whatever a client does, such as a broken TLS handshake.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
