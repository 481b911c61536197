"""The client's decisions and state, without threads and event loops."""
