"""moe_ref, the spec of aligned rows: to which multiple the rows of each expert are padded."""

from dataclasses import dataclass

from moe_ref.specs.base import Spec
from moe_ref.specs.checks import integer, require


@dataclass(frozen=True, kw_only=True)
class AlignSpec(Spec):
    """Each expert has its rows rounded up to a multiple, as grouped kernels and fp8 want them.

    No output and no gradient depends on it: padding rows are zeros that belong to no slot.

    Raises:
        ValueError: a field is out of its range.
    """

    multiple: int
    """Rows of an expert come in so many: 8 for plain grouped matmuls, 16 for fp8, 32 for mxfp8, 128 for tiles."""
    idle_blocks: int = 0
    """How many multiples an expert without rows has. 0: none (vLLM and SGLang, `moe_align_block_size`); 1: one
    (torchtitan, `generate_permute_indices`), so that no group of a grouped matmul is empty."""

    def __post_init__(self):
        super().__post_init__()
        integer("multiple", self.multiple, 1)
        integer("idle_blocks", self.idle_blocks, 0)
        require(self.idle_blocks <= 1, f"idle_blocks is {self.idle_blocks}; it is 0 or 1")

    def max_rows(self, num_rows: int, num_experts: int) -> int:
        """A multiple that holds so many rows, however they are spread over the experts; shapes depend on it alone."""
        most = num_rows + num_experts * (self.multiple - 1)
        if self.idle_blocks:
            most = num_rows + num_experts * self.multiple
        elif num_rows < num_experts:
            most = num_rows * self.multiple
        return -(-most // self.multiple) * self.multiple
