"""moe_ref, strategy ragged_all_to_all: as all_to_all, into a receive buffer; what finds no room is dropped."""

from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies.all_to_all import AllToAll


class RaggedAllToAll(AllToAll):
    """A receiver has room for a fixed number of rows."""

    name = "ragged_all_to_all"

    def room(self, num_tokens: int, layout: ShardLayout, router: RouterSpec) -> int:
        """The rows of the buffer."""
        return layout.buffer_rows(num_tokens, router.num_experts, router.top_k)


RAGGED_ALL_TO_ALL = RaggedAllToAll()
