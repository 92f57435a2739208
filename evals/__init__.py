"""Evaluation: one evaluator a file, result files, and what is rendered from them."""
