"""Options of Hydra without a place here, or not installed: refused with a sentence before anything is made."""

import importlib.util
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from kwta_exp.errors import UserError

_REFUSED = {
    "hydra.run.dir": "the folder of a run is named by what is run; expected paths.outputs=FOLDER",
    "hydra.sweep.dir": "a grid's folder is OUTPUTS/sweeps/NAME; expected sweep=NAME or paths.outputs=FOLDER",
    "hydra.sweep.subdir": "the folder of a run is named by what is run; expected paths.outputs=FOLDER",
    "hydra.output_subdir": "config.yaml and overrides.yaml in the folder of a run say what .hydra/ would say",
    "hydra.job.chdir": "a run stays in the folder where it was started; its files go to paths.outputs",
}


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # there are no plugins at all
        return False


def refuse(arguments: Sequence[str]) -> None:
    """Refuse what Hydra knows and this program does in another way.

    Args:
        arguments: the command line, without the program's name.

    Raises:
        UserError: naming the option and what to do instead.
    """
    given, _ = get_args_parser().parse_known_args(list(arguments))
    if given.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={given.experimental_rerun}: a run leaves no pickled configuration, since to"
            " load one runs code; expected the command in the run's environment.json, or weights=RUN_FOLDER"
        )
    for override in given.overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if (key, value) == ("hydra/sweeper", "optuna") and not _is_installed("hydra_optuna_sweeper"):
            raise UserError(
                "hydra/sweeper=optuna: hydra-optuna-sweeper is not installed; expected it:"
                " pip install 'kwta_exp[optuna]', or in a checkout .venv/bin/pip install -e '.[optuna]'"
            )
        if key in _REFUSED and not (key == "hydra.job.chdir" and value.lower() in ("false", "null", "no")):
            raise UserError(f"{override}: {_REFUSED[key]}")
