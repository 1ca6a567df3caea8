"""Evaluation: zero-shot scores, fine-tuning, comparisons, and the official pipeline beside them."""
