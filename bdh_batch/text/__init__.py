"""Tokens to text and back. Knows nothing about models, requests or HTTP."""
