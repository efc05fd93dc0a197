"""A batch of items to rows: through the model's features method, or its own forward up to the language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from encode_server.models.generic.classes import ModelClass
from encode_server.models.generic.joining import TOKENS, Item, groups, join
from encode_server.models.generic.skeleton import Received
from encode_server.wire.checkpoint import ModalityFacts, Route
from encode_server.wire.modality import Modality


class Features:
    """The encoder of one modality."""

    def __init__(self, model: Any, found: ModelClass, modality: Modality) -> None:
        """`model`: of the class that was `found`, stripped."""
        method, takes = found.features_method(modality), found.takes(modality)
        assert method is not None and takes is not None
        self._model, self._method, self._takes = model, method, takes
        self._forward_takes = frozenset(inspect.signature(found.cls.forward).parameters)

    def run(self, items: Sequence[Item], facts: ModalityFacts, device: torch.device) -> list[torch.Tensor]:
        """[tokens, dim] per item.

        Raises:
            ValueError: the encoder gave another number of rows than the prompt has placeholders.
        """
        results: dict[int, torch.Tensor] = {}
        for indices in groups(items, facts):
            chosen = [items[index] for index in indices]
            counts = [int(item[TOKENS]) for item in chosen]
            rows = self._rows(chosen, facts, device)
            if len(rows) != sum(counts):
                raise ValueError(f"the encoder gave {len(rows)} rows for {sum(counts)} placeholders")
            results.update(zip(indices, torch.split(rows, counts), strict=True))
        return [results[index] for index in range(len(items))]

    def _rows(self, items: Sequence[Item], facts: ModalityFacts, device: torch.device) -> torch.Tensor:
        inputs = cast(join(items, facts.batching), device, self._model.dtype)
        if facts.route is Route.FEATURES:
            return self._direct(inputs)
        count = sum(int(item[TOKENS]) for item in items)
        ids = torch.full((1, count), facts.token, device=device)
        return self.receive({"input_ids": ids, **inputs}, facts.token)

    def _direct(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        method = getattr(self._model, self._method, None) or getattr(self._model.base_model, self._method)
        taken = {name: value for name, value in inputs.items() if name in self._takes}
        output = method(**taken, return_dict=True)
        main = _flat(getattr(output, "pooler_output", output))
        levels = [_flat(level) for level in getattr(output, "deepstack_features", None) or ()]
        return torch.cat([main, *levels], dim=-1) if levels else main

    def receive(self, inputs: Mapping[str, torch.Tensor], token: int) -> torch.Tensor:
        """[placeholders, dim] of what the language model is given where `inputs["input_ids"]` is `token`.

        DeepStack levels follow along dim.

        Raises:
            ValueError: the model's forward ended elsewhere.
        """
        taken = {name: value for name, value in inputs.items() if name in self._forward_takes}
        ids = inputs["input_ids"]
        if "position_ids" in self._forward_takes:
            taken["position_ids"] = torch.zeros_like(ids)  # the language model's affair
        try:
            self._model(**taken)
        except Received as received:
            rows = received.embeddings[ids == token]
            levels = [level.reshape(-1, level.shape[-1]) for level in received.levels]
            return torch.cat([rows, *levels], dim=-1) if levels else rows
        raise ValueError("the model's forward does not reach its language model")


def _flat(features: Any) -> torch.Tensor:
    """Features of any nesting as [rows, dim]."""
    if isinstance(features, torch.Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([_flat(part) for part in features])


def cast(inputs: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`inputs` on `device`, real numbers in `dtype`."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in moved.items()}
