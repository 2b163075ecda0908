"""What comes from papers and their releases: presets, and checkpoints under their own names."""
