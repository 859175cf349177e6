"""Benchmarks: `cinecat bench NAME`."""
