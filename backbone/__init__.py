"""Frozen towers: the image tower whose tokens are stored, the text tower that asks for them, and their weights."""
