"""Hold the entropy at a target by one weight for each kind of token, from influences accumulated over steps.

``kinds`` labels tokens, ``kind_sums`` adds a step's influences on entropy and on reward up by kind, ``update`` adds
them to the state, ``weights`` solves for the weights, and ``token_weights`` gives each token the weight of its kind.
"""

from fx_influence.control.program import ControlWeights, weights
from fx_influence.control.state import ControlState, control_state, from_values, to_values, update
from fx_influence.control.sums import KindSums, kind_sums, kinds, token_weights

__all__ = [
    "ControlState",
    "ControlWeights",
    "KindSums",
    "control_state",
    "from_values",
    "kind_sums",
    "kinds",
    "to_values",
    "token_weights",
    "update",
    "weights",
]
