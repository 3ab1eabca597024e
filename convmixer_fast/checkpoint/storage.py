"""Types that may stand beside the weights in a pickle, for PyTorch's weights-only loader.

Training scripts store numbers, dates, paths and settings next to the tensors. The loader refuses
every global it does not know. `SAFE_GLOBALS` makes these known:

* NumPy's arrays and scalars load as themselves, for arrays may be the weights.
* Containers load as a plain dict or list: weights may be in them.
* All else loads as `Inert`, whatever its arguments: its own constructor never runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


class Inert:
    """Stand-in for a value that nothing reads."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _dict(*default_factory: object) -> dict[Any, Any]:
    return {}


def _list(items: Iterable[Any] = (), maxlen: object = None) -> list[Any]:
    return list(items)


_NAMES = {
    "argparse": "Namespace",
    "builtins": "bool dict float frozenset int list object range slice str tuple",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "ipaddress": "IPv4Address IPv6Address",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "types": "SimpleNamespace",
    "uuid": "SafeUUID UUID",
    # NumPy's scalar types themselves, as in `dtype=np.float32`.
    "numpy": " ".join({"bool_", *(np.dtype(code).type.__name__ for code in np.typecodes["All"])}),
}


def _safe_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    found = [(Inert, f"{module}.{name}") for module in _NAMES for name in _NAMES[module].split()]
    # Python 3.13 pickles paths under the name of a private module.
    found += [(Inert, f"pathlib._local.{name}") for name in _NAMES["pathlib"].split()]
    found += [(_dict, "collections.defaultdict"), (_list, "collections.deque")]
    found += [(bytes, "builtins.bytes")]
    # A scalar and an array pickle as a call of these, under NumPy 1's name or NumPy 2's.
    for value in (np.zeros(1), np.float64(0)):
        function: Any = value.__reduce__()[0]
        for core in ("core", "_core"):
            found.append((function, f"numpy.{core}.multiarray.{function.__name__}"))
    found += [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    # The loader restores the state of an object whose class it knows: each dtype has its own.
    for kind in {type(np.dtype(code)) for code in np.typecodes["All"]}:
        found.append((kind, f"numpy.dtypes.{kind.__name__}"))
    return found


#: For `torch.serialization.safe_globals`.
SAFE_GLOBALS = _safe_globals()
