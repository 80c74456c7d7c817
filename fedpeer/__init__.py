"""Federated learning between organizations without a server.

In which order to read: `stage` and `peers`, the two pages an author of algorithms needs, and
`algorithms.horizontal.logistic` as an example; `jobs.execution`, one stage at one peer; `jobs.lifecycle` and
`aggregation.messages`, what peers say to each other about a job and about a sum; `mesh.service` and `wire.session`,
how they say it. ARCHITECTURE.md has the map.
"""

__version__ = "0.1.0"
