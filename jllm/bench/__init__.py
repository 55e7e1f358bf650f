"""Benchmarks of the engine and of servers: throughput, latency, start-up."""
