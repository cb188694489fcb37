"""What several test files share: data made for tests, tiny models and runs, servers, clusters and their faults."""
