"""What can be trained on a store: one file a network."""
