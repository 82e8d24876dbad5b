"""moe_torch: the Mixture-of-Experts layer in PyTorch, equal to moe_ref and fast."""
