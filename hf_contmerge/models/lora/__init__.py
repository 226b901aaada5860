"""Reads and writes LoRA adapters without peft."""
