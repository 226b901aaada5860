"""The `contmerge` command."""
