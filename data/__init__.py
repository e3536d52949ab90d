"""Datasets: one folder each with its prepare.py, and what they share."""
