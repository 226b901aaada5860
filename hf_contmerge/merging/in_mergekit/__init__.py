"""The merge rules as mergekit methods; mergekit recipes, read and written."""
