"""Attacks: small objects with hyper-parameters, called as ``attack(model, x, y)``."""

from kwta_exp.attacks.apgd import APGD
from kwta_exp.attacks.autoattack import AutoAttack, Square
from kwta_exp.attacks.base import Attack, CallableAttack, NotApplicableError
from kwta_exp.attacks.bpda import BPDA, RelaxedTransfer
from kwta_exp.attacks.evolution import NES, EvolutionStrategies
from kwta_exp.attacks.foolbox_adapter import FoolboxAttack, as_attack
from kwta_exp.attacks.pgd import PGD
from kwta_exp.attacks.smoothed import SmoothedPGD
from kwta_exp.attacks.threat import Threat
from kwta_exp.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "BPDA",
    "NES",
    "PGD",
    "Attack",
    "AutoAttack",
    "CallableAttack",
    "EvolutionStrategies",
    "FoolboxAttack",
    "NotApplicableError",
    "RelaxedTransfer",
    "SmoothedPGD",
    "Square",
    "Threat",
    "Transfer",
    "as_attack",
]
