"""Speed and memory measured side by side with other people's models; `python -m benchmarks.NAME --help`."""
