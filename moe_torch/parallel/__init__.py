"""moe_torch, the layer over process groups."""
