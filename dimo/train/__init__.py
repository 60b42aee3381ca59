"""Training: the trainer, its engine (DDP, FSDP2, ZeRO-2), prompts, optimizers, guards and the training loop."""
