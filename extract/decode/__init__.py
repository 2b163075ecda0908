"""From a file to frames: processes that read videos, and what is true of what they found. Knows no configuration."""
