"""What in the network's own code blocks gradients, and which of it no attack sees through."""

from dataclasses import asdict

from kwta_exp.attacks.base import with_fewer
from kwta_exp.attacks.bpda import relaxable
from kwta_exp.attacks.relaxing.model import examined
from kwta_exp.attacks.relaxing.opaque import gradient_agrees
from kwta_exp.evaluation.checks.base import OBFUSCATED, Check, Subject, measurement

LOOKED_AT = 4
"""Images that the network is examined with."""


@measurement(
    Check(
        name="operators_block_gradients",
        threshold=0.0,
        bears_on="plain gradients",
        source=OBFUSCATED,
        meaning="the network's own code blocks gradients",
        measured="1 if comparisons, roundings, selections, winner-take-all layers or hidden gradients lie"
        " between image and logits, and the gradient does not tell how the logits change; else 0",
        sign=True,
    ),
    Check(
        name="parts_not_covered",
        threshold=0.0,
        bears_on="worst case",
        source=OBFUSCATED,
        meaning="no attack sees through a part of the network",
        measured="1 if a part of the network hides its gradient, and neither a relaxation nor a secant can"
        " replace it; else 0",
    ),
)
def operators(subject: Subject) -> dict[str, float]:
    """Whether something blocks gradients, and whether a part is not covered; ``details`` names them."""
    gates: dict[str, str] = {}
    for attack in subject.evaluation.suite.values():
        gates |= getattr(attack, "gates", None) or {}
    network, layers = subject.network, relaxable(subject.network, gates)
    x = subject.batches[0][0][:LOOKED_AT]
    found = with_fewer(lambda x: examined(network, layers, x), x)
    subject.details["gradient_blockers"] = asdict(found)
    blocked = found.hard > 0 and not with_fewer(lambda x: gradient_agrees(network, x), x)
    return {
        "operators_block_gradients": float(blocked),
        "parts_not_covered": float(bool(found.not_covered)),
    }


def named(details: dict[str, object]) -> dict[str, str]:
    """What the meaning of each raised check should name, by check."""
    blockers = details.get("gradient_blockers")
    if not isinstance(blockers, dict):
        return {}
    parts = ", ".join(f"{name} ({why})" for name, why in blockers["not_covered"].items())
    layers = {"winner-take-all layer": blockers["layers"]} if blockers["layers"] else {}
    counts = ", ".join(f"{kind}: {n}" for kind, n in {**layers, **blockers["operators"]}.items())
    smoothed = ", ".join(f"{name} ({why})" for name, why in blockers["smoothed"].items())
    return {
        "parts_not_covered": parts,
        "operators_block_gradients": "; ".join(each for each in (counts, smoothed) if each),
    }
