"""What the metrics port serves: metrics for Prometheus, and a page for people."""
