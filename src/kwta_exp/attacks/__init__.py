"""Attacks: small objects with hyper-parameters, called as ``attack(model, x, y)``."""

from kwta_exp.attacks.base import Attack, NotApplicableError
from kwta_exp.attacks.foolbox_adapter import FoolboxAttack
from kwta_exp.attacks.pgd import PGD
from kwta_exp.attacks.surrogate import SurrogatePGD
from kwta_exp.attacks.threat import Threat

__all__ = ["PGD", "Attack", "FoolboxAttack", "NotApplicableError", "SurrogatePGD", "Threat"]
