"""One paper, one file: each method is a Config, a State and the steps of client and server."""
