"""GGUF files opened by Transformers: config, tokenizer, and the weights beside the experts."""
