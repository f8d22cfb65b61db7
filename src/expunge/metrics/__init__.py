"""Metrics: pure functions from tables to numbers. One file each; `measure` runs them with bootstrap intervals."""
