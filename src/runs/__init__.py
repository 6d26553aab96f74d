"""One training run: where it starts, its record, its report, and the processes it runs in."""
