"""What "correct" means for each op: plain torch, one file per op, any floating-point dtype, any device."""
