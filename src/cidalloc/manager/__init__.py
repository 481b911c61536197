"""The manager's side: the registry of IDs and sessions, its file, and the service that answers."""
