"""How a step is computed. Each implementation offers `forward` as `torch_reference` specifies it."""
