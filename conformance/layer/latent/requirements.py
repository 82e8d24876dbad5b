"""conformance, layer: the requirements of latent."""

from conformance.core.register import MUST, chapter

chapter(
    "latent",
    ("LAT-1", MUST, "Experts of a latent width see the down projection of the token, and their weighted sum is "
                 "projected up, once.", "ml-explore/mlx-lm#1016"),
    ("LAT-2", MUST, "The router and the shared experts read the token, whatever the routed experts see.",
                 "PaddlePaddle/PaddleFleet#868"),
    ("LAT-3", MUST, "A latent with a norm is divided by its root mean square, with eps inside the root, and scaled, "
                 "between the weighted sum of the experts and the up projection."),
    ("LAT-4", MUST, "The projections of the latent and the scale of its norm get the gradients of every token."),
)  # fmt: skip
