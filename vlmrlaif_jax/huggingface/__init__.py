"""Published checkpoints in and out: layouts, tensor files and PEFT adapters."""
