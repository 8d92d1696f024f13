"""Use by others: a server, a chat in a terminal, and a playground in the browser."""
