"""OpenAI's Responses API, as Open Responses has it too: /v1/responses and below, served as chat completions are."""
