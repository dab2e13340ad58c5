"""Named types of the numbers that users write, validated when an object is made.

Pydantic dataclasses and ``validate_call`` use them, so the same rules hold for YAML and Python. Numbers are
strict: ``true`` is not 1.0 and ``"3"`` is not 3.
"""

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

_FRACTION = re.compile(r"\s*([\d.]+)\s*/\s*([\d.]+)\s*")


def fraction(value: object) -> object:
    """``"8/255"`` as a number; any other value unchanged."""
    if isinstance(value, str) and (written := _FRACTION.fullmatch(value)):
        try:
            return float(Fraction(written[1]) / Fraction(written[2]))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


Ratio = Annotated[float, Field(gt=0, le=1)]
"""The sparsity ratio of a k-WTA layer, in (0, 1]."""

Eps = Annotated[float, BeforeValidator(fraction), Field(ge=0)]
"""A perturbation radius or step size, for pixels in [0, 1]; ``"8/255"`` is accepted."""

Share = Annotated[float, Field(gt=0, lt=1)]
"""A share in (0, 1)."""

Rate = Annotated[float, Field(ge=0, lt=1)]
"""A share in [0, 1)."""

AtLeastTwo = Annotated[int, Field(ge=2)]
"""An integer >= 2."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256, in hex."""

Norm = Literal["linf", "l2"]
"""The norm of a perturbation."""

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,99}$")]
"""The name of one folder: letters, digits and ``_ . + -`` (not ``.`` or ``-`` first), 100 at most."""
