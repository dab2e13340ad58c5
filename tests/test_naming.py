"""Names that become file names: nothing is written outside its folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kwta_exp.attacks import CallableAttack, NotApplicableError, Threat
from kwta_exp.config import ConfigError
from kwta_exp.data.batches import Split
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Evaluation
from kwta_exp.evaluation.stored import Stored
from kwta_exp.experiment import run
from kwta_exp.naming import LONGEST, as_name, in_few_digits, safe_name, safe_names
from kwta_exp.run_folder import RunFolder, readable
from kwta_exp.storage import write_json
from tests.stored import evaluation

CANNOT = [
    "", "../x", "../../etc/x", "/etc/x", "a/b", "a\\b", "C:\\x", "a\0b", "a\nb", "a\n", "a\tb", "\x1b[31mred",
    ".", "..", ".hidden", "-rf", "a b", "a:b", "a*", "\u00e9", "\u0430", "\u202egnp", "\ud800",
    "a" * (LONGEST + 1), "$(id)", "${seed}",
]  # fmt: skip

TAKEN = [
    "clean",
    "Clean",
    "CLEAN",
    "repeated",
    "images",
    "Results",
    "evaluation",
    "binarized-0123456789",
    "Binarized-x",
]


@pytest.mark.parametrize("name", CANNOT, ids=ascii)
def test_unsafe_name_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=r"^attack: name .* cannot name a file; expected letters, digits"
    ) as caught:
        safe_name(name)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", TAKEN)
def test_reserved_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^attack: name '{name}' is reserved"):
        safe_name(name)


@pytest.mark.parametrize("name", [3, 1.5, True, None, ("a", "b"), b"pgd"], ids=repr)
def test_name_that_is_not_a_string_is_refused(name: object) -> None:
    with pytest.raises(UserError, match=r"^attack: name .* is a \w+; expected a string"):
        safe_name(name)


@pytest.mark.parametrize(
    "name", ["pgd", "pgd-20", "PGD_l2+0.5", "3", "_x", "+x", "a" * LONGEST, "binarized", "cleaned"]
)
def test_safe_name_is_unchanged(name: str) -> None:
    assert safe_name(name) == name


def test_names_that_differ_only_in_case_are_refused() -> None:
    assert safe_names(["pgd", "fgsm"]) == ["pgd", "fgsm"]
    with pytest.raises(UserError, match="attack: names pgd and PGD differ only in case"):
        safe_names(["pgd", "fgsm", "PGD"])


@pytest.mark.parametrize("text", [*CANNOT, *TAKEN, "x" * 5000], ids=lambda text: ascii(text)[:40])
def test_as_name_gives_one_safe_path_component(text: str) -> None:
    made = as_name(text)
    assert Path("folder", f"0-{made}").parent == Path("folder")
    assert made.isascii()
    assert made.isprintable()
    assert len(made) <= LONGEST
    assert not made.startswith((".", "-"))


ATTACK = "{_target_: foolbox.attacks.LinfPGD, steps: 1}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"+attack={{3: {ATTACK}}}", "attack: name 3 is a int"),
        (f"+attack={{true: {ATTACK}}}", "attack: name True is a bool"),
        (f"+attack.clean={ATTACK}", "attack: name 'clean' is reserved"),
        (f"+attack.PGD={ATTACK}", "attack: names pgd and PGD differ only in case"),
        (f"+attack={{../../outside: {ATTACK}}}", r"attack: name '\.\./\.\./outside' cannot name a file"),
        (f"+attack={{/tmp/outside: {ATTACK}}}", "attack: name '/tmp/outside' cannot name a file"),
        (f"+attack={{.hidden: {ATTACK}}}", r"attack: name '\.hidden' cannot name a file"),
    ],
)
def test_unsafe_attack_name_gives_one_message_and_writes_no_file(
    override: str, message: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    cfg = composed(f"paths.outputs={tmp_path / 'out'}", "runtime=cpu", "runtime.threads=1", override)
    HydraConfig.instance().set_config(cfg)
    with pytest.raises(ConfigError, match=f"^{message}"):
        run(cfg)
    assert list(tmp_path.iterdir()) == []


def test_readable_gives_one_short_path_component() -> None:
    for text in (*CANNOT, "x" * 5000):
        assert Path("outputs", f"digits-{readable(text)}").parent == Path("outputs")
        assert len(readable(text)) <= 48


@pytest.mark.parametrize("outputs", ["a" * 300, "a\0b"], ids=ascii)
def test_impossible_outputs_path_gives_one_message(outputs: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^paths\.outputs=.*: no folder can be made there"):
        RunFolder.of(tmp_path / outputs, "digits-cnn", 0, {})


THREAT = Threat(norm="linf", eps=0.1)


def images(n: int) -> Split:
    x = torch.arange(n * 48, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(n, 3, 4, 4)
    return Split(x, torch.zeros(n, dtype=torch.int64), torch.arange(n))


class AlwaysFirst(torch.nn.Module):
    """Every image is of class 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.sum((1, 2, 3)) * 0 + 1, x.sum((1, 2, 3)) * 0], 1)


def test_evaluate_refuses_an_unsafe_attack_name(tmp_path: Path) -> None:
    attack = CallableAttack(lambda model, x, y, keys: x, THREAT)
    folder = tmp_path / "evaluation"
    with pytest.raises(UserError, match=r"attack: name '\.\./x'"):
        Evaluation(AlwaysFirst(), images(4), {"../x": attack}, THREAT, folder, batch_size=2).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "clean", "\x1b[31m"], ids=ascii)
def test_attack_name_in_results_cannot_lead_outside_the_folder(name: str, tmp_path: Path) -> None:
    results = evaluation(tmp_path, "quick-a", [True, True, False], {"pgd": [0]})
    results["attacks"] = {name: results["attacks"]["pgd"]}
    for folder in (tmp_path, tmp_path / "evaluation" / "quick-a"):
        write_json(folder / "results.json", results)
    with pytest.raises(UserError, match=r"(results\.json|clean\.npz): damaged"):
        Stored.read(tmp_path)


def test_an_inapplicable_attack_does_not_remove_images_of_others(tmp_path: Path) -> None:
    def aside(model: object, x: torch.Tensor, y: object, keys: object) -> torch.Tensor:
        raise NotApplicableError("not here")

    suite = {
        "pgd-2": CallableAttack(lambda model, x, y, keys: x, THREAT), "pgd": CallableAttack(aside, THREAT)
    }  # fmt: skip
    evaluation = Evaluation(AlwaysFirst(), images(4), suite, THREAT, tmp_path, batch_size=2, save_images=True)
    outcome = evaluation.run()
    assert (list(outcome.records), list(outcome.inapplicable)) == (["pgd-2"], ["pgd"])
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"pgd-2-0.npz", "pgd-2-2.npz"}


def test_a_number_in_a_name_has_few_digits() -> None:
    shown = {0.1: "0.1", 0.05: "0.05", 0.123456: "0.123456", 3: "3", 1e-05: "1e-05"}
    assert {number: in_few_digits(number) for number in shown} == shown
    assert [in_few_digits(each) for each in (0.12345678901234567, 1 / 3)] == ["0.123457", "0.333333"]
