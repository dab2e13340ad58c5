"""What two grids of the same jobs must have in common: every result, apart from times and places."""

from pathlib import Path
from typing import Any

from kwta_exp.attempts import read as attempts_of
from kwta_exp.storage import read_json
from kwta_exp.sweeps import Sweep

_OF_A_MACHINE = {"command", "seconds", "files", "commit", "checksum"}
"""Keys of results.json that differ between two runs of the same thing: files hold seconds too."""


def outcomes(outputs: Path) -> dict[str, Any]:
    """The results of every run in ``outputs`` by its folder, without times and places."""
    return {
        str(path.parent.relative_to(outputs)): _plain(read_json(path))
        for path in sorted(outputs.glob("*/s*/results.json"))
    }


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items() if key not in _OF_A_MACHINE}
    return [_plain(each) for each in content] if isinstance(content, list) else content


def has_begun(outputs: Path) -> bool:
    """Whether there is a grid; Hydra makes its folder a moment before."""
    return any((outputs / "sweeps").glob("*/sweep.json"))


def the_grid(outputs: Path) -> Sweep:
    """The only grid of these outputs."""
    (path,) = (outputs / "sweeps").iterdir()
    return Sweep(path)


def attempts(outputs: Path, grid: Sweep) -> dict[int, list[dict[str, Any]]]:
    """The attempts at the run of each job."""
    return {job.number: attempts_of(outputs / job.folder) if job.folder else [] for job in grid.jobs()}
