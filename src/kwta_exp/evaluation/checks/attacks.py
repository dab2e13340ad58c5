"""Comparisons of the suite's attacks on the same images."""

from kwta_exp.evaluation.checks.base import OBFUSCATED, Check, Comparison, comparison


@comparison(
    Check(
        name="gain_over_plain_pgd",
        threshold=0.05,
        bears_on="plain gradients",
        source=OBFUSCATED,
        meaning="other attacks fool images that plain PGD does not",
        measured="images that some attack fools and thorough plain PGD does not",
        paired=True,
    )
)
def gain_over_plain_pgd(attacks: Comparison) -> float | None:
    """The share of images that plain PGD misses and another attack fools."""
    return attacks.only(tuple(attacks.fooled), attacks.baseline_pgd) if attacks.baseline_pgd else None


@comparison(
    Check(
        name="single_step_finds_more",
        threshold=0.02,
        bears_on="plain gradients",
        source=OBFUSCATED,
        meaning="a single step fools images that iterating does not",
        measured="images that one gradient step fools and plain PGD does not",
        paired=True,
    )
)
def single_step_finds_more(attacks: Comparison) -> float | None:
    """The share of images that plain PGD misses and a single step fools."""
    if not attacks.baseline_pgd or not attacks.single_step:
        return None
    return attacks.only(attacks.single_step, attacks.baseline_pgd)


@comparison(
    Check(
        name="black_box_finds_more",
        threshold=0.02,
        bears_on="worst case",
        source=OBFUSCATED,
        meaning="attacks without gradients fool images that no gradient attack does",
        measured="images that only attacks without gradients fool (score-based, decision-based, transfer,"
        " noise)",
        paired=True,
    )
)
def black_box_finds_more(attacks: Comparison) -> float | None:
    """The share of images that only attacks without gradients fool."""
    with_gradient = tuple(name for name in attacks.fooled if name not in attacks.black_box)
    return attacks.only(attacks.black_box, with_gradient) if attacks.black_box and with_gradient else None
