"""Evaluation on embeddings alone: zero-shot, few-shot, retrieval, modality gap, and the report.

Nothing here runs a model. A stage embeds its splits once (:mod:`m3bind.eval.store`), and all
figures are functions of those arrays, so that they can be recomputed in seconds.
"""
