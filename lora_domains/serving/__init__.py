"""Use by others: a server for one machine, and what it shares with a chat in a terminal."""
