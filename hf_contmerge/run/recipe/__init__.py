"""The recipe: its fields, how it is read, what a change of it undoes."""
