"""Analyses of trained adapters: traces, curves, comparisons and repeated trainings."""
