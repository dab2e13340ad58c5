"""All that is cheap to build, built and tried before anything is written."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from kwta_exp.attacks import Attack, NotApplicableError, Threat, Transfer, as_attack
from kwta_exp.attacks.threat import check_radius
from kwta_exp.checkpoint import Weights, load_into, read_weights, require_fit
from kwta_exp.config import Config, build, call, explain, plain
from kwta_exp.data.base import Images
from kwta_exp.data.batches import to_float
from kwta_exp.errors import UserError
from kwta_exp.models.factory import with_facts
from kwta_exp.naming import safe_names
from kwta_exp.plan import Plan, source_network
from kwta_exp.randomness import key
from kwta_exp.storage import trained_ratio
from kwta_exp.training import Training
from kwta_exp.training.sparsity import Sparsity, scheduled, set_ratio
from kwta_exp.trust import TRUSTED, targets


@dataclass(frozen=True)
class Parts:
    """What a run is made of; the training's four are ``None`` where nothing is trained."""

    training: Training | None
    sparsity: Sparsity | None
    optimizer: Callable[..., Any] | None
    lr_schedule: Callable[..., Any] | None
    threat: Threat
    suite: dict[str, Attack]
    images: Images
    network: nn.Module


def build_parts(plan: Plan) -> Parts:
    """Build everything that ``plan`` names.

    Raises:
        UserError: naming the key and value at fault.
    """
    cfg = plan.cfg
    call(cfg, "activation", build(cfg, "activation"))  # so that its errors name it, not the model

    threat = build(cfg, "threat", Threat)
    suite = built_suite(cfg, threat)
    training = build(cfg, "training", Training) if plan.trains else None
    inner = [name for name in ("attack", "probe") if hasattr(training, name)]
    if training is not None and inner:
        usable = {name: _as_attack(cfg, f"training.{name}", getattr(training, name), threat) for name in inner}
        training = replace(training, **usable)
    images = plan.dataset.load()
    radii = {"threat": threat, **{f"attack.{name}": attack for name, attack in suite.items()}}
    radii |= {f"training.{name}": getattr(training, name) for name in inner}
    for at, part in {**radii, "training": training}.items():
        _check_radius(at, part, images)
    network = planned_network(plan, images)
    attacks = {f"attack.{name}": attack for name, attack in suite.items()}
    for name in inner:
        attacks[f"training.{name}"] = getattr(training, name)
        _require(f"training.{name}", getattr(training, name), network)
    for at, attack in attacks.items():
        if isinstance(attack, Transfer):
            attack.connect(_source_of(at, attack, plan, images, network))

    optimizer = lr_schedule = sparsity = None
    if training is not None:
        sparsity = build(cfg, "sparsity", Sparsity)
        if sparsity.ratio(0, training.epochs) is not None and not scheduled(network):
            raise UserError(
                f"sparsity={plan.chosen['sparsity']}: the network has no k-WTA layer with a ratio to schedule;"
                " expected activation=kwta, or sparsity=constant"
            )
        final, reached = getattr(sparsity, "final", None), sparsity.ratio(training.epochs - 1, training.epochs)
        if final is not None and abs(final - reached) > 1e-9 and plan.scale == "full":
            raise UserError(
                f"sparsity.final={final:g}: is not reached, the last of {training.epochs} epochs has"
                f" {reached:g}; expected more epochs, larger steps or another final ratio"
            )
        optimizer, lr_schedule = build(cfg, "optimizer"), build(cfg, "lr_schedule")
        trial = call(cfg, "optimizer", optimizer, [torch.nn.Parameter(torch.zeros(1))])
        _require_kind("optimizer", trial, torch.optim.Optimizer)
        trial_schedule = call(cfg, "lr_schedule", lr_schedule, trial)
        _require_kind("lr_schedule", trial_schedule, torch.optim.lr_scheduler.LRScheduler)
        call(cfg, "optimizer", trial.step)
        call(cfg, "lr_schedule", trial_schedule.step)  # some look at their settings only now

    return Parts(training, sparsity, optimizer, lr_schedule, threat, suite, images, network)


def built_suite(cfg: Config, threat: Threat) -> dict[str, Attack]:
    """The attacks of the chosen suite, in its order.

    Raises:
        UserError: naming the key and value at fault.
    """
    if "_target_" in cfg.attack:
        raise UserError(f"attack: {cfg.attack._target_} has no name; expected +attack@attack.NAME=OPTION")
    suite = {name: build(cfg, f"attack.{name}") for name in safe_names(cfg.attack)}
    for name, attack in suite.items():
        suite[name] = _as_attack(cfg, f"attack.{name}", attack, threat)
    return suite


def _require_kind(at: str, made: Any, kind: type) -> None:
    if not isinstance(made, kind):
        raise UserError(f"{at}: makes a {type(made).__name__}; expected a {kind.__module__}.{kind.__name__}")


def _check_radius(at: str, part: Any, images: Images) -> None:
    """A radius beyond every image is one in other units."""
    norm, eps = getattr(part, "norm", None), getattr(part, "eps", None)
    if norm in ("linf", "l2") and isinstance(eps, int | float):
        try:
            check_radius(norm, eps, images.x_train.shape[1:])
        except ValueError as error:
            raise UserError(f"{at}.eps={eps:g}: {error}") from error


def _as_attack(cfg: Config, at: str, attack: Any, threat: Threat) -> Attack:
    """What the configuration built at ``at``, fit to be called as an attack of this project."""
    if isinstance(attack, partial) and isinstance(attack.func, type):
        raise UserError(f"{at}._partial_=True: makes a class that is not built; expected false")
    usable: Attack = call(cfg, at, as_attack, attack, threat)
    if isinstance(usable, Transfer):
        usable.attack = _as_attack(cfg, f"{at}.attack", usable.attack, threat)
    return usable


def _require(at: str, attack: Any, network: nn.Module) -> None:
    """An attack that training rests on must have a hold on the network."""
    try:
        attack.check_applicable(network)
    except NotApplicableError as error:
        raise UserError(f"{at}: {type(attack).__name__} cannot attack this network: {error}") from error


def _source_of(at: str, attack: Transfer, plan: Plan, images: Images, network: nn.Module) -> nn.Module:
    """The network that a transferred attack is made on."""
    if attack.source is None:
        if plan.scale == "full":
            raise UserError(f"{at}.source=null: expected the run folder of a network to attack")
        return copy.deepcopy(network)  # to try the command out
    return network_of_run(attack.source, f"{at}.source", images, plan.options.trust)


def planned_network(plan: Plan, images: Images) -> nn.Module:
    """The network that ``plan`` names, for data like ``images``, with its initial weights if it names any.

    Raises:
        UserError: naming the key and value at fault.
    """
    weights = read_weights(plan.weights) if plan.weights else None
    with torch.random.fork_rng(devices=[]):
        if weights is not None:
            _require_fit(plan.cfg, images, weights, str(plan.weights))
        torch.manual_seed(key(plan.options.seed, "weights"))
        network = _built_network(plan.cfg, images)
    if weights is not None:
        load_into(network, weights, str(plan.weights))
    _try_out(network, plan.cfg, images)
    return network


def network_of_run(run: str, key: str, images: Images, trust: bool) -> nn.Module:
    """The trained network of a run folder, for data like ``images``.

    Raises:
        UserError: naming ``key``, if there is none or it is not safe to build.
    """
    path, cfg = source_network(run, key, trust)
    weights = read_weights(path)
    _require_fit(cfg, images, weights, str(path))
    network = _built_network(cfg, images)
    load_into(network, weights, str(path))
    if (ratio := trained_ratio(path)) and scheduled(network):
        set_ratio(network, ratio)
    return network


def _require_fit(cfg: Config, images: Images, weights: Weights, source: str) -> None:
    """Refuse, before any memory is taken, a network of other sizes than its weights.

    A run folder can name a network of any size. This project's networks are built without values first, and
    never further than the weights go; a user's own is built at once, since it may need values.
    """
    named = [*targets(plain(cfg, "model")), *targets(plain(cfg, "activation"))]
    if not TRUSTED.issuperset(named):
        return
    with torch.device("meta"), _at_most(_SPARE + 2 * len(weights), source):
        shape = _built_network(cfg, images)
    require_fit(shape, weights, source)


_SPARE = 1000
"""Parameters that a network may make and replace while it is built, beside twice those that it keeps."""


@contextmanager
def _at_most(parameters: int, source: str) -> Iterator[None]:
    """Stop what makes more parameters, such as a network of a billion layers."""
    made = itertools.count(1)

    def count(*anything: Any) -> None:
        if next(made) > parameters:
            raise UserError(
                f"weights={source}: do not fit the model, which has more than {parameters} parameters"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _built_network(cfg: Config, images: Images) -> nn.Module:
    factory = build(cfg, "model")
    network: nn.Module = call(cfg, "model", factory, **with_facts(factory, _facts(images)))
    _require_kind("model", network, nn.Module)
    return network


def _facts(images: Images) -> dict[str, Any]:
    """What a network may ask of the data."""
    return {
        "num_classes": images.num_classes,
        "in_channels": images.in_channels,
        "image_size": images.image_size,
    }


def _try_out(network: nn.Module, cfg: Config, images: Images) -> None:
    """Send two images through the network: its layers must fit each other, the data and the classes."""
    network.eval()
    try:
        with torch.no_grad():
            logits = network(to_float(torch.as_tensor(images.x_train[:2])))
    except (RuntimeError, ValueError, TypeError) as error:
        named = [name for name in plain(cfg, "activation") if f"{name}=" in str(error)]
        where = "activation" if named else "model"
        raise UserError(explain(error, cfg, where)) from error
    expected = (len(images.x_train[:2]), images.num_classes)
    if tuple(logits.shape) != expected:
        raise UserError(f"model: returns {tuple(logits.shape)} for two images; expected logits {expected}")
