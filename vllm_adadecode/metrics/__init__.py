"""What the method counts, and how counts get to vLLM's statistics, log and Prometheus metrics."""
