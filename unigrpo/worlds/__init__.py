"""Procedural worlds: prompts, scenes, pictures and an exact verifier, without any downloaded data."""
