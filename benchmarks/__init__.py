"""Programs that measure: each prints a table and writes it below `results/`."""
