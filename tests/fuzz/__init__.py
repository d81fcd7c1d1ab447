"""Random calls of every op, judged against float64: `python -m tests.fuzz --help`, or `make fuzz`."""
