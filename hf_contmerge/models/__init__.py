"""Reads and writes model folders tensor by tensor; knows adapters without peft."""
