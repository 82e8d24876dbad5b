"""moe_jax, pytrees: the data types of moe_ref that hold arrays, so that one class is used in every room."""

from dataclasses import fields

import jax

from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.params import LayerParams

for _kind in (LayerParams, RouterInputs):
    jax.tree_util.register_dataclass(_kind, data_fields=[field.name for field in fields(_kind)], meta_fields=[])
