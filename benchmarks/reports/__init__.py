"""Reports made of results: the run of all benchmarks, tables, the picture of the README, comparisons of two runs."""
