"""Models by name: added from folders, URLs and the Hugging Face Hub, checked, and found again by `serve --model NAME`.

Knows nothing about servers, nor about how a model is computed.
"""
