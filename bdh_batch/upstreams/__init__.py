"""Other people's servers behind this front door: KServe v2, Gradio apps, and anything that speaks OpenAI's API."""
