"""Helpers without a model: errors, images, parsers of typed text, an LRU cache."""
