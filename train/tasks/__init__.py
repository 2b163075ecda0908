"""What a training is for: one file a task."""
