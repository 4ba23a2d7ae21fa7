"""The REST endpoints of KServe v2, the Open Inference Protocol."""
