"""A federation over a network: the server, a client, their keys and processes."""
