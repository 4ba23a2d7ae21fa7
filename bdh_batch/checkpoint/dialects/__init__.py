"""Other people's names for BDH's config and tensors, to upstream's. Knows nothing about files."""
