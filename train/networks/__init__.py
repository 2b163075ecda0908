"""What can be trained on a store: one file a network, and its line in this table."""

from __future__ import annotations

from ...errors import ConfigError
from .attentive_probe import Attentive
from .contract import NetworkKind
from .dist import Dist
from .linear_probe import Linear
from .side4video import Side4Video
from .tds_clip import TdsClip
from .zero_shot import ZeroShotText

NETWORKS: dict[str, NetworkKind] = {
    kind.name: kind for kind in (Side4Video(), Linear(), Attentive(), TdsClip(), Dist(), ZeroShotText())
}
"""By the name that `--head` takes; the first is the one that the others are compared with."""


def find_network(name: str) -> NetworkKind:
    """A kind of network that is trained, by its name.

    Raises:
        ConfigError: With the names that there are.
    """
    trained = {kind.name: kind for kind in NETWORKS.values() if kind.is_trained}
    if name not in trained:
        raise ConfigError(f"--head takes {', '.join(trained)}; found {name!r}")
    return trained[name]
