"""Workloads: scenarios, traces and the open-loop load generator."""
