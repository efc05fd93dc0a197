"""A multimodal model without its language model, built without memory behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from encode_server.models.generic.classes import ModelClass


class Received(Exception):
    """What the language model was about to receive. `embeddings`: [batch, tokens, dim]. `levels`: DeepStack levels,
    each [image tokens, dim]."""

    def __init__(self, embeddings: torch.Tensor, levels: list[torch.Tensor]) -> None:
        super().__init__("the language model was reached")
        self.embeddings, self.levels = embeddings, levels


class _NoEmbedding(nn.Module):
    """Stands for the language model's embedding table: every token is zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.embedding_dim = width
        # Where zeros are made and of which dtype; it is moved and cast with the model.
        self.register_buffer("like", torch.zeros(1), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """Has the dtype and the device that callers ask the table for."""
        return self.like  # type: ignore[return-value]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.like.dtype, device=ids.device)  # type: ignore[arg-type]


class NoLanguageModel(nn.Module):
    """Stands where the language model stood, and raises `Received` with what arrives there."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _NoEmbedding(width)
        self.rope_deltas = None

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @property
    def encoder(self) -> nn.Module:
        """The first part of an encoder-decoder language model, where its rows arrive."""
        return self

    def get_per_layer_inputs(self, *_: Any, **__: Any) -> None:
        """Gemma's second embedding of text tokens; media have none."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        embeddings = kwargs.get("inputs_embeds")
        levels = kwargs.get("deepstack_visual_embeds")
        if embeddings is None:
            raise ValueError("the language model is given no inputs_embeds")
        raise Received(embeddings, list(levels) if levels is not None else [])


class LeftOut(nn.Module):
    """Stands where a part stood that encodes nothing, and fails if that was a mistake."""

    def forward(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("a part of the model was left out that this item needs")


def stripped(found: ModelClass, left_out: Sequence[str] = ()) -> Any:
    """A subclass of `found.cls` that builds no language model, no head, and none of the modules called `left_out`.

    transformers looks classes up by name and module, so the subclass keeps both.
    """

    class Stripped(found.cls):  # type: ignore[misc,name-defined]
        _tied_weights_keys = None
        _keys_to_ignore_on_load_unexpected = (r".*",)

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _strip(self)
            for name in left_out:
                self.set_submodule(name, LeftOut())
            _untie(self)
            self._has_no_head = True

        def get_output_embeddings(self) -> Any:
            # BLIP-2 looks for its head in its language model, which is gone.
            return None if hasattr(self, "_has_no_head") else super().get_output_embeddings()

    Stripped.__name__ = found.cls.__name__
    Stripped.__qualname__ = found.cls.__qualname__
    Stripped.__module__ = found.cls.__module__
    return Stripped


def skeleton(found: ModelClass) -> nn.Module:
    """The stripped model on the meta device."""
    with torch.device("meta"):
        model: nn.Module = stripped(found)(found.config)
    return model


def _strip(model: Any) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    parts = _language_parts(model, decoder, names)
    if not parts:
        return
    head = model.get_output_embeddings()
    try:
        table = decoder.get_input_embeddings()
    except NotImplementedError:
        table = model.get_input_embeddings()
    width = int(table.weight.shape[-1])
    with torch.device("meta" if decoder_is_meta(decoder) else "cpu"):
        for name, part in parts.items():
            model.set_submodule(name, NoLanguageModel(part.config, width))
    if head is not None and id(head) in names and not any(names[id(head)].startswith(f"{name}.") for name in parts):
        model.set_submodule(names[id(head)], nn.Identity())


def _untie(model: Any) -> None:
    """Forget ties between tensors of which one is gone."""
    left = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    ties = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {target: source for target, source in ties.items() if {target, source} <= left}


def _language_parts(model: Any, decoder: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """The modules that make up the language model, by name; none where the language model cannot be told apart.

    `names`: of the modules of `model` by their id.
    """
    name = names.get(id(decoder), "") if decoder is not None else ""
    if not name:
        return {}
    if not _is_encoder_decoder(model):
        return {name: decoder}
    # An encoder-decoder language model receives the rows in its own encoder, the module that holds the word table.
    table = names.get(id(model.get_input_embeddings()), "")
    if table.startswith(f"{name}."):
        return {name: decoder}
    if not (encoder := table.rpartition(".")[0]):
        return {}
    return {encoder: model.get_submodule(encoder), name: decoder}


def decoder_is_meta(decoder: nn.Module) -> bool:
    """Whether the language model has no memory behind it."""
    return next(decoder.parameters()).is_meta


def _is_encoder_decoder(model: Any) -> bool:
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)
