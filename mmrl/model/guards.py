"""Guards of calls into open_clip and transformers: quiet logs, no code of folders, no network, one kind of error."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrl.errors import InputError


@contextmanager
def quiet() -> Iterator[None]:
    """Silences logs below errors: open_clip logs each step of a build, and warns of random weights even where they are
    wanted."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


@contextmanager
def library_code_only() -> Iterator[None]:
    """Makes transformers refuse Python files of a model's folder or hub repository, instead of asking on the terminal
    whether to run them."""
    from transformers import dynamic_module_utils

    seconds, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Makes InputError of a panic of Rust code, which is no Exception: tokenizers panics at a regular expression that
    takes too long."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(f"the tokenizer cannot read these texts ({' '.join(str(error).split())}).") from None


@contextmanager
def damage_as_errors(folder: Path) -> Iterator[None]:
    """Makes InputError of what reading a damaged model folder raises: transformers and torch raise many kinds."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{folder} is damaged, or holds another kind of model ({shortened(error)}); save the model again."
        ) from error


def shortened(error: Exception) -> str:
    """The kind and the beginning of an error's text: those of weights that do not fit list every parameter."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 400 else f"{text[:400]} …"


@contextmanager
def offline() -> Iterator[None]:
    """Stops requests to the Hugging Face hub; its local cache is still read. For names that come from a stored file
    and not from the user."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
