"""Likelihoods, generated text and predictions from a base and its adapters."""
