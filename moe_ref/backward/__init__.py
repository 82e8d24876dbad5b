"""moe_ref, the gradients by hand: each function undoes one of the file of the same name."""
