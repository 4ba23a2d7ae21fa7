"""GET /v1/neurons: how many neurons a model has, and where in a text each of them fires."""
