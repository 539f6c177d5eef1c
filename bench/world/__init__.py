"""A whole service and its fleet on one thread: production code, simulated ports, one seed.

`history.run(seed)` tells one history: a fleet, commits, commands, faults, and what came of them.
The event heap owns the clock; all chance follows from the seed; one seed is one history.
Production are the loop, orders, ingest, Git watcher, recorder, commands, both stores and the agent;
simulated are network and broker (`wire`), the remote repository (`repository`), machine and disk of
a device (`machine`), and time. The databases are the real ones on a memory file system without
fsync (`databases`): what a power cut does to a file is SQLite's promise and tested on real disks.
"""
