"""Responses that are stored, with their tokens and states, and turns that go on from them."""
