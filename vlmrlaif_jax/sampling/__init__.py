"""Prefill, decoding, continuous batching and token sampling."""
