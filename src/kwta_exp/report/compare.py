"""Two evaluations on the same images: which network is more robust, image by image?

    kwta-exp compare FOLDER FOLDER

Each folder is a run's, for its latest evaluation, or an evaluation's: ``RUN/evaluation/<suite>-<hash>``.

Two accuracies with overlapping intervals can still differ significantly, because the images are the same. The
difference is tested on the images where the two networks disagree (McNemar, "Note on the sampling error of the
difference between correlated proportions or percentages", Psychometrika 1947; here the exact binomial form).
"""

from kwta_exp.errors import UserError
from kwta_exp.evaluation.outcome import Bools
from kwta_exp.evaluation.stored import Stored


def compare(first: Stored, second: Stored) -> str:
    """Compare two evaluations, on clean images and in the worst case.

    Returns:
        The comparison as text: accuracies, on how many images only one network is correct, and the p-value.

    Raises:
        UserError: if one of them ran no attack, or they differ in their test images or threat.
    """
    sides = {"A": first, "B": second}
    for each in sides.values():
        if each.results["worst_case"] is None:
            raise UserError(f"{each.folder}: no attack ran; expected an evaluation with a suite")
    threats = [(each.results["threat"]["norm"], each.results["threat"]["eps"]) for each in sides.values()]
    if threats[0] != threats[1]:
        raise UserError(f"the threats are {threats[0]} and {threats[1]}; expected the same threat")
    for column in ("index", "digest"):  # the order is always that of one fixed permutation
        a, b = (each.outcome.clean.columns[column].tolist() for each in sides.values())
        if a != b:
            raise UserError(f"the test images differ ({len(a)} and {len(b)}); expected the same images")
    norm, eps = threats[0]
    return "\n".join(
        [
            *(f"{side}: {_name(each)}" for side, each in sides.items()),
            f"{norm} eps {eps:g}, n = {len(first.outcome.clean_correct)}",
            *_differing_attacks(first, second),
            *_paired("clean", first.outcome.clean_correct, second.outcome.clean_correct),
            *_paired("worst case", first.outcome.robust, second.outcome.robust),
        ]
    )


def _name(evaluation: Stored) -> str:
    run = evaluation.results["run"]
    return f"{run['name']}, seed {run['seed']}"


def _differing_attacks(first: Stored, second: Stored) -> list[str]:
    """A warning where the two were not attacked alike."""
    a, b = ({name: each.settings.get(name) for name in each.outcome.records} for each in (first, second))
    if a == b:
        return []
    lines = ["the attacks differ, and may explain a difference in the worst case:"]
    for side, each in (("A", first), ("B", second)):
        lines.append(f"  {side}, suite {each.results['run']['suite']}: {', '.join(each.outcome.records)}")
    if differing := sorted(name for name in a.keys() & b.keys() if a[name] != b[name]):
        lines.append(f"  same name, other settings: {', '.join(differing)}")
    return lines


def _paired(title: str, a: Bools, b: Bools) -> list[str]:
    """The two accuracies, and the test of their difference, from which images each gets right."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return [
        f"{title}: A {100 * a.mean():.1f}%, B {100 * b.mean():.1f}%",
        f"  only A correct: {only_a}, only B correct: {only_b}; {_mcnemar(only_a, only_b)}",
    ]


def _mcnemar(only_a: int, only_b: int) -> str:
    from scipy.stats import binomtest  # slow to import

    if only_a + only_b == 0:
        return "no image on which they differ"
    p = binomtest(only_a, only_a + only_b).pvalue
    found = "no significant difference" if p >= 0.05 else f"{'A' if only_a > only_b else 'B'} is better"
    return f"p = {p:.2g}, {found}"
