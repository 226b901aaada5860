"""What was forgotten, with intervals; budgets and searches that go by it."""
