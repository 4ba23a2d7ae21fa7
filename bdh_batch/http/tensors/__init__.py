"""Inference requests and responses as tensors, over REST and gRPC alike."""
