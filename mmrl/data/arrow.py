"""Import pyarrow, an extra, where it is needed."""

from typing import Any

from mmrl.errors import InputError


def arrow(purpose: str) -> tuple[Any, Any]:
    """Imports pyarrow and pyarrow.parquet.

    Args:
        purpose: starts the error message, e.g. "reading a.parquet".

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{purpose} needs pyarrow, which is not installed; run pip install 'mmrl-clip[search]'."
        ) from None
    return pyarrow, pyarrow.parquet
