"""The engines that bertfast is measured beside, one module each, and bertfast itself.

A module has its peers in PEERS. Engines are imported when a peer of theirs is prepared, and not before.
"""

import difflib
from collections.abc import Sequence

from benchmarks.peers import (
    compiled,
    ctranslate2,
    huggingface,
    nested,
    onnxruntime,
    openvino,
    packed_encoders,
    patched,
    sentence_transformers,
)
from benchmarks.peers.peer import Peer, Setting, Unavailable

__all__ = ["PEERS", "Peer", "Setting", "Unavailable", "chosen"]

_MODULES = (
    huggingface,
    compiled,
    nested,
    onnxruntime,
    openvino,
    ctranslate2,
    sentence_transformers,
    packed_encoders,
    patched,
)
PEERS: dict[str, Peer] = {peer.name: peer for module in _MODULES for peer in module.PEERS}


def chosen(names: Sequence[str] | None) -> list[Peer]:
    """The peers of these names, each once, in the order asked for; all where there is no word about it.

    Raises ValueError for a name that no peer has.
    """
    for name in names or ():
        if name not in PEERS:
            close = difflib.get_close_matches(name, PEERS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown peer {name!r}{hint}: choose from {', '.join(PEERS)}")
    return [PEERS[name] for name in dict.fromkeys(PEERS if names is None else names)]
