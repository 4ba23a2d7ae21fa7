"""The registry keeps models by name: from folders, URLs and the Hugging Face Hub, for `serve --model NAME`.

It checks what it adds, and knows nothing about servers, nor about how a model is computed.
"""
