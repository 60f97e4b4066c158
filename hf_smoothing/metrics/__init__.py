"""Metrics for `evaluate`, one a folder: what `evaluate.load` takes, and what a metric's repository on the Hub holds."""
