"""PEFT adapters of models with experts: written for servers, and merged into checkpoints."""
