"""What is trained: `Pretrain` one expert, `Align` them all, `Distill` them into one encoder."""
