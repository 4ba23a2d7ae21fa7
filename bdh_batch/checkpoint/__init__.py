"""Model files: read, checked, converted. Knows nothing about how a model is computed."""
