"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens, served as chat completions are."""
