"""conformance, layer: the requirements of null."""

from conformance.core.register import MUST, chapter

chapter(
    "null",
    ("NUL-1", MUST, "A constant expert returns a1 * x + a2 * v, with (a1, a2) the softmax of its own two logits of x; "
                 "a zero expert adds nothing."),
    ("NUL-2", MUST, "The vectors and the matrices of constant experts get the gradients of their own tokens."),
)  # fmt: skip
