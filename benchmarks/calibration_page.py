"""The page and the thresholds of the calibration, from its record."""

from collections.abc import Mapping, Sequence
from typing import Any

from kwta_exp.evaluation.checks import CHECKS

N = 100
"""Images judged."""

AIM = 0.95
"""The share of right verdicts to reach."""

WITHIN = 0.02
"""How far above its floor a worst case may be."""

TITLES = {"setting": "first (thresholds)", "trying": "second (trial)"}

LEAST = {
    "gain_over_plain_pgd": 0.05, "single_step_finds_more": 0.02, "black_box_finds_more": 0.02,
    "robust_at_large_eps": 0.05, "gradients_are_zero": 0.05, "gradients_are_not_finite": 0.0,
    "change_unseen_by_gradients": 0.2, "last_is_not_best": 0.1, "still_rising": 0.1,
    "outputs_are_probabilities": 0.5, "outputs_are_random": 0.0, "random_search_finds_more": 0.0,
    "repeating_finds_more": 0.01, "binarization_missed_by_pgd": 0.05, "binarization_missed": 0.05,
    "operators_block_gradients": 0.0, "parts_not_covered": 0.0,
}  # fmt: skip
"""The least that each threshold may be."""


def wrong(found: Mapping[str, Any]) -> str | None:
    """The kind of error, if the verdict is one."""
    must, verdict = found["must"], found["verdict"]
    if must == "sound" and verdict != "sound":
        return "false alarm"
    if must in ("masked", "not sound") and verdict == "sound":
        return "false trust"
    return "not called masked" if must == "masked" and verdict != "masked" else None


def thresholds(honest: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Twice the largest value of an honest network, but at least the value in :data:`LEAST`."""
    return {
        check: max(least, 2 * max(found["compared"].get(check, 0.0) for found in honest))
        for check, least in LEAST.items()
    }


def page(record: Mapping[str, Any]) -> str:
    """``docs/calibration.md``; a record without floors has no section about them."""
    introduction = (
        "Made by `python -m benchmarks.calibration` ([source](../benchmarks/calibration.py)), from"
        " [the record](calibration.json). Thresholds come from the first set of networks, by one rule:"
        " twice the largest value that any honest network there has, but at least a value that is given. The"
        " second set, of other architectures and data, had no part in them. `must` is the verdict a network has"
        " to get because of how it was made ([all of them](../benchmarks/calibration_networks.py)). One that"
        " breaks its gradient, such as k-WTA or a disguise, must be called masked where plain PGD leaves ten"
        " points more than the worst case or the floor. Where it leaves less, a disguise without a useful"
        " gradient must not be called sound, and of the others nobody knows: `must` is blank. A network that"
        f" answers at random must not be called sound. Each was judged on {N} images, L-inf."
    )
    parts = [["# How the verdict was calibrated", "", introduction], _errors(record), _floors(record)]
    parts += [_thresholds(record), _set(record, "setting", "The first set: digits")]
    parts += [_set(record, "trying", "The second set: FashionMNIST")]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _errors(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Errors",
        "",
        "| set | networks | honest | false alarms | masked or random | false trust | not called masked |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, title in TITLES.items():
        known = [found for found in record[key] if found["must"]]
        good = sum(found["must"] == "sound" for found in known)
        kinds = [wrong(found) for found in known]
        lines.append(
            f"| {title} | {len(record[key])} | {good} | {kinds.count('false alarm')} | {len(known) - good} |"
            f" {kinds.count('false trust')} | {kinds.count('not called masked')} |"
        )
    return [*lines, "", _right(record)]


def _right(record: Mapping[str, Any]) -> str:
    """One line: how many verdicts are right, and whether that is enough."""
    both = [*record["setting"], *record["trying"]]
    shares = {"of all networks": both, "of the second set": record["trying"]}
    kinds = {name: [wrong(found) for found in of if found["must"]] for name, of in shares.items()}
    text = ", ".join(
        f"{of.count(None)} of {len(of)} {name} ({of.count(None) / len(of):.1%})" for name, of in kinds.items()
    )
    trusted = sum(wrong(found) == "false trust" for found in both)
    met = not trusted and all(of.count(None) >= AIM * len(of) for of in kinds.values())
    left = sum(map(len, record.get("missing", {}).values()))
    aim = f"open: {left} networks are not measured yet" if met and left else "reached" if met else "not reached"
    return (
        f"Right verdicts, where it is known what is right: {text}. Masked or random networks called sound:"
        f" {trusted}. The aim, {AIM:.0%} of both and no such network called sound, is {aim}."
    )


def _floors(record: Mapping[str, Any]) -> list[str]:
    floors = {
        key: [found for found in record[key] if found.get("floor") is not None] for key in ("setting", "trying")
    }
    number = sum(map(len, floors.values()))
    if not number:
        return []
    reached = sum(found["within"] for of_set in floors.values() for found in of_set)
    lines = [
        "## Known floors",
        "",
        f"On {reached} of {number} networks with a known floor, the worst case is within"
        f" {100 * WITHIN:.0f} points of it. They have the weights of an honest network, in a disguise that"
        " changes the answers little or not at all: the floor is the honest network's own worst case. It is"
        " exact where the disguise comes after the logits, and off by a point or two where images are rounded,"
        " which moves the edge of the ball.",
        "",
        "| network | set | plain PGD | worst case | floor | within |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for key, of_set in floors.items():
        for found in of_set:
            figures = " | ".join(f"{100 * found[name]:.0f}" for name in ("pgd", "worst_case", "floor"))
            within = "yes" if found["within"] else "NO"
            lines.append(f"| {found['name']} | {TITLES[key].split()[0]} | {figures} | {within} |")
    return lines


def _thresholds(record: Mapping[str, Any]) -> list[str]:
    honest = [found for found in record["setting"] if found["must"] == "sound"]
    lying = [found for found in record["setting"] if found["must"] not in ("sound", None)]
    rule, both = thresholds(honest), record["setting"] + record["trying"]
    lines = [
        "## Thresholds",
        "",
        "| check | honest networks: largest | the others: smallest, largest | threshold | flags raised by |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for check in CHECKS:
        if not any(check in found["compared"] for found in both):
            lines.append(f"| {check} | not measured | | {rule[check]:g} | |")
            continue
        values = [found["compared"][check] for found in lying if check in found["compared"]]
        top = max(found["compared"].get(check, 0.0) for found in honest)
        raised = sum(check in found["flags"] for found in both)
        lines.append(
            f"| {check} | {top:.3f} | {min(values, default=0):.3f}, {max(values, default=0):.3f} |"
            f" {rule[check]:g} | {raised} |"
        )
    return lines


def _set(record: Mapping[str, Any], key: str, title: str) -> list[str]:
    lines = [
        f"## {title}",
        "",
        "| network | eps | clean | pgd | worst case | binarized: pgd, all | must | verdict | flags |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for found in record[key]:
        rates = found["binarization"].get("success_rates", {})
        test = "not made"
        if rates:
            test = f"{100 * rates.get('pgd', 0):.0f}, {100 * sum(rates.values()):.0f}"
        figures = " | ".join(f"{100 * found[name]:.0f}" for name in ("clean", "pgd", "worst_case"))
        error = f" ({kind})" if (kind := wrong(found)) else ""
        lines.append(
            f"| {found['name']} | {found['eps']:g} | {figures} | {test} | {found['must'] or ''} |"
            f" {found['verdict']}{error} | {', '.join(found['flags'])} |"
        )
    if missing := record.get("missing", {}).get(key):
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    return lines
