"""Other ways to erase concepts, each written from its published equations, to be measured against.

Every peer is a frozen dataclass of its settings with `edit(request)`; see `interface`.
"""

from collections.abc import Mapping

from benchmarks.peers.advunlearn import AdvUnlearn
from benchmarks.peers.cure import CURE
from benchmarks.peers.dp import DP
from benchmarks.peers.esd import ESD
from benchmarks.peers.hirm import HiRM
from benchmarks.peers.interface import Peer
from benchmarks.peers.mace import MACE
from benchmarks.peers.mace_lora import TrainedMACE
from benchmarks.peers.naive import Naive
from benchmarks.peers.oce import OCE
from benchmarks.peers.ours import Ours
from benchmarks.peers.rece import RECE
from benchmarks.peers.sepme_paper import PublishedSepME
from benchmarks.peers.speed import SPEED
from benchmarks.peers.trce import TRCE
from benchmarks.peers.uce import UCE
from sepme_cli.erasure.settings import Settings

#: Those that are tuned.
PEERS: Mapping[str, Peer] = {
    "naive": Naive(),
    "uce": UCE(),
    "mace": MACE(),
    "mace, both stages": TrainedMACE(),
    "speed": SPEED(),
    "rece": RECE(),
    "oce": OCE(),
    "dp": DP(),
    "cure": CURE(),
    "trce, first stage": TRCE(),
    "esd-x": ESD(),
    "sepme-published": PublishedSepME(),
}
#: Those that train the text encoder: measured on the English canvas alone, whose encoder is trained
#: on words at large.
TEXT_PEERS: Mapping[str, Peer] = {"hirm": HiRM(), "advunlearn, shortened": AdvUnlearn()}
METHODS: Mapping[str, Peer | None] = {
    "before": None,
    **PEERS,
    # As good as UCE's tuned settings by what is recognised, and nearer in what is kept.
    "uce, ridge 0.01": UCE(tokens="onward", toward="sibling", prompts="phrases", ridge=0.01),
    "sepme closed-form": Ours("closed-form"),
    "sepme closed-form, protection 30": Ours("closed-form", Settings(protection=30.0)),
    "sepme": Ours("sepme"),
}
