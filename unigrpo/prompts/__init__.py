"""Prompt records: files, generation, deduplication, splits and the proof that they do not leak."""
