"""moe_torch, the batch-invariant mode: the same calls on tensors of the same shapes for each token.

Legend: T tokens, D model dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.router import RouterSpec
from moe_torch.routing import Routing, Stages


def of_each_token(
    layer: Callable[..., tuple[Tensor, Routing]],
    x_TD: Tensor,
    token_mask_T: Tensor | None,
    inputs: RouterInputs,
    router: RouterSpec,
) -> tuple[Tensor, Routing]:
    """What a layer returns for each token alone, as that of one batch; there is a token at least.

    Args:
        layer: of (1, D) tokens, their mask and their inputs.
    """
    T = len(x_TD)
    mask_T = torch.ones_like(x_TD[:, 0], dtype=torch.bool) if token_mask_T is None else token_mask_T
    alone = [
        # With memory of its own: a kernel may look at where a row begins.
        layer(x_TD[t : t + 1].clone(), mask_T[t : t + 1], own)
        for t, own in enumerate(inputs.shards(router, [1] * T))
    ]
    outputs, routings = zip(*alone, strict=True)
    return torch.cat(outputs), join_routings(routings)


def join_routings(routings: Sequence[Routing]) -> Routing:
    """The routing of consecutive batches as that of one."""

    def joined(name: str, parts: Sequence[Any]) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    def stages() -> Stages:
        return Stages(
            **{field.name: joined(field.name, [each._stages() for each in routings]) for field in fields(Stages)}
        )

    names = [field.name for field in fields(Routing) if field.name not in ("mask_fill", "stages")]
    tensors: dict[str, Any] = {name: joined(name, routings) for name in names}
    return Routing(mask_fill=routings[0].mask_fill, stages=stages, **tensors)
