"""moe_ref, the readers: the configurations and the weights of other code bases, as specs and parameters of ours."""
