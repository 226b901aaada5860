"""Train, merge and score, stage by stage."""
