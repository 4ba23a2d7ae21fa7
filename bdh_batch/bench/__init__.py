"""Load for any server that speaks the OpenAI API, and what its clients see: `bdh-batch bench serve`.

Flags, printed table and result file follow `vllm bench serve`. Knows the server by its HTTP interface alone.
"""
