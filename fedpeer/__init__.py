"""fedpeer: federated learning between organizations without a server."""
