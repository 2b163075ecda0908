"""How papers take clips of several data sets."""

from __future__ import annotations

RETRIEVAL_CLIPS = "Side4Video: 12 frames, 32 words, one centre crop"
SMALL_CLIPS = "top-1 on each of the three splits, and their mean; clips as for Kinetics"
