"""Statistics: bootstrap, intervals, paired comparisons, calibration. No torch, no files."""
