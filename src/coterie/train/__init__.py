"""Fine-tuning from one YAML file, on TRL's trainers."""
