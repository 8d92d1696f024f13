"""Questions about a trained adapter: traces, curves, comparisons, reproduction."""
