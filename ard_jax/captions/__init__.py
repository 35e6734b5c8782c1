"""Captions: where their texts come from, and the store of their vectors."""
