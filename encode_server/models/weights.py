"""Encoder-only loading: the tensors a family asks for, read lazily, by transformers' own loading and key conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import Checkpoint, stored_tensors, weight_files


@contextmanager
def selected_tensors(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """Safetensors slices of the encoder, by the name to load each by.

    A slice reads its bytes when transformers indexes it; tensors that are not selected are never touched, and a
    shard without selected tensors is not opened. Valid inside the block.

    Raises:
        StartupError: a shard is unreadable, or holds nothing that is wanted anywhere.
    """
    from safetensors import SafetensorError, safe_open

    selected: dict[str, Any] = {}
    with ExitStack() as opened:
        stored = {file: list(stored_tensors(file)) for file in weight_files(checkpoint)}
        names = checkpoint.encoder_keys([key for keys in stored.values() for key in keys])
        for file, keys in stored.items():
            wanted = {key: names[key] for key in keys if key in names}
            if not wanted:
                continue
            try:
                shard = opened.enter_context(safe_open(file, framework="pt", device="cpu"))
                selected.update({name: shard.get_slice(key) for key, name in wanted.items()})
            except (OSError, RuntimeError, SafetensorError) as error:
                raise StartupError(
                    f"model {checkpoint.name!r}: {file.name} is not readable: {first_line(error)}"
                ) from error
        if not selected:
            raise StartupError(f"model {checkpoint.name!r}: its safetensors hold no encoder weights")
        yield selected


def load_model(
    model_class: Any,
    config: Any,
    checkpoint: Checkpoint,
    *,
    required: Callable[[str], bool],
    dtype: torch.dtype,
) -> nn.Module:
    """An evaluation-mode model on the CPU whose `required` parameters all come from the checkpoint.

    Others (what is left of a language model of no layers) keep whatever transformers initialises them to.

    Raises:
        StartupError: encoder tensors are missing or have another shape than the configuration says.
    """
    with selected_tensors(checkpoint) as tensors, quiet():
        try:
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
        except (RuntimeError, ValueError) as error:
            raise StartupError(
                f"model {checkpoint.name!r} does not match its config.json: {first_line(error)}"
            ) from error
    missing_tensors(checkpoint, [key for key in report["missing_keys"] if required(key)])
    assert isinstance(model, nn.Module)
    return model.requires_grad_(False)


def missing_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raise StartupError if there is any name among `names`, of tensors that the checkpoint lacks."""
    if missing := sorted(names):
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise StartupError(f"model {checkpoint.name!r} lacks {len(missing)} encoder tensors: {shown}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report of the language model's absence."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
