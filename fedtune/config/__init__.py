"""The configuration of a run: its schema, and the files that it is read from."""
