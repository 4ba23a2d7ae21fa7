"""Upstreams: KServe v2 workers, Gradio apps and servers of OpenAI's API, as backends of this server."""
