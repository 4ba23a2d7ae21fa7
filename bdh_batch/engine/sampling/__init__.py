"""From logits to tokens: logits processors, masks, the draw, log-probabilities."""
