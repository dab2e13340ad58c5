"""Builds the parts of a run, and tries each, before anything is written."""

import copy
import itertools
import logging
from collections.abc import Iterator
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
from kwta_exp.failures import is_of_the_machine
from kwta_exp.models.factory import with_facts
from kwta_exp.naming import safe_names
from kwta_exp.plan import Plan, source_network
from kwta_exp.randomness import isolated, key
from kwta_exp.training import Training
from kwta_exp.training.sparsity import Sparsity, layers_with_ratio
from kwta_exp.training.trainer import Recipe
from kwta_exp.trust import TRUSTED, targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a run is made of; ``recipe`` is ``None`` where nothing is trained."""

    images: Images
    network: nn.Module
    threat: Threat
    suite: dict[str, Attack]
    recipe: Recipe | None


def build_parts(plan: Plan) -> Parts:
    """Build everything that ``plan`` names.

    Raises:
        UserError: naming the key and its value.
    """
    cfg = plan.cfg
    call(cfg, "activation", build(cfg, "activation"))  # first, so that an error names it and not the model

    threat = build(cfg, "threat", Threat)
    suite = built_suite(cfg, threat)
    method = _built_method(cfg, threat) if plan.trains else None
    inner = {f"training.{name}": getattr(method, name) for name in _inner_attacks(method)}
    attacks = {f"attack.{name}": attack for name, attack in suite.items()} | inner

    images = plan.dataset.load()
    for at, part in {"threat": threat, **attacks, "training": method}.items():
        _check_radius(at, part, images)
    network = planned_network(plan, images)
    for at, attack in inner.items():
        _require(at, attack, network, images)
    for at, attack in attacks.items():
        if isinstance(attack, Transfer):
            attack.connect(_source_of(at, attack, plan, images, network))

    recipe = _built_recipe(plan, method, network) if method else None
    return Parts(images, network, threat, suite, recipe)


def _built_method(cfg: Config, threat: Threat) -> Training:
    """The training method, with its attacks adapted to this project's interface."""
    method: Training = build(cfg, "training", Training)
    for name in _inner_attacks(method):
        attack: Any = _as_attack(cfg, f"training.{name}", getattr(method, name), threat)
        method = replace(method, **{name: attack})
    return method


def _inner_attacks(method: Training | None) -> list[str]:
    """The names of the attributes of ``method`` that are attacks."""
    return [name for name in ("attack", "probe") if hasattr(method, name)]


def _built_recipe(plan: Plan, method: Training, network: nn.Module) -> Recipe:
    """The recipe of a training, each part tried once: a bad value fails here and not after an epoch."""
    cfg = plan.cfg
    sparsity = build(cfg, "sparsity", Sparsity)
    if sparsity.ratio(0, method.epochs) is not None and not layers_with_ratio(network):
        raise UserError(
            f"sparsity={plan.chosen['sparsity']}: the network has no k-WTA layer with a ratio to schedule;"
            " expected activation=kwta, or sparsity=constant"
        )
    final, reached = getattr(sparsity, "final", None), sparsity.ratio(method.epochs - 1, method.epochs)
    if final is not None and abs(final - reached) > 1e-9 and plan.scale == "full":
        raise UserError(
            f"sparsity.final={final:g}: is not reached, the last of {method.epochs} epochs has"
            f" {reached:g}; expected more epochs, larger steps or another final ratio"
        )

    optimizer, lr_schedule = build(cfg, "optimizer"), build(cfg, "lr_schedule")
    trial_optimizer = call(cfg, "optimizer", optimizer, [torch.nn.Parameter(torch.zeros(1))])
    _require_kind("optimizer", trial_optimizer, torch.optim.Optimizer)
    trial_schedule = call(cfg, "lr_schedule", lr_schedule, trial_optimizer)
    _require_kind("lr_schedule", trial_schedule, torch.optim.lr_scheduler.LRScheduler)
    call(cfg, "optimizer", trial_optimizer.step)
    call(cfg, "lr_schedule", trial_schedule.step)  # some check their arguments only in step()
    return Recipe(method, optimizer, lr_schedule, sparsity)


def built_suite(cfg: Config, threat: Threat) -> dict[str, Attack]:
    """The attacks of the chosen suite, in its order.

    Raises:
        UserError: naming the key and its value.
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
    """Raise if a radius is larger than any image: it is in other units."""
    norm, eps = getattr(part, "norm", None), getattr(part, "eps", None)
    if norm in ("linf", "l2") and isinstance(eps, int | float):
        try:
            check_radius(norm, eps, images.x_train.shape[1:])
        except ValueError as error:
            raise UserError(f"{at}.eps={eps:g}: {error}") from error


def _as_attack(cfg: Config, at: str, attack: Any, threat: Threat) -> Attack:
    """The object that the configuration built at ``at``, as an attack of this project."""
    if isinstance(attack, partial) and isinstance(attack.func, type):
        raise UserError(f"{at}._partial_=True: makes a class and no attack; expected false")
    usable: Attack = call(cfg, at, as_attack, attack, threat)
    if isinstance(usable, Transfer):
        usable.attack = _as_attack(cfg, f"{at}.attack", usable.attack, threat)
    return usable


def _require(at: str, attack: Attack, network: nn.Module, images: Images) -> None:
    """Raise if an attack that training uses does not apply to the network."""
    device = next(network.parameters(), torch.empty(0)).device
    try:
        with isolated(0):
            attack.check_applicable(network, torch.rand(2, *images.x_train.shape[1:], device=device))
    except NotApplicableError as error:
        raise UserError(f"{at}: {type(attack).__name__} cannot attack this network: {error}") from error


def _source_of(at: str, attack: Transfer, plan: Plan, images: Images, network: nn.Module) -> nn.Module:
    """The source network of a transfer attack."""
    if attack.source is None:
        if plan.scale == "full":
            raise UserError(f"{at}.source=null: expected the run folder of a network to attack")
        return copy.deepcopy(network)  # only to try the command
    return network_of_run(attack.source, f"{at}.source", images, plan.options.trust)


def planned_network(plan: Plan, images: Images) -> nn.Module:
    """The network that ``plan`` names, for data like ``images``, with its initial weights if it names any.

    Its sparsity ratios are those of the configuration, whatever the weights were trained at.

    Raises:
        UserError: naming the key and its value.
    """
    weights = read_weights(plan.weights) if plan.weights else None
    with torch.random.fork_rng(devices=[]):
        if weights is not None:
            _require_fit(plan.cfg, images, weights, str(plan.weights))
        torch.manual_seed(key(plan.options.seed, "weights"))
        network = _built_network(plan.cfg, images)
    if weights is not None:
        _load_keeping_ratios(network, weights, str(plan.weights))
    _try_out(network, plan.cfg, images)
    return network


def _load_keeping_ratios(network: nn.Module, weights: Weights, source: str) -> None:
    """Load ``weights`` into ``network``, but keep the ratios of its k-WTA layers."""
    configured = {layer: layer.ratio for layer in layers_with_ratio(network)}
    load_into(network, weights, source)
    for here, trained in dict.fromkeys((ratio, layer.ratio) for layer, ratio in configured.items()):
        if here != trained:
            log.warning("weights=%s: trained at sparsity ratio %g; %g is used here", source, trained, here)
    for layer, ratio in configured.items():
        layer.ratio = ratio


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
    return network


def _require_fit(cfg: Config, images: Images, weights: Weights, source: str) -> None:
    """Raise, before any memory is allocated, if the network does not have the sizes of its weights.

    A run folder can name a network of any size. This project's networks are first built on the meta device,
    with a limit on their parameters; a user's own is built at once, since it may need values.
    """
    named = [*targets(plain(cfg, "model")), *targets(plain(cfg, "activation"))]
    if not TRUSTED.issuperset(named):
        return
    with torch.device("meta"), _at_most(_SPARE + 2 * len(weights), source):
        shape = _built_network(cfg, images)
    require_fit(shape, weights, source)


_SPARE = 1000
"""Parameters that a network may create and replace while it is built, in addition to twice those it keeps."""


@contextmanager
def _at_most(parameters: int, source: str) -> Iterator[None]:
    """Raise once more parameters are created, as by a network of a billion layers."""
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
    network: nn.Module = call(cfg, "model", factory, **with_facts(factory, _data_arguments(images)))
    _require_kind("model", network, nn.Module)
    return network


def _data_arguments(images: Images) -> dict[str, Any]:
    """The arguments of a network that depend on the data."""
    return {
        "num_classes": images.num_classes,
        "in_channels": images.in_channels,
        "image_size": images.image_size,
    }


def _try_out(network: nn.Module, cfg: Config, images: Images) -> None:
    """Raise unless two images go through the network and give logits."""
    network.eval()
    try:
        with torch.no_grad():
            logits = network(to_float(torch.as_tensor(images.x_train[:2])))
    except (RuntimeError, ValueError, TypeError) as error:
        if is_of_the_machine(error):
            raise
        named = [name for name in plain(cfg, "activation") if f"{name}=" in str(error)]
        where = "activation" if named else "model"
        raise UserError(explain(error, cfg, where)) from error
    expected = (len(images.x_train[:2]), images.num_classes)
    if tuple(logits.shape) != expected:
        raise UserError(f"model: returns {tuple(logits.shape)} for two images; expected logits {expected}")
